"""Refused requests over real sockets are reported as losses, whichever worker refused them, also after its end."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from tests.fault_node import Behaviour, FaultNode
from tests.gateway import CONSUMER, Gateway, open_gateway
from tests.lucid_serve import Served, eventually, serving
from tests.prometheus import value_of

TOLD_SECONDS = 20.0  # what is refused is written every five seconds
SETTINGS = {"WORKERS": "2", "INFERENCE_MAX_CONCURRENCY": "2"}


async def refused(gateway: Gateway, **query: str) -> Counter[tuple[str, str]]:
    """What was refused, by cause and side."""
    report = (await gateway.admin.get("/payouts/losses", params=query)).json()
    return Counter({(each["cause"], each["side"]): each["refused"] for each in report["losses"] if each["refused"]})


async def told(gateway: Gateway, expected: dict[tuple[str, str], int], **query: str) -> None:
    """Return once exactly this is told of as refused."""
    found: Counter[tuple[str, str]] = Counter()

    async def is_told() -> bool:
        found.clear()
        found.update(await refused(gateway, **query))
        return found == expected

    with suppress(AssertionError):
        await eventually(is_told, TOLD_SECONDS)
    assert found == expected


@asynccontextmanager
async def full(gateway: Gateway, node: FaultNode) -> AsyncIterator[None]:
    """Have every worker serve as many as it may, for as long as the block runs."""
    model = await gateway.add_model()
    await gateway.add_node(node.url, model)
    asking: list[asyncio.Task[Any]] = []
    clients = [gateway.served.client(gateway.key, timeout_seconds=60) for _ in range(40)]
    try:
        for client in clients:
            body = {"model": model, "messages": []}
            asking.append(asyncio.create_task(client.post("/v1/chat/completions", json=body)))
            await asyncio.sleep(0.05)
        assert len(node.requests) == 4
        yield
    finally:
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        for client in clients:
            await client.aclose()


async def test_what_each_worker_refused_is_told_once_and_adds_up_with_what_prometheus_counts(
    database_url: str,
) -> None:
    with serving(database_url, **SETTINGS) as served:
        async with open_gateway(served) as gateway:
            model = await gateway.add_model()
            for number in range(12):  # each by a connection of its own, so that both workers get some
                async with served.client(gateway.key if number % 3 else "lk_live_nobody's") as client:
                    body: dict[str, Any] = {"model": model if number % 2 else "unknown", "messages": []}
                    await client.post("/v1/chat/completions", json=body)
            expected = {("unauthorized", "client"): 4, ("no_node", "provider"): 4, ("model_not_found", "client"): 4}
            await told(gateway, expected)
            own = {cause: count for cause, count in expected.items() if cause[0] != "unauthorized"}
            await told(gateway, own, owner=CONSUMER)
            async with FaultNode(Behaviour(delay_seconds=60)) as node, full(gateway, node):
                await told(gateway, {**expected, ("overloaded", "us"): 36})
            text = (await gateway.admin.get("/metrics")).text
            counted = {
                outcome: value_of(text, f'lucid_inference_requests_total{{outcome="{outcome}"}}')
                for outcome in ("unauthorized", "model_unavailable", "model_not_found", "overloaded")
            }
            assert counted == {"unauthorized": 4, "model_unavailable": 4, "model_not_found": 4, "overloaded": 36}


async def test_a_stop_loses_no_refusal_and_a_kill_only_those_of_the_last_seconds(database_url: str) -> None:
    async def refuse(served: Served, count: int) -> None:
        async with served.client("lk_live_nobody's") as client:
            for _ in range(count):
                answer = await client.post("/v1/chat/completions", json={})
                assert answer.status_code == httpx.codes.UNAUTHORIZED

    with serving(database_url) as served:
        await refuse(served, 3)
        await asyncio.to_thread(served.stop)
        served.start()
        await asyncio.to_thread(served.wait_until_ready)
        async with open_gateway(served) as gateway:
            assert await refused(gateway) == {("unauthorized", "client"): 3}
            await refuse(served, 2)
            await told(gateway, {("unauthorized", "client"): 5})
            await refuse(served, 4)
            served.kill()
            served.start()
            await asyncio.to_thread(served.wait_until_ready)
        async with open_gateway(served) as gateway:
            await refuse(served, 1)
            kept = await refused(gateway)
            assert kept["unauthorized", "client"] in {5, 9}
            await told(gateway, {("unauthorized", "client"): kept["unauthorized", "client"] + 1})
