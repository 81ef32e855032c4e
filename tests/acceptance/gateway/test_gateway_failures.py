"""Nodes that fail, before their first byte and after it: what the client sees of it, and what the ledger keeps."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, NamedTuple

import openai
import pytest

from tests.fault_answers import (
    BROKEN,
    Answer,
    chat_stream,
    redirect,
    respond,
    respond_in_chunks,
    unfinished_chat,
)
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import QUESTION, Gateway, chat_answer, within
from tests.lucid_serve import eventually

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.usefixtures("retries")]

TEXTS = ("one", " two", " three")
FAILOVER_SECONDS = 3.0  # what the service is set to wait for a node, at the most


class Pair(NamedTuple):
    """A model on two nodes, of which `bad` is always tried first."""

    model: str
    bad: FaultNode
    bad_id: str
    good: FaultNode
    good_id: str


@asynccontextmanager
async def a_pair(gateway: Gateway, behaviour: Behaviour) -> AsyncIterator[Pair]:
    """Run a node that behaves so, and a good one that reports to be loaded."""
    async with FaultNode(behaviour) as bad, FaultNode(Behaviour(answer=chat_answer())) as good:
        model = await gateway.add_model()
        bad_id = await gateway.add_node(bad.url, model)
        good_id = await gateway.add_node(good.url, model, beat={"load": 1})
        yield Pair(model, bad, bad_id, good, good_id)


async def require_failover(gateway: Gateway, pair: Pair, reason: str, *, stream: bool = False) -> None:
    """Send one request: the client sees nothing of the bad node, the ledger does."""
    if stream:
        pair.good.behaviour = Behaviour(answer=chat_stream("said"))
    answer = await gateway.chat(pair.model, stream=stream)
    assert (answer.status_code, len(pair.bad.requests), len(pair.good.requests)) == (200, 1, 1), answer.text
    assert (answer.headers["x-lucid-attempts"], answer.headers["x-lucid-node"]) == ("2", pair.good_id)
    assert '"content": "said"' in answer.text
    jobs = {job["attempt"]: job for job in await gateway.jobs(pair.model, 2)}
    outcome = "rejected" if reason == "http_429" else "failed"  # a busy node has not failed
    assert (jobs[1]["outcome"], jobs[1]["reason"], jobs[1]["passportId"]) == (outcome, reason, pair.bad_id)
    assert (jobs[2]["outcome"], jobs[2]["reason"], jobs[2]["passportId"]) == ("completed", None, pair.good_id)
    assert jobs[1]["id"] == jobs[2]["id"] == answer.headers["x-lucid-job"]


@pytest.mark.parametrize("status", [301, 401, 403, 429, 500, 503])
async def test_a_status_that_is_the_nodes_own_fault_is_never_seen(gateway: Gateway, status: int) -> None:
    """Another node serves the request; redirects are not followed."""
    async with FaultNode() as elsewhere:
        refusal = respond(b'{"error":{"message":"no"}}', status=status)
        answer = redirect(f"{elsewhere.url}/v1/chat/completions", 301) if status == 301 else refusal
        async with a_pair(gateway, Behaviour(answer=answer)) as pair:
            await require_failover(gateway, pair, f"http_{status}", stream=status in {429, 500})
        assert not elsewhere.connections


@pytest.mark.parametrize("status", [400, 413, 422])
async def test_a_status_that_is_the_clients_own_comes_as_the_node_said_it(gateway: Gateway, status: int) -> None:
    """With the node's body, at the first attempt; it never counts as the node's failure."""
    body = {"error": {"message": "too many tokens", "type": "invalid_request_error", "param": "messages", "code": "x"}}
    async with a_pair(gateway, Behaviour(answer=respond(json.dumps(body).encode(), status=status))) as pair:
        for _ in range(6):
            with pytest.raises(openai.APIStatusError) as refused:
                await gateway.openai.chat.completions.create(model=pair.model, messages=QUESTION)
            assert (refused.value.status_code, refused.value.code, refused.value.param) == (status, "x", "messages")
            assert refused.value.response.json() == body
            assert refused.value.response.headers["x-lucid-attempts"] == "1"
        jobs = await gateway.jobs(pair.model, 6)
        assert {(job["outcome"], job["reason"]) for job in jobs} == {("rejected", f"http_{status}")}
        assert not pair.good.requests
        shortlist = [node["passportId"] for node in (await gateway.match(pair.model))["shortlist"]]
        assert shortlist[0] == pair.bad_id
        assert not (await gateway.health(pair.bad_id))["errorRate"]


async def test_a_refusal_that_is_no_json_is_never_seen(gateway: Gateway) -> None:
    """Something in front of the server wrote it, so another node serves the request."""
    refusal = respond(b"<html>no</html>", status=400, content_type="text/html")
    async with a_pair(gateway, Behaviour(answer=refusal)) as pair:
        await require_failover(gateway, pair, "http_400")


FAULTS: dict[str, tuple[Behaviour, str]] = {
    "garbage": (Behaviour(answer=Answer(BROKEN["garbage"])), "bad_response"),
    "a web page": (Behaviour(answer=respond(b"<html></html>", content_type="text/html")), "bad_response"),
    "an empty answer": (Behaviour(answer=respond(b"")), "bad_response"),
    "hanging up": (Behaviour(cut_head_after=0, ending=Ending.CLOSE), "connection_lost"),
    "half an answer": (Behaviour(answer=chat_answer(), cut_body_after=40, ending=Ending.RESET), "connection_lost"),
    "a silent node": (Behaviour(delay_seconds=math.inf), "answer_timeout"),
    "a node that drips": (Behaviour(drip_head_seconds=0.2), "first_byte_timeout"),
}


SOUND_HTTP = {"a web page", "an empty answer"}  # the connection can be used again


@pytest.mark.parametrize("name", FAULTS)
async def test_an_answer_that_is_none_is_never_seen(gateway: Gateway, name: str) -> None:
    """Whatever a node sends instead of a response, or if it sends nothing, another node serves the request."""
    behaviour, reason = FAULTS[name]
    async with a_pair(gateway, behaviour) as pair:
        began = time.monotonic()
        await require_failover(gateway, pair, reason, stream=name == "a node that drips")
        assert time.monotonic() - began < within(FAILOVER_SECONDS)
        await pair.bad.until(lambda node: not node.open_connections or name in SOUND_HTTP)


async def test_a_stream_that_begins_with_an_error_is_never_seen(gateway: Gateway) -> None:
    """As vLLM does: status 200, and the fault in the first event."""
    answer = respond_in_chunks(b'data: {"error": {"message": "out of memory"}}\n\n')
    async with a_pair(gateway, Behaviour(answer=answer)) as pair:
        await require_failover(gateway, pair, "broken_stream", stream=True)


async def test_a_node_that_is_not_there_is_never_seen(gateway: Gateway) -> None:
    """Its port is closed, or its name unknown."""
    async with a_pair(gateway, Behaviour()) as pair:
        await pair.bad.stop()
        nowhere = await gateway.add_node("http://nobody.invalid:8080/v1", pair.model, beat={"load": 0})
        answer = await gateway.chat(pair.model)
        assert (answer.status_code, answer.headers["x-lucid-attempts"]) == (200, "3"), answer.text
        reasons = {job["passportId"]: job["reason"] for job in await gateway.jobs(pair.model, 3)}
        assert reasons == {pair.bad_id: "connect_failed", nowhere: "name_unknown", pair.good_id: None}


@pytest.mark.parametrize(
    ("behaviour", "stream", "code", "status"),
    [
        (Behaviour(answer=respond(b"{}", status=500)), False, "NODE_FAILED", 502),
        (Behaviour(delay_seconds=math.inf), True, "NODE_TIMEOUT", 504),
    ],
    ids=["failing", "silent"],
)
async def test_at_most_three_nodes_are_tried(
    gateway: Gateway, behaviour: Behaviour, code: str, status: int, *, stream: bool
) -> None:
    """Then the client is told how each of them failed."""
    async with AsyncExitStack() as stack:
        nodes = [await stack.enter_async_context(FaultNode(behaviour)) for _ in range(4)]
        model = await gateway.add_model()
        ids = {await gateway.add_node(node.url, model) for node in nodes}
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.openai.chat.completions.create(model=model, messages=QUESTION, stream=stream)
        assert (refused.value.code, refused.value.status_code) == (code, status)
        attempts = refused.value.body["details"]["attempts"]  # type: ignore[index]
        assert sum(len(node.requests) for node in nodes) == len(attempts) == 3
        assert {attempt["reason"] for attempt in attempts} == {"first_byte_timeout" if stream else "http_500"}
        tried = [attempt["passportId"] for attempt in attempts]
        assert len(set(tried)) == 3
        assert set(tried) < ids
        assert refused.value.response.headers["x-lucid-job"] == (await gateway.jobs(model, 3))[0]["id"]


ENDS: dict[str, tuple[Behaviour, str, str]] = {
    "a reset": (Behaviour(ending=Ending.RESET, surplus_after_seconds=0.2), "connection_lost", "NODE_FAILED"),
    "hanging up": (Behaviour(ending=Ending.CLOSE, surplus_after_seconds=0.2), "connection_lost", "NODE_FAILED"),
    "silence": (Behaviour(surplus_after_seconds=math.inf), "idle_timeout", "NODE_TIMEOUT"),
    "an end without [DONE]": (Behaviour(surplus=b"0\r\n\r\n"), "broken_stream", "NODE_FAILED"),
    "an error": (
        Behaviour(surplus=b'21\r\ndata: {"error":{"message":"x"}}\n\n\r\n', surplus_after_seconds=0.2),
        "broken_stream",
        "NODE_FAILED",
    ),
    "garbage": (Behaviour(surplus=b"no chunk\r\n", surplus_after_seconds=0.2), "bad_response", "NODE_FAILED"),
}


@pytest.mark.parametrize("name", ENDS)
async def test_a_stream_that_breaks_off_raises_and_bills_what_was_delivered(gateway: Gateway, name: str) -> None:
    """OpenAI's client raises after the last piece that came; no [DONE], no second attempt, no token too many."""
    behaviour, reason, code = ENDS[name]
    async with FaultNode(_with_answer(behaviour, unfinished_chat(*TEXTS))) as node, FaultNode() as spare:
        model = await gateway.add_model()
        node_id = await gateway.add_node(node.url, model)
        await gateway.add_node(spare.url, model, beat={"load": 1})
        pieces: list[str] = []
        broken = await read_until_it_breaks(gateway, model, pieces)
        assert (tuple(pieces), broken.code) == (TEXTS, code)
        job, *others = await gateway.jobs(model)
        assert not others
        assert (job["outcome"], job["reason"], job["tokensOut"], job["tokensCounted"]) == ("failed", reason, 3, True)
        raw = await gateway.chat(model, stream=True, lucid={"nodeIds": [node_id]})  # which is shunned for a moment
        assert raw.status_code == 200
        assert raw.text.count("data: ") == len(TEXTS) + 1
        assert "[DONE]" not in raw.text
        assert not spare.requests
        await node.until(lambda node: not node.open_connections or name == "an end without [DONE]")


async def read_until_it_breaks(gateway: Gateway, model: str, pieces: list[str]) -> openai.APIError:
    """Put what a stream says into `pieces`; return the error that it has to end with."""
    stream = await gateway.openai.chat.completions.create(model=model, messages=QUESTION, stream=True)
    try:
        async for chunk in stream:
            pieces += [choice.delta.content or "" for choice in chunk.choices]
    except openai.APIError as error:
        return error
    pytest.fail(f"the stream ended as if it were whole: {pieces}")


async def test_what_an_only_node_fails_at_for_several_keys_is_its_own(gateway: Gateway) -> None:
    """It goes on to get every request. Once another node has the model, one failure is enough to block it."""
    failing = respond(b'{"error":{"message":"CUDA error: out of memory"}}', status=500)
    async with FaultNode(Behaviour(answer=failing)) as bad, FaultNode(Behaviour(answer=chat_answer())) as good:
        model = await gateway.add_model()
        bad_id = await gateway.add_node(bad.url, model)
        other = await gateway.new_key()
        for key in [gateway.key, other["key"]] * 3:
            headers = {"Authorization": f"Bearer {key}"}
            body = {"model": model, "messages": QUESTION}
            answer = await gateway.raw.post("/v1/chat/completions", json=body, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (502, "NODE_FAILED")
        assert len(bad.requests) == 6
        assert "BREAKER_OPEN" not in (await gateway.match(model))["rejections"]
        await gateway.add_node(good.url, model)

        async def is_blocked() -> bool:
            assert (await gateway.chat(model)).status_code == 200
            rejected = {each["passportId"]: each["reasons"] for each in (await gateway.match(model))["rejected"]}
            return "BREAKER_OPEN" in str(rejected.get(bad_id))

        await eventually(is_blocked)
        assert len(bad.requests) == 7


@pytest.mark.parametrize("way", ["itself", "another name", "a proxy"])
async def test_a_url_that_leads_back_to_us_is_a_loop(gateway: Gateway, way: str) -> None:
    """508 at the first hop, also through somebody who only passes requests on."""
    url = gateway.served.url
    async with FaultNode(upstream=url) as proxy:
        leads_back = {"itself": url, "another name": url.replace("127.0.0.1", "localhost"), "a proxy": proxy.url}
        model = await gateway.add_model()
        await gateway.add_node(leads_back[way], model, inferenceKey=gateway.key)
        with pytest.raises(openai.InternalServerError) as refused:
            await gateway.openai.chat.completions.create(model=model, messages=QUESTION)
        assert (refused.value.status_code, refused.value.code) == (508, "ROUTING_LOOP")
        reasons = [job["reason"] for job in await gateway.jobs(model)]
        assert reasons == (["http_508"] if way == "a proxy" else ["routing_loop"])
        assert len(proxy.requests) == (way == "a proxy")


def _with_answer(behaviour: Behaviour, answer: Answer) -> Behaviour:
    fields: dict[str, Any] = {name: getattr(behaviour, name) for name in Behaviour.__slots__}
    return Behaviour(**{**fields, "answer": answer})
