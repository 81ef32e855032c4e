"""Webhooks of real services that are killed: events are sent anyway, with the same id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from tests.factories import GUIDE_PASSPORT
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import Served, serving
from tests.webhooks import read, types_at

BEAT: dict[str, Any] = {"status": "healthy", "load": None, "availableModels": [], "queueDepth": None}
PATIENCE_SECONDS = 60.0  # a claim runs out after 30


@pytest.fixture
async def receiver() -> AsyncIterator[FaultNode]:
    """A receiver that takes what comes."""
    async with FaultNode() as node:
        yield node


async def fall_silent(served: Served, client: httpx.AsyncClient, name: str) -> str:
    """Register a node that was heard and falls silent for good; return its id."""
    node_id = str((await client.post("/passports", json={**GUIDE_PASSPORT, "name": name})).json()["id"])
    assert (await client.post("/compute/heartbeat", json={**BEAT, "passportId": node_id})).status_code == 200
    await served.fall_silent(node_id, 130)
    return node_id


async def test_a_delivery_outlives_the_replica_that_had_it_in_hand(database_url: str, receiver: FaultNode) -> None:
    """Killed while the receiver keeps it waiting, the other replica sends it once more, and no third time."""
    receiver.behaviour = Behaviour(delay_seconds=600)
    with serving(database_url) as survivor:
        with serving(database_url) as killed:
            async with killed.client() as client:
                webhook = (await client.post("/webhooks", json={"url": receiver.url})).json()
                node_id = await fall_silent(killed, client, "dies")
            await receiver.until(lambda receiver: len(receiver.requests) == 1, PATIENCE_SECONDS)
            killed.kill()
        receiver.behaviour = Behaviour()
        await receiver.until(lambda receiver: len(receiver.requests) >= 2, PATIENCE_SECONDS)
        events = [read(request, webhook["secret"]) for request in receiver.requests]
        assert {(event["type"], event["passportId"]) for event in events} == {("node.unhealthy", node_id)}
        assert len({event["id"] for event in events}) == 1
        async with survivor.client() as client:
            (delivery,) = (await client.get(f"/webhooks/{webhook['id']}/deliveries")).json()["deliveries"]
        assert delivery["id"] == events[0]["id"]


async def test_events_from_before_a_restart_are_sent_after_it(database_url: str, receiver: FaultNode) -> None:
    """The receiver is away and the service is killed; when both are back the event comes."""
    await receiver.stop()
    with serving(database_url) as served:
        async with served.client() as client:
            webhook = (await client.post("/webhooks", json={"url": receiver.url})).json()
            node_id = await fall_silent(served, client, "dies")

            async def has_failed() -> bool:
                found = (await client.get(f"/webhooks/{webhook['id']}/deliveries")).json()["deliveries"]
                return any(delivery["lastAttempts"] for delivery in found)

            async with asyncio.timeout(PATIENCE_SECONDS):
                while not await has_failed():  # noqa: ASYNC110 - the service says it when it is asked
                    await asyncio.sleep(0.1)
        served.kill()
        await receiver.start()
        served.start()
        served.wait_until_ready()
        await receiver.until(lambda receiver: bool(receiver.requests), PATIENCE_SECONDS)
        assert types_at(receiver) == ["node.unhealthy"]
        assert read(receiver.requests[0], webhook["secret"])["passportId"] == node_id
