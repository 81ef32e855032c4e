"""Old jobs are deleted in batches; sums, totals of lists and statistics of nodes stay unchanged."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from itertools import product
from uuid import uuid4

import pytest

from lucid_compute.accounting.job_counts import JobFilter
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.postgres.batch_deletion import RETENTION_LOCK
from lucid_compute.postgres.database import Database, connect
from lucid_compute.wire import SortBy, SortOrder
from tests.ledger import ENDED, all_written, ended, ledger_on, new_job, read

NODES = [str(uuid4()) for _ in range(4)]
OWNERS = ["acme", "acme", "other", "other"]


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A migrated database, with time for a busy machine."""
    database = Database(database_url, timeout_seconds=10)
    yield database
    await database.close()


def some_jobs(count: int) -> list[Job]:
    """Jobs of any outcome on the nodes and on an upstream, half of them older than ten days."""
    chance = random.Random(5)
    jobs = []
    for number in range(count):
        node = chance.randrange(5)
        age = timedelta(days=10, seconds=1 + number) if number % 2 else timedelta(days=9, hours=23, seconds=number)
        job = new_job(
            node_id=NODES[node] if node < len(NODES) else None,
            node_owner=OWNERS[node] if node < len(NODES) else None,
            started_at=datetime.now(UTC) - age,
        )
        jobs.append(job if number % 50 < 2 else ended(job, chance.choice(ENDED)))
    return jobs


async def write(url: str, jobs: list[Job]) -> None:
    """Write the jobs, running ones as such; their payouts are closed."""
    async with ledger_on(url) as ledger:
        for job in jobs:
            (ledger.begin if job.outcome is Outcome.RUNNING else ledger.finish)(job)
        await all_written(ledger)
    await read(url, "DELETE FROM payout_open")


async def check_totals(database: Database, jobs: list[Job]) -> None:
    """With any filter the list has exactly these jobs, and their number."""
    search = JobSearch(database)
    for owner, node, outcome in product([None, "acme"], [None, NODES[0], NODES[2]], [None, *Outcome]):
        wanted = JobFilter(owner=owner, node_id=node, outcome=outcome)
        order = {"sort_by": SortBy.CREATED_AT, "sort_order": SortOrder.ASCENDING}
        page, total = await search.list_page(wanted, **order, offset=0, limit=10_000, viewer=None)  # type: ignore[arg-type]
        expected = [
            job.id
            for job in jobs
            if owner in {None, job.node_owner} and node in {None, job.node_id} and outcome in {None, job.outcome}
        ]
        assert sorted(view.id for view in page) == sorted(expected)
        assert total == len(expected)


async def test_what_is_older_goes_and_every_total_stays_right(database_url: str, database: Database) -> None:
    """In batches that do not divide the number; what a node has done in its life is what it was."""
    jobs = some_jobs(600)
    await write(database_url, jobs)
    before = await JobSearch(database).statistics(NODES)
    assert await JobRetention(database, days=0).remove_all() == 0  # all are kept for ever
    retention = JobRetention(database, days=10)
    assert await retention.remove_all(batch=70) == 300
    await check_totals(database, jobs[::2])
    assert await JobSearch(database).statistics(NODES) == before
    assert await retention.remove_all(batch=70) == 0
    await write(database_url, some_jobs(0) + [ended(new_job(node_id=NODES[0])) for _ in range(3)])
    assert (await JobSearch(database).statistics(NODES))[NODES[0]].jobs_completed == before[NODES[0]].jobs_completed + 3  # type: ignore[operator]


async def test_two_replicas_and_a_writer_at_once_count_nothing_twice(database_url: str, database: Database) -> None:
    """One removes at a time, and the ledger goes on meanwhile."""
    jobs = some_jobs(400)
    await write(database_url, jobs)
    later = some_jobs(400)
    removers = [JobRetention(database, days=10).remove_all(batch=20) for _ in range(3)]
    await asyncio.gather(*removers, write(database_url, later))
    await JobRetention(database, days=10).remove_all()
    await check_totals(database, jobs[::2] + later[::2])


async def test_nothing_waits_for_it(database_url: str, database: Database) -> None:
    """A row that another transaction holds is left for the next time, and so is all while another replica is at it."""
    jobs = some_jobs(20)
    await write(database_url, jobs)
    other = await connect(database_url)
    try:
        async with other.transaction():
            await other.execute("SELECT FROM jobs WHERE id = $1 FOR UPDATE", jobs[1].id)
            assert await JobRetention(database, days=10).remove_all() == 9
        async with other.transaction():
            await other.execute(f"SELECT pg_advisory_xact_lock({RETENTION_LOCK})")
            assert await JobRetention(database, days=10).remove_all() == 0
        assert await JobRetention(database, days=10).remove_all() == 1
    finally:
        await other.close()


async def test_a_job_that_ends_after_its_lost_row_was_removed_is_counted_once(
    database_url: str, database: Database
) -> None:
    """Lost jobs are in no sum. The true outcome comes in, and goes again, with its sums."""
    job = new_job(node_id=NODES[0], started_at=datetime.now(UTC) - timedelta(days=30))
    await write(database_url, [job])
    assert await JobRetention(database, days=10).remove_all() == 1
    await check_totals(database, [])
    job.is_written = False
    await write(database_url, [ended(job)])
    await check_totals(database, [job])
    assert await JobRetention(database, days=10).remove_all() == 1
    await check_totals(database, [])
    assert (await JobSearch(database).statistics(NODES))[NODES[0]].jobs_completed == 1
