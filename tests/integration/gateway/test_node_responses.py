"""What a node answers is judged before the client gets a byte of it: another node replaces what is no answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api
from tests.express_client import Entrance
from tests.fault_answers import (
    EVENTS,
    OK_BODY,
    Answer,
    respond,
    respond_in_chunks,
    respond_until_close,
)
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.ledger import ended

PATHS = ("chat/completions", "completions", "embeddings", "responses")
DONE = b"data: [DONE]\n\n"


class Pair(NamedTuple):
    """A replica with the model `m` on two nodes, of which `bad` is tried first."""

    api: Api
    bad: FaultNode
    bad_id: str
    good: FaultNode


@asynccontextmanager
async def a_pair(api: Api, behaviour: Behaviour, *, has_good: bool = True) -> AsyncIterator[Pair]:
    """Run a node that behaves so, and a good one that reports to be loaded."""
    async with FaultNode(behaviour) as bad, FaultNode(Behaviour(answer=respond(OK_BODY))) as good:
        await api.add_model("m", "gguf")
        metadata = {"runtimes": ["llama.cpp"], "pricePer1kTokens": "1"}
        bad_id = await api.register("bad", {**metadata, "inferenceUrl": bad.url})
        assert (await api.beat(bad_id, load=0, availableModels=["m"])).status_code == 200
        if has_good:
            good_id = await api.register("good", {**metadata, "inferenceUrl": good.url})
            assert (await api.beat(good_id, load=1, availableModels=["m"])).status_code == 200
        yield Pair(api, bad, bad_id, good)


@pytest.fixture
async def api(database_url: str, settings: Settings, entrance: Entrance) -> AsyncIterator[Api]:
    """A replica that is asked at either entrance of the lane."""
    async with open_api(database_url, settings) as opened:
        yield entrance(opened)


@pytest.fixture
async def plain_api(database_url: str) -> AsyncIterator[Api]:
    """A replica that is asked by ASGI, as streams always are. Deadlines are short."""
    settings = Settings(
        bootstrap_admin_key=ADMIN_KEY,  # type: ignore[arg-type]
        first_byte_timeout_seconds=1,
        between_bytes_timeout_seconds=1,
        max_answer_mib=1,
        max_stream_mib=2,
        max_event_mib=1,
    )
    async with open_api(database_url, settings) as opened:
        opened.replica.watchdog.requests.clear()
        yield opened


async def ask(api: Api, path: str = "chat/completions", **body: Any) -> httpx.Response:
    """Send a request of the model."""
    return await api.http.post(f"/v1/{path}", json={"model": "m", "messages": [], **body}, timeout=30)


async def jobs_of(api: Api, count: int) -> list[dict[str, Any]]:
    """Return the jobs once so many have ended, in the order of their attempts."""
    return sorted(await ended(api, count), key=lambda job: job["attempt"])


HTML = b"<html><body>504</body></html>"
CUT = OK_BODY[:-20]
NO_ANSWERS: dict[str, bytes] = {
    "an error in text": b'{"error":"Unexpected endpoint or method. (POST /v1/chat/completions)"}',
    "an error": b'{"error":{"message":"engine exhausted","code":502}}',
    "an error beside choices": b'{"id":"1","choices":[{"message":{"content":""}}],"error":{"code":502}}',
    "an error inside a choice": b'{"choices":[{"message":{"content":""},"error":{"code":502},"finish_reason":"error"}]}',
    "an error as vLLM says it": b'{"object":"error","message":"m","code":500}',
    "a detail": b'{"detail":"Not Found"}',
    "a message": b'{"message":"no","code":7}',
    "nothing": b"{}",
    "a list": b"[]",
    "null": b"null",
    "text": b'"ok"',
    "no JSON": b"this is no JSON at all",
    "half a JSON": CUT,
    "a web page": HTML,
    "an event": b'data: {"choices":[]}\n\n',
    "no choices": b'{"choices":[],"data":[]}',
    "choices of null": b'{"choices":null,"data":null,"output":null}',
    "choices of another shape": b'{"choices":["a"],"data":["a"],"output":"a"}',
    "choices without text": b'{"choices":[{}],"data":[{}]}',
    "two answers": OK_BODY + OK_BODY,
    "too deep": b'{"choices":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "an error after long white space": b" " * 100_000 + b'{"error":"no"}',
    "a long one that is cut": b'{"choices":[{"message":{"content":"' + b"x" * 100_000,
    "a long one without choices": b'{"results":[{"message":{"content":"' + b"x" * 100_000 + b'"}}]}',
    "a long error": b'{"error":{"code":500,"message":"' + b"x" * 100_000 + b'"}}',
}


@pytest.mark.parametrize("name", NO_ANSWERS)
async def test_what_is_no_answer_is_the_nodes_failure_and_is_replaced(api: Api, name: str) -> None:
    """At each endpoint and each entrance, whatever the status says; it is not billed."""
    async with a_pair(api, Behaviour(answer=respond(NO_ANSWERS[name]))) as pair:
        for number, path in enumerate(PATHS):
            api.replica.gateway.context.stats.nodes.clear()
            answer = await ask(api, path)
            assert (answer.status_code, answer.content, answer.headers["x-lucid-attempts"]) == (200, OK_BODY, "2"), path
            assert (len(pair.bad.requests), len(pair.good.requests)) == (number + 1, number + 1)
        jobs = await jobs_of(api, 8)
        assert {(job["outcome"], job["reason"], job["priceUsd"]) for job in jobs[:4]} == {
            ("failed", "bad_response", None)
        }
        assert {job["outcome"] for job in jobs[4:]} == {"completed"}


@pytest.mark.parametrize("size", [40, 100_000])
async def test_an_answer_that_the_connections_end_cuts_is_replaced(api: Api, size: int) -> None:
    """Nothing but its JSON says that it is cut."""
    body = b'{"choices":[{"message":{"content":"' + b"x" * size
    async with a_pair(api, Behaviour(answer=respond_until_close(body), ending=Ending.CLOSE)):
        answer = await ask(api)
    assert (answer.status_code, answer.content, answer.headers["x-lucid-attempts"]) == (200, OK_BODY, "2")


CHAT = b'{"choices":[{"message":{"content":"%b"},"finish_reason":"stop"}],"error":null}'
GOOD: dict[str, bytes] = {
    "short": CHAT % b"hi",
    "white space around it": b"\r\n" + CHAT % b"hi" + b" \n",
    "long": CHAT % (b"x" * 100_000),
    "half a surrogate pair": CHAT % b"\\ud83d",
    "a tool's call": b'{"choices":[{"message":{"content":null,"tool_calls":[{"function":{"name":"error"}}]}}]}',
    "choices far behind": b'{"x":"' + b"x" * 100_000 + b'","choices":[{"message":{}}]}',
    "a number that is none": CHAT[:-1] % b"hi" + b',"logprobs":NaN}',
    "an error in its text": CHAT % rb'{\"error\":{\"code\":500}}',
}


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8", "text/plain", ""])
@pytest.mark.parametrize("name", GOOD)
async def test_an_answer_is_known_by_what_it_is(api: Api, name: str, content_type: str) -> None:
    """Whatever it is labelled, and however long it is."""
    async with a_pair(api, Behaviour(answer=respond(GOOD[name], content_type=content_type))) as pair:
        answer = await ask(api)
        assert (answer.status_code, answer.content, len(pair.good.requests)) == (200, GOOD[name], 0)
        assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", [400, 413, 422])
@pytest.mark.parametrize("body", [HTML, b"", b"The plain HTTP request was sent to HTTPS port", b'"no"', b'{"error":'])
async def test_a_refusal_that_is_no_json_is_the_nodes_failure(api: Api, status: int, body: bytes) -> None:
    """Something in front of the server wrote it, which knows nothing of the request."""
    async with a_pair(api, Behaviour(answer=respond(body, status=status, content_type="text/html"))):
        answer = await ask(api)
        assert (answer.status_code, answer.headers["x-lucid-attempts"]) == (200, "2")
        assert [job["reason"] for job in await jobs_of(api, 2)] == [f"http_{status}", None]


@pytest.mark.parametrize("code", [400, "422", 413])
async def test_an_error_that_blames_the_request_is_its_refusal_also_under_a_200(api: Api, code: Any) -> None:
    """As a status, so that clients raise it; no node is blamed."""
    body = json.dumps({"error": {"message": "too long", "code": code}}).encode()
    async with a_pair(api, Behaviour(answer=respond(body))) as pair:
        answer = await ask(api)
        assert (answer.status_code, answer.content, len(pair.good.requests)) == (int(code), body, 0)
        assert [(job["outcome"], job["reason"]) for job in await jobs_of(api, 1)] == [("rejected", f"http_{code}")]


def usage_of(tokens_in: int, tokens_out: int) -> bytes:
    """Return an answer of every endpoint that claims so many tokens."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return json.dumps({**json.loads(OK_BODY), "usage": usage}).encode()


@pytest.mark.parametrize("path", PATHS)
async def test_no_usage_beyond_what_the_request_allows_is_billed(api: Api, path: str) -> None:
    """Neither more in than its bytes, nor more out than its limit or than what was delivered."""
    for number, (tokens_in, tokens_out, limits) in enumerate(
        [(900_000, 1, {}), (3, 99_999_999, {}), (3, 5, {"max_tokens": 1}), (900_000, 99_999_999, {"max_tokens": 1})]
    ):
        answer = Behaviour(answer=respond(usage_of(tokens_in, tokens_out)))
        if not number:
            pair = a_pair(api, answer)
            bad = (await pair.__aenter__()).bad
        bad.behaviour = answer
        assert (await ask(api, path, **limits)).status_code == 200
    jobs = await jobs_of(api, 4)
    await pair.__aexit__(None, None, None)
    assert {(job["tokensCounted"], job["tokensIn"] < 100, job["tokensOut"] < 3) for job in jobs} == {(True, True, True)}
