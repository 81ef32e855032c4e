"""What a request leaves behind when it has ended: nothing that waits for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from lucid_compute.gateway.lane import InferenceCall
from lucid_compute.gateway.request import GatewayRequest, RunningRequest
from lucid_compute.web.lanes import CutReason, IncomingRequest
from tests.api import ADMIN_KEY, Api
from tests.express_client import Client
from tests.fault_answers import chat_stream, respond
from tests.fault_node import Behaviour, Ending, FaultNode
from tests.gateway import QUESTION, chat_answer
from tests.integration.gateway.test_inference_limits import add_node

BODY = {"model": "tiny", "messages": QUESTION}
HEADERS = {b"authorization": f"Bearer {ADMIN_KEY}".encode()}


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Have no garbage collected."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
async def node(api: Api) -> AsyncIterator[FaultNode]:
    """A node that answered once, so that a connection to it is idle."""
    async with FaultNode(Behaviour(answer=chat_answer())) as node:
        await add_node(api, node)
        assert (await api.http.post("/v1/chat/completions", json=BODY)).status_code == 200
        yield node


def left() -> list[object]:
    """Return the requests that are still in memory."""
    return [known for known in gc.get_objects() if isinstance(known, GatewayRequest | RunningRequest)]


@pytest.mark.parametrize(
    ("behaviour", "told"),
    [
        (Behaviour(answer=chat_answer()), 200),
        (Behaviour(answer=respond(b"{}", status=400)), 400),
        (Behaviour(answer=respond(b"", status=500)), 502),
        (Behaviour(cut_head_after=0, ending=Ending.RESET), 200),
        (Behaviour(delay_seconds=60), "hung up"),
    ],
    ids=["answered", "refused", "failed", "was closed", "left"],
)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.usefixtures("uncollected")
async def test_a_request_of_the_express_lane_is_freed_when_it_ends(
    api: Api, node: FaultNode, behaviour: Behaviour, told: object, *, stream: bool
) -> None:
    """However it ends: with its body it may be 64 KiB, and thousands of them come before garbage is looked at."""
    is_served = stream and told == 200 and behaviour.ending is not Ending.RESET
    node.script.append(Behaviour(answer=chat_stream("a", "b")) if is_served else behaviour)
    body = {**BODY, "stream": stream}
    if stream:  # asked again, the node streams, too
        node.behaviour = Behaviour(answer=chat_stream("a", "b"))
    client = Client()
    gc.collect()
    request = IncomingRequest("/v1/chat/completions", HEADERS, json.dumps(body).encode())
    call = api.app.inference.accept(client, request)
    assert isinstance(call, InferenceCall)
    assert not call.is_waiting
    if told == "hung up":
        call.end(CutReason.CLIENT_LEFT)
    assert await client.told == told
    async for _ in client.body():
        pass
    del call, request
    await asyncio.sleep(0)
    assert left() == []


@pytest.mark.usefixtures("uncollected", "node")
async def test_a_request_of_the_ordinary_lane_is_freed_when_it_ends(api: Api) -> None:
    """As well."""
    gc.collect()
    assert (await api.http.post("/v1/chat/completions", json=BODY)).status_code == 200
    for _ in range(3):  # for one who watched whether its client left
        await asyncio.sleep(0)
    assert left() == []
