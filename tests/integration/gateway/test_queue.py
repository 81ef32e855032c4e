"""Requests that wait for a node at its capacity: in turns of their keys, bounded, and gone with their clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.express_client import Entrance
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.integration.gateway.test_node_responses import ask
from tests.lucid_serve import eventually


@asynccontextmanager
async def queueing(
    database_url: str, settings: Settings, entrance: Entrance, *, most: int = 10, seconds: float = 60.0
) -> AsyncIterator[Api]:
    """A replica with the model `m` and a queue."""
    changed = settings.model_copy(update={"inference_queue": most, "inference_queue_seconds": seconds})
    async with open_api(database_url, changed) as opened:
        await opened.add_model("m", "gguf")
        yield entrance(opened)


async def add_node(api: Api, node: FaultNode, name: str = "node") -> None:
    """Register a node that serves `m`, one request at a time."""
    node_id = await api.register(name, {"inferenceUrl": node.url, "runtimes": ["llama.cpp"], "maxConcurrency": 1})
    assert (await api.beat(node_id, availableModels=["m"])).status_code == 200


async def comes_to(api: Api, depth: int) -> None:
    """Wait until so many requests wait."""

    async def does() -> bool:
        queue = api.replica.gateway.queue
        return queue is not None and queue.depth == depth

    await eventually(does)


async def until_asked(node: FaultNode, count: int = 1) -> None:
    """Wait until so many requests have come to the node."""

    async def was() -> bool:
        return len(node.requests) >= count

    await eventually(was)


async def test_requests_wait_and_keys_take_turns(database_url: str, settings: Settings, entrance: Entrance) -> None:
    """A key's only request goes ahead of all but one of those that another key has sent before."""
    async with queueing(database_url, settings, entrance) as api, FaultNode(Behaviour(delay_seconds=60.0)) as node:
        await add_node(api, node)
        quiet = entrance(await api.new_key("quiet", ["inference:run"]))
        running = asyncio.create_task(ask(api))
        await until_asked(node)
        loud = [asyncio.create_task(ask(api, user=f"loud {n}")) for n in range(4)]
        await comes_to(api, 4)
        only = asyncio.create_task(ask(quiet, user="quiet"))
        await comes_to(api, 5)
        assert len(node.requests) == 1
        node.behaviour = Behaviour()
        running.cancel()
        assert {answer.status_code for answer in await asyncio.gather(*loud, only)} == {200}
        order = [b"quiet" in request.body for request in node.requests]
        assert (len(order), order.index(True)) in ((6, 1), (6, 2))
        metrics = (await api.http.get("/metrics")).text
        assert "lucid_inference_waiting 0.0" in metrics
        assert "lucid_inference_queue_seconds_count 5.0" in metrics


async def test_the_queue_is_bounded_and_a_client_that_leaves_frees_its_place(
    database_url: str, settings: Settings, entrance: Entrance
) -> None:
    async with (
        queueing(database_url, settings, entrance, most=1) as api,
        FaultNode(Behaviour(delay_seconds=60.0)) as node,
    ):
        await add_node(api, node)
        running = asyncio.create_task(ask(api))
        await until_asked(node)
        waiting = asyncio.create_task(ask(api))
        await comes_to(api, 1)
        refused = await ask(api)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (503, "MODEL_UNAVAILABLE")
        assert error["details"]["rejections"]["AT_CAPACITY"] == 1
        assert "retry-after" in refused.headers
        waiting.cancel()
        await comes_to(api, 0)
        node.behaviour = Behaviour()
        last = asyncio.create_task(ask(api))
        await comes_to(api, 1)
        running.cancel()
        assert (await last).status_code == 200
        assert len(node.requests) == 2


async def test_a_request_that_has_waited_long_enough_is_refused(
    database_url: str, settings: Settings, entrance: Entrance
) -> None:
    """Here for a node that said that it is busy for longer, which is no failure of it."""
    async with queueing(database_url, settings, entrance, seconds=0.3) as api, FaultNode() as node:
        await add_node(api, node)
        node.behaviour = Behaviour(answer=respond(b"{}", "Retry-After: 30", status=429))
        refused = await ask(api)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "MODEL_UNAVAILABLE")
        assert "AT_CAPACITY" in refused.json()["error"]["details"]["rejections"]
        await comes_to(api, 0)


async def test_a_node_that_becomes_free_in_another_way_serves_what_waits(
    database_url: str, settings: Settings, entrance: Entrance
) -> None:
    """One that joins, one that said for how long it is busy. What finds no node for another reason never waits."""
    async with queueing(database_url, settings, entrance) as api, FaultNode() as node, FaultNode() as another:
        assert (await ask(api)).status_code == 503
        node.script += [Behaviour(answer=respond(b"{}", "Retry-After: 1", status=429))]
        await add_node(api, node)
        answered = await ask(api)
        assert (answered.status_code, answered.headers["x-lucid-attempts"]) == (200, "2")
        node.behaviour = Behaviour(delay_seconds=60.0)
        running = asyncio.create_task(ask(api))
        await until_asked(node, 3)
        waiting = asyncio.create_task(ask(api))
        await comes_to(api, 1)
        await add_node(api, another, "another")
        assert (await waiting).status_code == 200
        assert len(another.requests) == 1
        running.cancel()


async def test_without_a_queue_nothing_waits(database_url: str, settings: Settings, entrance: Entrance) -> None:
    async with open_api(database_url, settings) as opened, FaultNode(Behaviour(delay_seconds=60.0)) as node:
        api = entrance(opened)
        assert api.replica.gateway.queue is None
        await api.add_model("m", "gguf")
        await add_node(api, node)
        running = asyncio.create_task(ask(api))
        await until_asked(node)
        assert (await ask(api)).status_code == 503
        running.cancel()
