"""Heartbeats that are answered without a task: what a node reads is what the ordinary lane would have told it."""

from __future__ import annotations

import asyncio
import json
import re
import signal
from collections.abc import Mapping
from typing import Any

import pytest

from lucid_compute.postgres.database import connect
from tests import postgres
from tests.acceptance.server.test_express_lane import port_of
from tests.gateway import Gateway, open_gateway
from tests.lucid_serve import Served, eventually, folder
from tests.raw_client import Client

pytestmark = pytest.mark.asyncio(loop_scope="session")

WAITS_FOR_A_ROW = """
    SELECT EXISTS (
        SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'lucid heartbeats'
            AND wait_event_type = 'Lock'
    )
"""
ORDINARY = "Connection: close"  # a connection that ends with its answer is uvicorn's
_INSTANTS = rb'"(receivedAt|freshUntil|unhealthyAt|nextHeartbeatInSeconds)":("[^"]+"|[0-9.]+)'
# The length is of the moment because the seconds to the next heartbeat have one to three decimals.
_OF_THE_MOMENT = re.compile(rb"(?im)^(?:date|content-length): .*\r$|^connection: close\r\n|" + _INSTANTS)


def beat_bytes(gateway: Gateway, key: str, body: Mapping[str, Any] | str, *headers: str) -> bytes:
    """Return a heartbeat as it stands on the wire."""
    text = body if isinstance(body, str) else json.dumps(body)
    lines = [
        "POST /compute/heartbeat HTTP/1.1",
        f"Host: 127.0.0.1:{port_of(gateway)}",
        f"Authorization: Bearer {key}",
        f"Content-Length: {len(text.encode())}",
        *headers,
    ]
    return "\r\n".join([*lines, "", text]).encode()


def beat_of(node: str, **changes: Any) -> dict[str, Any]:
    """Return a healthy node's heartbeat."""
    return {"passportId": node, "status": "healthy", "load": 0.5, "availableModels": [], "queueDepth": 0, **changes}


async def ask(gateway: Gateway, data: bytes) -> bytes:
    """Return what a connection of its own brings."""
    client = await Client.open(port_of(gateway))
    client.send(data)
    try:
        return await client.answer()
    finally:
        await client.close()


async def express_count(gateway: Gateway) -> int:
    """Return how many heartbeats the lane has taken."""
    found = re.search(
        r"^lucid_express_heartbeats_total (\S+)$", (await gateway.admin.get("/metrics")).text, re.MULTILINE
    )
    assert found
    return int(float(found[1]))


async def add_node(gateway: Gateway) -> str:
    """Register a node that every replica knows; return its id."""
    return await gateway.add_node("http://127.0.0.1:9000")


async def test_both_lanes_answer_a_heartbeat_alike(gateway: Gateway) -> None:
    """To the last header; only the first is counted as taken."""
    admin = gateway.served.admin_key
    node = await add_node(gateway)
    before = await express_count(gateway)
    express = await ask(gateway, beat_bytes(gateway, admin, beat_of(node)))
    assert await express_count(gateway) == before + 1
    ordinary = await ask(gateway, beat_bytes(gateway, admin, beat_of(node), ORDINARY))
    assert await express_count(gateway) == before + 1
    assert express.startswith(b"HTTP/1.1 200 ")
    assert _OF_THE_MOMENT.sub(b"", express) == _OF_THE_MOMENT.sub(b"", ordinary)


async def test_heartbeats_that_come_at_once_are_answered_in_their_order(gateway: Gateway) -> None:
    """Five of one node on one connection, in one packet: each has its own answer, and another request comes after."""
    admin = gateway.served.admin_key
    node = await add_node(gateway)
    client = await Client.open(port_of(gateway))
    beats = [beat_bytes(gateway, admin, beat_of(node, bootId="b", sequence=number)) for number in range(1, 5)]
    client.send(beats[0])
    client.send(b"".join(beats[1:]) + b"GET /healthz HTTP/1.1\r\nHost: lucid\r\n\r\n")
    for _ in range(4):
        assert b'"status":"healthy"' in await client.answer()
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    await client.close()
    assert (await gateway.health(node))["reported"]["sequence"] == 4


async def test_a_heartbeat_is_committed_though_its_node_hangs_up(gateway: Gateway) -> None:
    """Nobody waits for the answer, and the service goes on."""
    admin = gateway.served.admin_key
    node = await add_node(gateway)
    client = await Client.open(port_of(gateway))
    client.send(beat_bytes(gateway, admin, beat_of(node, bootId="last", sequence=1)))
    await asyncio.sleep(0)
    await client.close()

    async def is_kept() -> bool:
        return bool((await gateway.health(node))["reported"].get("bootId") == "last")

    await eventually(is_kept)
    assert (await ask(gateway, beat_bytes(gateway, admin, beat_of(node)))).startswith(b"HTTP/1.1 200 ")


async def test_a_heartbeat_that_outlasts_the_grace_is_told_to_come_again(
    postgres_and_template: tuple[str, str],
) -> None:
    """Its row is locked for as long as the service waits: it gets a 503, and the exit is clean."""
    url = await postgres.clone(*postgres_and_template)
    holder = await connect(url)
    settings = {"SHUTDOWN_GRACE_SECONDS": "1", "DATABASE_TIMEOUT_SECONDS": "60"}
    with folder() as made, Served(made, url, **settings) as served:
        async with open_gateway(served) as gateway, holder.transaction():
            node = await add_node(gateway)
            before = await express_count(gateway)
            await holder.execute("SELECT FROM heartbeats WHERE passport_id = $1 FOR UPDATE", node)
            client = await Client.open(port_of(gateway))
            client.send(beat_bytes(gateway, gateway.served.admin_key, beat_of(node)))

            async def waits_for_its_row() -> bool:
                waits = "application_name = 'lucid heartbeats' AND wait_event_type = 'Lock'"
                is_there = (
                    f"SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND {waits})"
                )
                return bool(await holder.fetchval(is_there))

            await eventually(waits_for_its_row)
            assert await express_count(gateway) == before + 1
            assert served.process is not None
            served.process.send_signal(signal.SIGTERM)
            head, _, body = (await client.rest()).partition(b"\r\n\r\n")
            lines = head.lower().split(b"\r\n")
            assert lines[0].startswith(b"http/1.1 503 ")
            assert b"connection: close" in lines
            assert any(line.startswith(b"retry-after: ") for line in lines)
            assert json.loads(body)["error"]["code"] == "DATABASE_UNAVAILABLE"
            assert await asyncio.to_thread(served.process.wait, 30) == 0
        assert "Traceback" not in served.log
    await holder.close()
    await postgres.drop(url)
