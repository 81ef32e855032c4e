"""Failover: a standby is promoted below a service that keeps running, with all that was committed or not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, eventually, folder
from tests.standby import Pair

LEASE = "SELECT max(seen_at) FROM replicas"
OUTAGES_OVER = "SELECT count(*) FROM outages WHERE started_at < '{0}' AND ended_at > '{0}'"


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A primary with a standby."""
    with folder() as made, Pair(made) as started:
        yield started


@pytest.fixture
def served(pair: Pair) -> Iterator[Served]:
    """A service whose URL names both."""
    with folder() as made, Served(made, pair.url, HEARTBEAT_MAX_PER_SECOND="0") as started:
        yield started


class Node:
    """A registered node that counts what was acknowledged."""

    def __init__(self, client: httpx.AsyncClient, passport_id: str) -> None:
        self.client = client
        self.id = passport_id
        self.sequence = self.acknowledged = 0

    async def beat(self, **changes: Any) -> int:
        """Send a heartbeat; return the status."""
        self.sequence += 1
        body = {"passportId": self.id, "status": "healthy", "load": 0.1, "availableModels": [], "queueDepth": 0}
        body |= {"bootId": "b", "sequence": self.sequence, **changes}
        answer = await self.client.post("/compute/heartbeat", json=body)
        if answer.status_code == 200:
            self.acknowledged = self.sequence
        return answer.status_code

    async def declare(self, model: str) -> None:
        """Declare one model."""
        body = {"models": [{"id": model, "maxTokens": None, "quantization": None}]}
        answer = await self.client.put(f"/compute/models/{self.id}", json=body)
        assert answer.status_code == 200, answer.text

    async def drain(self) -> None:
        """Drain the node."""
        assert (await self.client.post(f"/compute/drain/{self.id}")).status_code == 202

    async def health(self) -> dict[str, Any]:
        """The node's health."""
        health: dict[str, Any] = (await self.client.get(f"/compute/health/{self.id}")).json()
        return health

    async def declared(self) -> list[str]:
        """The models that it declares, as the service says."""
        answer = await self.client.get(f"/compute/models/{self.id}")
        return [model["id"] for model in answer.json()["models"]]


async def register(client: httpx.AsyncClient) -> Node:
    """Register the guide's node, with a model and a heartbeat."""
    answer = await client.post("/passports", json=GUIDE_PASSPORT)
    node = Node(client, answer.json()["id"])
    await node.declare("m-kept")
    assert await node.beat() == 200
    return node


async def fail_over(pair: Pair, node: Node) -> None:
    """Kill the primary, promote the standby, and return when a heartbeat is acknowledged: 503 is all it gets before."""
    pair.kill_primary()
    refused = await node.beat()
    assert refused == 503
    await pair.promote()

    async def is_taken() -> bool:
        status = await node.beat(load=0.9)
        assert status in {200, 503}
        return status == 200

    await eventually(is_taken, 30)


async def is_ready(client: httpx.AsyncClient) -> bool:
    """Whether the service says that it is ready."""
    return (await client.get("/readyz")).status_code == 200


async def test_a_synchronous_standby_has_everything_that_was_acknowledged(pair: Pair, served: Served) -> None:
    async with served.client() as client:
        node = await register(client)
        await pair.wait_for_standby()
        for _ in range(20):
            assert await node.beat() == 200
        await node.declare("m-acknowledged")
        await node.drain()
        acknowledged, lease = node.acknowledged, await pair.on_primary(LEASE)
        await fail_over(pair, node)
        sequence = await pair.on_standby("SELECT sequence FROM heartbeats")
        assert sequence >= acknowledged
        assert await node.declared() == ["m-acknowledged"]
        health = await node.health()
        assert (health["status"], health["load"], health["fresh"]) == ("draining", 0.9, True)
        await eventually(lambda: is_ready(client), 30)
        assert await pair.on_standby(OUTAGES_OVER.format(lease)) == 0


async def test_what_an_asynchronous_standby_lacks_is_gone_and_all_else_goes_on(pair: Pair, served: Served) -> None:
    """Heartbeats count at once, and no declaration, drain, edit or key of before stays in the running service."""
    async with served.client() as client:
        node = await register(client)
        await pair.catch_up()
        await pair.cut()
        cut_at = await pair.on_primary("SELECT clock_timestamp()")
        for _ in range(20):
            assert await node.beat() == 200
        await node.declare("m-lost")
        await node.drain()
        assert (await client.patch(f"/passports/{node.id}", json={"description": "lost"})).status_code == 200
        made = await client.post("/keys", json={"name": "lost", "owner": "lost", "scopes": ["admin"]})
        async with served.client(made.json()["key"]) as lost:
            assert (await lost.get("/keys")).status_code == 200
            lease = cut_at

            async def has_renewed() -> bool:
                nonlocal lease
                lease = await pair.on_primary(LEASE)
                return bool(lease > cut_at)

            await eventually(has_renewed, 30)
            await fail_over(pair, node)

            async def is_read_again() -> bool:
                return await node.declared() == ["m-kept"]

            await eventually(is_read_again, 30)
            assert await node.beat(load=0.8) == 200
            health = await node.health()
            assert (health["status"], health["load"], health["fresh"]) == ("healthy", 0.8, True)
            assert (await client.get(f"/passports/{node.id}")).json()["description"] is None
            assert (await lost.get("/keys")).status_code == 401
        edited = await client.patch(f"/passports/{node.id}", json={"description": "new"})
        assert edited.status_code == 200
        assert (await client.get(f"/passports/{node.id}")).json()["description"] == "new"
        await node.drain()
        assert (await node.health())["status"] == "draining"
        await eventually(lambda: is_ready(client), 30)
        assert await pair.on_standby(OUTAGES_OVER.format(lease)) == 0
        assert await pair.on_standby("SELECT count(*) FROM node_events WHERE type = 'unhealthy'") == 0
