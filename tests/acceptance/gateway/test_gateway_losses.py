"""The loss ledger under real faults: each of them has one cause, and the side that is at fault for it."""

from __future__ import annotations

import math
from typing import Any, NamedTuple
from uuid import uuid4

import httpx
import pytest

from lucid_compute.egress.faults import FaultKind
from tests.fault_answers import chat_stream, respond, unfinished_chat
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import Gateway, chat_answer
from tests.lucid_serve import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")


class Fault(NamedTuple):
    """A node's behaviour, for a stream or not, and the cause and side that the loss ledger must name."""

    behaviour: Behaviour
    cause: str
    side: str
    is_stream: bool = False


def status(code: int) -> Behaviour:
    """Return that status."""
    return Behaviour(answer=respond(b'{"error":{"message":"no"}}', status=code))


FAULTS = {
    **{f"status {code}": Fault(status(code), f"http_{code}", "provider") for code in (302, 429, 500)},
    "status 404": Fault(status(404), "endpoint_not_offered", "provider"),
    "status 400": Fault(status(400), "http_400", "client"),
    "a status of its own": Fault(status(777), "http_other", "provider"),
    "a web page": Fault(
        Behaviour(answer=respond(b"<html></html>", content_type="text/html")), "bad_response", "provider"
    ),
    "silence": Fault(Behaviour(delay_seconds=math.inf), "first_byte_timeout", "provider", is_stream=True),
    "no answer": Fault(Behaviour(delay_seconds=math.inf), "answer_timeout", "provider"),
    "a slow answer": Fault(Behaviour(answer=chat_answer(), drip_body_seconds=0.3), "answer_timeout", "provider"),
    "silence after a word": Fault(
        Behaviour(answer=unfinished_chat("a"), surplus_after_seconds=math.inf),
        "idle_timeout",
        "provider",
        is_stream=True,
    ),
    "a stream that is not done": Fault(
        Behaviour(answer=chat_stream("a", done=False)), "broken_stream", "provider", is_stream=True
    ),
    "a reset": Fault(Behaviour(cut_head_after=3, ending=Ending.RESET), "connection_lost", "network"),
    "a reset after a word": Fault(
        Behaviour(answer=unfinished_chat("a"), surplus_after_seconds=0.2, ending=Ending.RESET),
        "connection_lost",
        "network",
        is_stream=True,
    ),
}


async def one_loss(gateway: Gateway, owner: str) -> dict[str, Any]:
    """The only loss of an owner, once it is there; with what was completed it is all of its attempts."""
    found: list[dict[str, Any]] = []

    async def is_there() -> bool:
        report = (await gateway.admin.get("/payouts/losses", params={"owner": owner})).json()
        lost = sum(each["requests"] + each["retried"] for each in report["losses"])
        assert report["attempts"] == report["completed"] + report["running"] + lost
        found[:] = report["losses"]
        return bool(found)

    await eventually(is_there)
    (loss,) = found
    return loss


async def owned(gateway: Gateway, url: str) -> tuple[str, str]:
    """Register a node of an owner of its own, which asks a cent for a token; return a model on it, and the owner."""
    owner, model = uuid4().hex, await gateway.add_model()
    metadata = {"vram": 80, "runtimes": ["llama.cpp"], "inferenceUrl": url, "pricePer1kTokens": "10"}
    body = {"name": "node", "type": "compute", "owner": owner, "metadata": metadata}
    made = await gateway.admin.post("/passports", json=body)
    assert made.status_code == httpx.codes.CREATED, made.text
    await gateway.beat(made.json()["id"], model)
    return model, owner


@pytest.mark.parametrize("name", FAULTS)
async def test_what_a_node_does_wrong_has_one_cause_and_one_side(gateway: Gateway, name: str) -> None:
    fault = FAULTS[name]
    async with FaultNode(fault.behaviour) as node:
        model, owner = await owned(gateway, node.url)
        await gateway.chat(model, stream=fault.is_stream)
        loss = await one_loss(gateway, owner)
        assert (loss["cause"], loss["side"], loss["requests"], loss["retried"]) == (fault.cause, fault.side, 1, 0)


@pytest.mark.parametrize(
    ("kind", "cause", "side"),
    [
        ("a closed port", FaultKind.CONNECT_FAILED, "provider"),
        ("an unknown name", FaultKind.NAME_UNKNOWN, "provider"),
        ("no TLS", FaultKind.TLS_FAILED, "provider"),
        ("this service", FaultKind.ROUTING_LOOP, "provider"),
    ],
)
async def test_a_node_that_cannot_be_reached_has_one_cause_and_one_side(
    gateway: Gateway, kind: str, cause: str, side: str
) -> None:
    async with FaultNode() as node:
        urls = {"an unknown name": "http://nowhere.invalid:8080", "this service": gateway.served.url}
        urls |= {"no TLS": node.url.replace("http:", "https:"), "a closed port": node.url}
        model, owner = await owned(gateway, urls[kind])
        if kind == "a closed port":
            await node.stop()
        await gateway.chat(model)
        loss = await one_loss(gateway, owner)
        assert (loss["cause"], loss["side"], loss["requests"]) == (cause, side, 1)


async def test_a_client_that_leaves_is_to_blame_and_pays_for_what_it_got(gateway: Gateway) -> None:
    """What the rest would have earned is estimated by what such a request has earned before."""
    answer = chat_answer(tokens_in=0, tokens_out=2)
    stays = Behaviour(answer=unfinished_chat("a"), surplus_after_seconds=math.inf)
    async with FaultNode(Behaviour(answer=answer)) as node:
        model, owner = await owned(gateway, node.url)
        assert (await gateway.chat(model)).status_code == httpx.codes.OK
        node.behaviour = stays
        body = {"model": model, "messages": [{"role": "user", "content": "go on"}], "stream": True}
        async with gateway.raw.stream("POST", "/v1/chat/completions", json=body) as response:
            await anext(response.aiter_bytes())
        loss = await one_loss(gateway, owner)
        assert (loss["cause"], loss["side"], loss["requests"]) == ("client_left", "client", 1)
        (left, done) = await gateway.jobs(model, 2)
        assert (done["outcome"], done["priceUsd"]) == ("completed", "0.020")
        assert left["tokensOut"] == 1
