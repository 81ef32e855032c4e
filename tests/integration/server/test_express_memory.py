"""What a request leaves behind when it has ended: nothing that waits for the garbage collector."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator, Iterator

import pytest

from lucid_compute.gateway.attempt import TasklessRequest
from lucid_compute.gateway.request import GatewayRequest, RunningRequest
from tests.api import ADMIN_KEY, Api
from tests.express_client import Client
from tests.fault_answers import respond
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
        (Behaviour(answer=respond(b"", status=500)), "failed"),
        (Behaviour(cut_head_after=0, ending=Ending.RESET), "handed over"),
        (Behaviour(delay_seconds=60), "hung up"),
    ],
    ids=["answered", "refused", "failed", "was closed", "left"],
)
@pytest.mark.usefixtures("uncollected")
async def test_a_request_of_the_express_lane_is_freed_when_it_ends(
    api: Api, node: FaultNode, behaviour: Behaviour, told: object
) -> None:
    """However it ends: with its body it may be 64 KiB, and thousands of them come before garbage is looked at."""
    node.script.append(behaviour)
    client = Client()
    gc.collect()
    assert api.app._inference is not None
    exchange = api.app._inference.accept(client, b"/v1/chat/completions", HEADERS, json.dumps(BODY).encode())
    assert isinstance(exchange, TasklessRequest)
    if told == "hung up":
        exchange.leave()
    assert await client.told == told
    del exchange
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
