"""The claim behind the group commit: for 64 senders it commits many times the heartbeats of one UPDATE each.

The same heartbeats, each answered after its commit, on the same embedded Postgres (fsync on), in alternating rounds:
an UPDATE and a commit of its own for each, over one connection and over 16; and the service's `HeartbeatWriter`, which
has one connection.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any
from uuid import uuid4

import asyncpg
import uvloop

from benchmarks.fleet_rows import NodeRow, plain_nodes, write_fleet
from benchmarks.servers import data_folder, postgres_of
from lucid_compute.accounting.gauges import GaugeRecorder
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import connect
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.fleet.change_feed import OwnHeartbeats
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.heartbeat_writer import HeartbeatWriter

SENDERS = 64
CONNECTIONS = 16
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
ROUND_SECONDS = float(os.environ.get("BENCH_SECONDS", "3"))
_UPDATE_ONE = """
    UPDATE heartbeats SET received_at = statement_timestamp(), status = $2, report = $3::text::jsonb,
        revision = revision + 1
    WHERE passport_id = $1 RETURNING received_at, revision
"""
Write = Callable[[Heartbeat], Awaitable[Any]]


def main() -> None:
    """Measure, and print the ratios."""
    nodes = plain_nodes(1000)
    with data_folder() as folder, postgres_of(folder) as url:
        uvloop.run(_compare(url, nodes))


async def _compare(url: str, nodes: list[NodeRow]) -> None:
    await write_fleet(url, nodes, [])
    rates: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        ways: dict[str, Write] = {
            "one UPDATE each, 1 connection": await stack.enter_async_context(_single(url, 1)),
            f"one UPDATE each, {CONNECTIONS} connections": await stack.enter_async_context(_single(url, CONNECTIONS)),
            "group commit, 1 connection": await stack.enter_async_context(_grouped(url)),
        }
        for _ in range(ROUNDS):
            for name, write in ways.items():
                rates.setdefault(name, []).append(await _rate(write, nodes))
    grouped = rates["group commit, 1 connection"]
    print(f"{SENDERS} senders, 1,000 nodes, each heartbeat answered after its commit; how many times that the last is")
    for name, found in rates.items():
        ratio = median(g / f for g, f in zip(grouped, found, strict=True))
        print(f"{name:<36}{median(found):>10,.0f} heartbeats/s" + (f"{ratio:>8.1f} times" if ratio != 1 else ""))


@asynccontextmanager
async def _single(url: str, connections: int) -> Any:
    idle: asyncio.Queue[asyncpg.Connection[asyncpg.Record]] = asyncio.Queue()
    opened = [await connect(url) for _ in range(connections)]
    for connection in opened:
        idle.put_nowait(connection)

    async def write(heartbeat: Heartbeat) -> None:
        connection = await idle.get()
        report = heartbeat.model_dump_json(exclude_none=True)
        await connection.fetchrow(_UPDATE_ONE, heartbeat.passport_id, heartbeat.status.value, report)
        idle.put_nowait(connection)

    yield write
    for connection in opened:
        await connection.close()


@asynccontextmanager
async def _grouped(url: str) -> Any:
    fleet = Fleet()
    gauges = GaugeRecorder(url, fleet, replica_id=str(uuid4()))
    writer = HeartbeatWriter(url, fleet, DatabaseClock(), own=OwnHeartbeats(), on_commit=gauges.record)
    task = asyncio.create_task(writer.run())
    yield writer.write
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def _rate(write: Write, nodes: list[NodeRow]) -> float:
    """Return the senders' committed heartbeats a second."""
    answered, ends_at = 0, time.perf_counter() + ROUND_SECONDS

    async def send(first: int) -> None:
        nonlocal answered
        position = first
        while time.perf_counter() < ends_at:
            position = (position + SENDERS) % len(nodes)
            body = {"passportId": nodes[position].id, "status": "healthy", "load": 0.42, "queueDepth": 3}
            await write(Heartbeat.model_validate({**body, "availableModels": ["llama-3-70b", "mistral-7b"]}))
            answered += 1

    await asyncio.gather(*(send(first) for first in range(SENDERS)))
    return answered / ROUND_SECONDS


if __name__ == "__main__":
    main()
