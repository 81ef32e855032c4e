"""Samples of heartbeats: flushed as sums, exactly once even if a reply is lost, and added up as other rollups are."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.accounting.gauges import NODES_A_FLUSH, GaugeRecorder
from lucid_compute.accounting.rollup_columns import ALL_NODES, GAUGES, owner_scope
from lucid_compute.accounting.rollups import Retention, RollupKeeper
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.fleet.fleet import Fleet
from tests import factories
from tests.ledger import LosesReplies, read

GPUS = [
    {"index": 0, "utilization": 0.5, "memoryUsedMb": 1000, "memoryTotalMb": 4000},
    {"index": 1, "utilization": 1.0, "memoryUsedMb": 3000, "memoryTotalMb": 4000},
    {"index": 2},
]
KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'lucid samples'
"""


Recorder = Callable[..., GaugeRecorder]


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    """Makes replicas' recorders, whose tasks do not run."""
    made: list[GaugeRecorder] = []

    def make(url: str, connection: DedicatedConnection | None = None) -> GaugeRecorder:
        made.append(GaugeRecorder(url, Fleet(), replica_id=str(uuid4()), connection=connection))
        return made[-1]

    yield make
    for one in made:
        one._flushes.close()


async def add_nodes(url: str, *owners: str) -> list[str]:
    """Write a passport for each owner; return their ids."""
    statement = "INSERT INTO passports (id, type, owner, name) VALUES ($1, 'compute', $2, $3) RETURNING id::text"
    return [(await read(url, statement, str(uuid4()), owner, str(uuid4())))[0][0] for owner in owners]


async def samples_of(url: str, table: str = "open", of: str = "node_id") -> dict[str, Any]:
    """The rows of a table by whose they are."""
    return {str(row[of]): dict(row) for row in await read(url, f"SELECT * FROM gauge_{table} ORDER BY bucket")}


async def test_absurd_numbers_of_one_node_cost_no_other_node_its_samples(database_url: str, recorder: Recorder) -> None:
    """A number that no `real` can store is stored as the nearest one."""
    absurd, sound = await add_nodes(database_url, "acme", "acme")
    taken = recorder(database_url)
    at = datetime.now(UTC)
    for memory in (1e15, 1e-308, 5e-324, 0.0):
        gpus = [{"index": 0, "utilization": 5e-324, "memoryUsedMb": memory, "memoryTotalMb": 1e15}] * 64
        taken.record(factories.heartbeat(absurd, load=2.2250738585072014e-308, gpus=gpus), at)
    taken.record(factories.heartbeat(sound, load=0.5), at)
    await taken.flush()
    rows = await samples_of(database_url)
    assert (rows[sound]["load_sum"], rows[absurd]["samples"]) == (0.5, 4)
    assert (rows[absurd]["load_sum"], rows[absurd]["load_count"]) == (0.0, 4)


async def test_a_minutes_heartbeats_become_sums_and_what_is_unknown_stays_so(
    database_url: str, recorder: Recorder
) -> None:
    node, silent = await add_nodes(database_url, "acme", "acme")
    gauges = recorder(database_url)
    at = datetime.now(UTC)
    for load, queue in ((0.25, 3), (0.75, None), (None, 5)):
        gauges.record(factories.heartbeat(node, load=load, queueDepth=queue, gpus=GPUS), at)
    gauges.record(factories.heartbeat(silent, load=None, queueDepth=None), at)
    await gauges.flush()
    rows = await samples_of(database_url)
    row = rows[node]
    assert (row["samples"], row["node_owner"]) == (3, "acme")
    assert row["bucket"] == at.replace(second=0, microsecond=0)
    assert [row[f"load_{part}"] for part in ("sum", "max", "count")] == [1.0, 0.75, 2]
    assert [row[f"queue_depth_{part}"] for part in ("sum", "max", "count")] == [8, 5, 2]
    assert [row[f"gpu_utilization_{part}"] for part in ("sum", "max", "count")] == [2.25, 0.75, 3]
    assert [row[f"gpu_memory_used_mb_{part}"] for part in ("sum", "max", "count")] == [12000, 4000, 3]
    assert row["reported_in_flight_count"] is None
    assert rows[silent]["samples"] == 1
    assert [rows[silent][f"{name}_sum"] for name in GAUGES if name != "in_flight"] == [None] * 6


async def test_a_flush_whose_reply_was_lost_is_not_added_again(database_url: str, recorder: Recorder) -> None:
    """It was committed, and meanwhile the minute was moved, too."""
    (node,) = await add_nodes(database_url, "acme")
    connection = LosesReplies(database_url, Purpose.SAMPLES, losses=2)
    gauges = recorder(database_url, connection)
    keeper = RollupKeeper(database_url, Retention(48, 90, 1000))
    for _ in range(3):
        gauges.record(factories.heartbeat(node, load=0.5), datetime.now(UTC) - timedelta(minutes=5))
        await gauges.flush()
        await keeper.keep(cleans=False)
    await gauges.flush()
    assert connection.losses == 0
    rows = await samples_of(database_url, "minutes", "scope_id")
    assert rows[node]["samples"] == rows[ALL_NODES]["samples"] == 3


async def test_no_sample_counts_twice_or_is_lost_while_connections_are_killed(
    database_url: str, recorder: Recorder
) -> None:
    """Two replicas take a node's heartbeats in turn; the nodes', the owners' and all sums agree."""
    chance = random.Random(3)
    nodes = await add_nodes(database_url, "acme", "acme", "globex")
    replicas = [recorder(database_url) for _ in range(2)]
    keeper = RollupKeeper(database_url, Retention(48, 90, 1000))
    now = datetime.now(UTC)
    noted = 0
    for turn in range(60):
        for _ in range(20):
            ago = timedelta(hours=chance.choice([0, 0, 1, 30]), minutes=chance.uniform(2, 5))
            chance.choice(replicas).record(factories.heartbeat(chance.choice(nodes), load=0.5), now - ago)
            noted += 1
        flushing = [asyncio.create_task(replica.flush()) for replica in replicas]
        await asyncio.sleep(chance.uniform(0, 0.01))
        if turn % 2:
            await read(database_url, KILL)
        await asyncio.gather(*flushing)
        if turn % 10 == 0:
            await keeper.keep(cleans=False)
    for replica in replicas:
        while replica._flushes:
            await replica.flush()
    await keeper.keep(cleans=False, now=now + timedelta(days=2))
    assert not await read(database_url, "SELECT FROM gauge_open")
    owner = (await read(database_url, f"SELECT {owner_scope('$1::text')}", "acme"))[0][0]
    for tier in ("minutes", "hours", "days"):
        rows = await read(
            database_url, f"SELECT scope_id::text, sum(samples), sum(load_sum) FROM gauge_{tier} GROUP BY 1"
        )
        samples = {scope: (count, load) for scope, count, load in rows}
        assert sum(samples[node][0] for node in nodes) == samples[ALL_NODES][0] == noted, tier
        assert samples[nodes[0]][0] + samples[nodes[1]][0] == samples[str(owner)][0]
        assert samples[ALL_NODES][1] == pytest.approx(noted / 2)


async def test_a_large_fleet_is_flushed_in_parts(database_url: str, recorder: Recorder) -> None:
    nodes = await add_nodes(database_url, *["acme"] * 3)
    gauges = recorder(database_url)
    for number in range(NODES_A_FLUSH):
        at = datetime.now(UTC) - timedelta(minutes=number)
        for node in nodes:
            gauges.record(factories.heartbeat(node), at)
    async with asyncio.timeout(60):
        while not gauges._flushes.number or gauges._flushes:  # a busy machine may take longer than a flush may
            await gauges.flush()
    assert gauges._flushes.number == 3
    assert (await read(database_url, "SELECT count(*) FROM gauge_open"))[0][0] == 3 * NODES_A_FLUSH


async def test_samples_wait_for_a_database_that_is_away_and_are_flushed_at_the_end(
    database_url: str, recorder: Recorder
) -> None:
    (node,) = await add_nodes(database_url, "acme")
    away = recorder("postgresql://nobody@127.0.0.1:1/none")
    away.record(factories.heartbeat(node), datetime.now(UTC))
    await away.flush()
    assert len(away._flushes) == 1
    there = recorder(database_url)
    task = asyncio.create_task(there.run())
    await asyncio.sleep(0)
    there.record(factories.heartbeat(node), datetime.now(UTC))
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await samples_of(database_url))[node]["samples"] == 1


async def test_samples_of_a_node_that_was_never_registered_are_left_out(database_url: str, recorder: Recorder) -> None:
    gauges = recorder(database_url)
    gauges.record(factories.heartbeat(str(uuid4())), datetime.now(UTC))
    await gauges.flush()
    assert not gauges._flushes
    assert not await samples_of(database_url)
