"""What a node answers is judged before the client gets a byte of it: another node replaces what is no answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

import httpx
import pytest

from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.express_client import Entrance
from tests.fault_answers import (
    OK_BODY,
    Answer,
    respond,
    respond_until_close,
)
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.lucid_serve import eventually

PATHS = ("chat/completions", "completions", "embeddings", "responses")


class Pair(NamedTuple):
    """A replica with the model `m` on two nodes, of which `bad` is tried first."""

    api: Api
    bad: FaultNode
    bad_id: str
    good: FaultNode


@asynccontextmanager
async def a_pair(api: Api, *, has_good: bool = True) -> AsyncIterator[Pair]:
    """Run two nodes, of which the good one reports to be loaded."""
    async with FaultNode() as bad, FaultNode() as good:
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


async def ask(api: Api, path: str = "chat/completions", **body: Any) -> httpx.Response:
    """Send a request of the model."""
    return await api.http.post(f"/v1/{path}", json={"model": "m", "messages": [], **body}, timeout=30)


async def jobs_of(api: Api, count: int) -> list[dict[str, Any]]:
    """Return the jobs once so many have ended, in the order of their attempts."""
    jobs: list[dict[str, Any]] = []

    async def have_ended() -> bool:
        listed = (await api.http.get("/compute/jobs", params={"perPage": 100})).json()["jobs"]
        jobs[:] = [job for job in listed if job["outcome"] != "running"]
        return len(jobs) >= count

    await eventually(have_ended)
    return sorted(jobs, key=lambda job: job["attempt"])


NO_ANSWERS: dict[str, bytes] = {
    "an error in text": b'{"error":"Unexpected endpoint or method. (POST /v1/chat/completions)"}',
    "an error": b'{"error":{"message":"engine exhausted","code":502}}',
    "an error beside choices": b'{"id":"1","choices":[{"message":{"content":""}}],"error":{"code":502}}',
    "an error inside a choice": b'{"choices":[{"message":{"content":""},"error":{"code":502}}]}',
    "a choice that ends with an error": b'{"choices":[{"message":{"content":"a"},"finish_reason":"error"}]}',
    "an error as vLLM says it": b'{"object":"error","message":"m","code":500}',
    "a detail": b'{"detail":"Not Found"}',
    "a message": b'{"message":"no","code":7}',
    "nothing": b"{}",
    "a list": b"[]",
    "null": b"null",
    "text": b'"ok"',
    "no JSON": b"this is no JSON at all",
    "half a JSON": OK_BODY[:-20],
    "a web page": b"<html><body>504</body></html>",
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


async def ask_badly(pair: Pair, answer: Answer, path: str = "chat/completions", **behaviour: Any) -> httpx.Response:
    """Return the response to a request that the bad node answers so; nothing it did before is held against it."""
    gateway = pair.api.replica.gateway
    gateway.context.stats.nodes.clear()
    gateway.context.stats._kinds.clear()
    gateway._retries = RetryBudgets()
    pair.bad.behaviour = Behaviour(answer=answer, **behaviour)
    response = await ask(pair.api, path)
    assert response.status_code == 200
    return response


async def test_what_is_no_answer_is_the_nodes_failure_and_is_replaced(api: Api) -> None:
    """At each endpoint and each entrance, whatever the status says; it is not billed."""
    async with a_pair(api) as pair:
        for name, body in NO_ANSWERS.items():
            for path in PATHS if len(body) < 100 else PATHS[:1]:
                response = await ask_badly(pair, respond(body), path)
                assert (response.content, response.headers["x-lucid-attempts"]) == (OK_BODY, "2"), (name, path)
        assert len(pair.bad.requests) == len(pair.good.requests)
        for job in await jobs_of(api, 100):
            ending = (job["outcome"], job["reason"], job["priceUsd"] is None)
            assert ending == (("failed", "bad_response", True) if job["attempt"] == 1 else ("completed", None, False))


async def test_an_answer_that_the_connections_end_cuts_is_replaced(api: Api) -> None:
    """Nothing but its JSON says that it is cut."""
    async with a_pair(api) as pair:
        for size in (40, 100_000):
            cut = respond_until_close(b'{"choices":[{"message":{"content":"' + b"x" * size)
            response = await ask_badly(pair, cut, ending=Ending.CLOSE)
            assert (response.content, response.headers["x-lucid-attempts"]) == (OK_BODY, "2")


CHAT = b'{"choices":[{"message":{"content":"%b"},"finish_reason":"stop"}],"error":null}'
GOOD: dict[str, bytes] = {
    "short": CHAT % b"hi",
    "white space around it": b"\r\n" + CHAT % b"hi" + b" \n",
    "long": CHAT % (b"x" * 100_000),
    "half a surrogate pair": CHAT % b"\\ud83d",
    "a tool's call": b'{"choices":[{"message":{"content":null,"tool_calls":[{"function":{"name":"error"}}]}}]}',
    "choices far behind": b'{"x":"' + b"x" * 100_000 + b'","choices":[{"message":{}}]}',
    "a number that is none": CHAT[:-1] % b"hi" + b',"logprobs":NaN}',
    "an error in its text": CHAT % rb"{\"error\":{\"code\":500}}",
}


async def test_an_answer_is_known_by_what_it_is(api: Api) -> None:
    """Whatever it is labelled, and however long it is."""
    async with a_pair(api) as pair:
        for content_type in ("application/json", "Application/JSON; charset=utf-8", "text/plain", ""):
            for name, body in GOOD.items():
                response = await ask_badly(pair, respond(body, content_type=content_type))
                assert (response.content, len(pair.good.requests)) == (body, 0), name
                assert response.headers["content-type"] == "application/json"


async def test_a_refusal_that_is_no_json_is_the_nodes_failure(api: Api) -> None:
    """Something in front of the server wrote it, which knows nothing of the request."""
    plain = b"The plain HTTP request was sent to HTTPS port"
    async with a_pair(api) as pair:
        for status in (400, 413, 422):
            for body in (b"<html><body>no</body></html>", b"", plain, b'"no"', b'{"error":'):
                response = await ask_badly(pair, respond(body, status=status, content_type="text/html"))
                assert (response.content, response.headers["x-lucid-attempts"]) == (OK_BODY, "2"), body
        jobs = await jobs_of(api, 2 * 3 * 5)
        assert {job["reason"] for job in jobs if job["attempt"] == 1} == {"http_400", "http_413", "http_422"}


async def test_an_error_that_blames_the_request_is_its_refusal_also_under_a_200(api: Api) -> None:
    """As a status, so that clients raise it; no node is blamed."""
    async with a_pair(api) as pair:
        for code in (400, "422", 413):
            body = json.dumps({"error": {"message": "too long", "code": code}}).encode()
            pair.bad.behaviour = Behaviour(answer=respond(body))
            answer = await ask(api)
            assert (answer.status_code, answer.content, len(pair.good.requests)) == (int(code), body, 0)
        jobs = {(job["outcome"], job["reason"]) for job in await jobs_of(api, 3)}
        assert jobs == {("rejected", f"http_{code}") for code in (400, 413, 422)}


def usage_of(tokens_in: int, tokens_out: int) -> bytes:
    """Return an answer of every endpoint that claims so many tokens."""
    usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out}
    return json.dumps({**json.loads(OK_BODY), "usage": usage}).encode()


CLAIMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "far more in": (900_000, 1, {}),
    "far more out": (3, 99_999_999, {}),
    "more out than allowed": (3, 5, {"max_tokens": 1}),
    "everything": (900_000, 99_999_999, {"max_tokens": 1}),
}


async def test_no_usage_beyond_what_the_request_allows_is_billed(api: Api) -> None:
    """Neither more in than its bytes, nor more out than its limit or than what was delivered."""
    async with a_pair(api, has_good=False) as pair:
        for tokens_in, tokens_out, limits in CLAIMS.values():
            pair.bad.behaviour = Behaviour(answer=respond(usage_of(tokens_in, tokens_out)))
            for path in PATHS:
                assert (await ask(api, path, **limits)).status_code == 200
    for job in await jobs_of(api, len(CLAIMS) * len(PATHS)):
        assert (job["tokensCounted"], job["tokensIn"] < 100, job["tokensOut"] < 3) == (True, True, True)
        assert float(job["priceUsd"]) < 0.2


async def test_our_own_count_is_within_what_the_request_allows_too(api: Api) -> None:
    """Embeddings have no tokens out however long they are, and no answer has more than its limit."""
    vectors = json.dumps({"data": [{"embedding": [0.5] * 100_000}]}).encode()
    async with a_pair(api, has_good=False) as pair:
        pair.bad.behaviour = Behaviour(answer=respond(vectors))
        assert (await ask(api, "embeddings")).content == vectors
        pair.bad.behaviour = Behaviour(answer=respond(CHAT % (b"word " * 100)))
        assert (await ask(api, max_tokens=7)).status_code == 200
    assert {(job["tokensCounted"], job["tokensOut"]) for job in await jobs_of(api, 2)} == {(True, 0), (True, 7)}


async def test_a_large_body_of_many_fields_goes_on_whole(api: Api) -> None:
    """Its policy is taken out, other requests are served meanwhile, and of its faults at most a hundred are told."""
    fields = {f"k{number}": number for number in range(200_000)}
    body = {"model": "m", "stream": False, **fields, "lucid": {"routeStale": True}, "é": ["\n"]}
    async with a_pair(api, has_good=False) as pair:
        response = await api.http.post("/v1/chat/completions", json=body, timeout=60)
        assert response.status_code == 200
        sent = json.loads(pair.bad.requests[0].body)
        assert sent == {"model": "m", "stream": False, **fields, "é": ["\n"]}
        response = await api.http.post("/v1/chat/completions", json={"model": "m", "lucid": fields}, timeout=60)
        assert (response.status_code, len(response.json()["error"]["details"]["fields"])) == (422, 1)
        few = dict.fromkeys(list(fields)[:5000], 1)
        response = await api.http.post("/v1/chat/completions", json={"model": "m", "lucid": few}, timeout=60)
        assert (response.status_code, len(response.json()["error"]["details"]["fields"])) == (422, 1)
