"""Connections: one that is given up while it is opened is closed, and a replica has no more than it says."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

import asyncpg
import pytest

from lucid_compute.postgres import database
from lucid_compute.postgres.dedicated_connection import DEDICATED_CONNECTIONS, DedicatedConnection, Purpose
from lucid_compute.server.settings import Settings
from tests import ROOT
from tests.api import Api
from tests.ledger import new_job, read
from tests.lucid_serve import eventually
from tests.other_replicas import add_lease

OPEN = "SELECT application_name FROM pg_stat_activity WHERE datname = current_database()"
OPERATIONS = ROOT / "docs" / "operations.md"


async def test_a_connection_that_is_given_up_while_it_is_set_up_is_closed(database_url: str) -> None:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await database.connect(database_url, application="lucid given up", session="SELECT pg_sleep(2)")

    async def is_gone() -> bool:
        return not await read(database_url, "SELECT FROM pg_stat_activity WHERE application_name = 'lucid given up'")

    await eventually(is_gone)


async def test_a_replica_that_does_everything_at_once_opens_the_connections_that_it_counts(
    api: Api, database_url: str
) -> None:
    node = await api.register("limited", {"maxConcurrency": 2})
    await add_lease(api)
    replica = api.replica
    limited = await api.new_key("acme", ["inference:run"], limits={"requestsPerMinute": 5})
    await limited.http.post("/v1/chat/completions", json={"model": "none", "messages": []})
    async with AsyncExitStack() as stack:
        locker = await database.connect(database_url, application="lucid tests")
        stack.push_async_callback(locker.close)
        await stack.enter_async_context(locker.transaction())
        await locker.execute("LOCK TABLE gauge_open")  # the record keeper and the samples wait for it
        assert (await api.beat(node)).status_code == 200
        replica.refusals.count("no_model")
        replica.jobs.finish(new_job())
        replica.fleet.replicas.begin(node)
        busy = [asyncio.create_task(work()) for work in (replica.rollup_keeper.keep, replica.gauges.flush)]
        await replica.refusals.flush()
        for _ in range(Purpose.LONG_TRANSACTIONS.most):
            await stack.enter_async_context(replica.payouts.long_transactions.transaction())
        waiting = asyncio.create_task(replica.payouts.losses.read(*[replica.clock.now().date()] * 2, owner=None))
        await asyncio.sleep(0.5)

        found = Counter(row["application_name"] for row in await read(database_url, OPEN))
        dedicated = {name: count for name, count in found.items() if name not in {"lucid", "lucid tests"}}
        assert dedicated == {purpose.application: purpose.most for purpose in Purpose}
        assert sum(dedicated.values()) == DEDICATED_CONNECTIONS
        assert found["lucid"] <= replica.settings.database_pool_size
    await asyncio.gather(waiting, *busy, return_exceptions=True)


def test_operators_are_told_the_number_that_is_true() -> None:
    assert f"up to {DEDICATED_CONNECTIONS} more" in str(Settings.model_fields["database_pool_size"].description)
    assert f"(5) and up to {DEDICATED_CONNECTIONS} more" in OPERATIONS.read_text()


async def test_a_dedicated_connection_is_cut_when_its_time_ran_out_and_kept_when_postgres_refused(
    database_url: str,
) -> None:
    connection = DedicatedConnection(database_url, Purpose.JOBS, session="SET enable_nestloop = off")

    async def process() -> int:
        async with connection.within(5.0) as opened:
            assert await opened.fetchval("SHOW enable_nestloop") == "off"
            return int(await opened.fetchval("SELECT pg_backend_pid()"))

    first = await process()
    with pytest.raises(asyncpg.DivisionByZeroError):
        async with connection.within(5.0) as opened:
            await opened.execute("SELECT 1 / 0")
    assert await process() == first
    with pytest.raises(TimeoutError):
        async with connection.within(0.05) as opened:
            await opened.execute("SELECT pg_sleep(5)")
    assert await process() != first
    await connection.close()
    assert await process() != first
    connection.terminate()
