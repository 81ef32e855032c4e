"""The job ledger: each job becomes a row and a part of the sums, exactly once, whatever fails in between."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from itertools import pairwise, zip_longest
from uuid import uuid4

import asyncpg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.ledger import GROUP_SECONDS, MAX_BATCH, MAX_WAITING, JobLedger, RowWriter
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import connect
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from tests.ledger import LosesReplies, all_written, ended, expect, expect_sums, ledger_on, new_job, random_job, read

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'lucid jobs'
"""


async def kill_connections(url: str, seconds: float, chance: random.Random) -> None:
    """Kill the ledgers' connections again and again, wherever in a statement they are."""
    connection = await connect(url, application="lucid tests")
    ends_at = asyncio.get_running_loop().time() + seconds
    try:
        while asyncio.get_running_loop().time() < ends_at:
            await connection.execute(KILL)
            await asyncio.sleep(chance.uniform(0.0, 0.08))
    finally:
        await connection.close()


async def write(ledger: JobLedger, jobs: list[Job], chance: random.Random) -> None:
    """Have the jobs begin (some of them) and finish, in bursts of any size."""
    running: list[Job] = []
    for job in jobs:
        if chance.random() < 0.3:
            outcome, job.outcome = job.outcome, Outcome.RUNNING
            ledger.begin(job)
            job.outcome = outcome
            running.append(job)
        else:
            ledger.finish(job)
        if chance.random() < 0.05:
            await asyncio.sleep(chance.choice([0.0, 0.001, 0.03]))
        if running and chance.random() < 0.3:
            ledger.finish(running.pop(chance.randrange(len(running))))
    for job in running:
        ledger.finish(job)


async def test_a_job_becomes_a_row_to_the_letter(database_url: str) -> None:
    job = ended(new_job())
    async with ledger_on(database_url, replica_id=(replica := str(uuid4()))) as ledger:
        ledger.finish(job)
        await all_written(ledger)
        await expect(database_url, [job])
    ((found,),) = await read(database_url, "SELECT replica_id::text FROM jobs")
    assert found == replica


@pytest.mark.parametrize("seed", range(3))
async def test_rows_and_sums_agree_after_any_batches(database_url: str, seed: int) -> None:
    chance = random.Random(seed)
    nodes = [None, *(str(uuid4()) for _ in range(7))]
    jobs = [random_job(chance, nodes) for _ in range(3 * MAX_BATCH)]
    async with ledger_on(database_url) as ledger:
        await write(ledger, jobs, chance)
        await all_written(ledger)
        await expect(database_url, jobs)


async def test_nothing_is_lost_or_counted_twice_when_connections_are_killed(database_url: str) -> None:
    """Two replicas write to the same nodes' sums while both are killed at any instant."""
    chance = random.Random(7)
    nodes = [None, *(str(uuid4()) for _ in range(5))]
    jobs = [[random_job(chance, nodes) for _ in range(4000)] for _ in range(2)]
    async with ledger_on(database_url) as one, ledger_on(database_url) as other:
        killing = asyncio.create_task(kill_connections(database_url, 4.0, chance))
        await asyncio.gather(write(one, jobs[0], chance), write(other, jobs[1], chance))
        while not killing.done():
            jobs[0].append(random_job(chance, nodes))
            one.finish(jobs[0][-1])
            await asyncio.sleep(0.002)
        await all_written(one, other)
        await expect(database_url, [*jobs[0], *jobs[1]])


class Timed(DedicatedConnection):
    """A connection that records when it is used."""

    def __init__(self, url: str) -> None:
        super().__init__(url, Purpose.JOBS)
        self.used_at: list[float] = []

    @asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Record the time and yield the connection."""
        self.used_at.append(asyncio.get_running_loop().time())
        async with super().within(seconds) as connection:
            yield connection


async def test_jobs_are_written_in_batches(database_url: str) -> None:
    """At most one batch in 10 ms unless more than a batch waits, and none longer than its bound."""
    connection = Timed(database_url)
    async with ledger_on(database_url, connection=connection) as ledger:
        for _ in range(300):
            ledger.finish(ended(new_job()))
            await asyncio.sleep(0.001)
        await all_written(ledger)
        pauses = [after - before for before, after in pairwise(connection.used_at)]
        assert min(pauses) > GROUP_SECONDS * 0.95
        for _ in range(3 * MAX_BATCH):
            ledger.finish(ended(new_job()))
        await all_written(ledger)
    rows = await read(database_url, "SELECT count(*) FROM jobs GROUP BY xmin")  # by the transaction that wrote them
    lengths = [row[0] for row in rows]
    assert sum(lengths) == 300 + 3 * MAX_BATCH
    assert max(lengths) == MAX_BATCH


async def test_a_batch_whose_reply_was_lost_is_not_counted_again(database_url: str) -> None:
    """It was committed, and is written again unchanged."""
    connection = LosesReplies(database_url, Purpose.JOBS, losses=3)
    chance = random.Random(1)
    nodes = [str(uuid4()) for _ in range(3)]
    jobs = [random_job(chance, list(nodes)) for _ in range(40)]
    async with ledger_on(database_url, connection=connection) as ledger:
        await write(ledger, jobs, chance)
        await all_written(ledger)
        await expect(database_url, jobs)
    assert connection.losses == 0


async def test_a_statement_that_takes_too_long_is_tried_again_and_counts_once(database_url: str) -> None:
    """It runs on in Postgres, behind a lock, after the ledger has given it up."""
    job = ended(new_job())
    async with ledger_on(database_url, timeout_seconds=0.5) as ledger:
        locker = await connect(database_url)
        transaction = locker.transaction()
        await transaction.start()
        await locker.execute("LOCK job_totals IN EXCLUSIVE MODE")
        ledger.finish(job)
        await asyncio.sleep(1.8)
        assert ledger.waiting == 1
        await transaction.rollback()
        await locker.close()
        await all_written(ledger)
        await expect(database_url, [job])


async def test_a_row_that_cannot_be_keeps_no_other_from_being_written(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged by its id, and left out."""
    jobs = [ended(new_job()) for _ in range(MAX_BATCH)]
    poison = [ended(new_job(id="no-uuid")), ended(new_job(attempt=70_000)), ended(new_job(), latency_ms=float("nan"))]
    async with ledger_on(database_url) as ledger:
        for job, refused in zip_longest(jobs, poison):
            if refused is not None:
                ledger.finish(refused)
            ledger.finish(job)
        await all_written(ledger)
        await expect(database_url, jobs)
    for job in poison:
        assert any(job.id in record.getMessage() for record in caplog.records if record.levelno == logging.ERROR)


async def test_the_same_job_written_twice_counts_once(database_url: str) -> None:
    """In one batch, where Postgres refuses the second row, and in two."""
    job = ended(new_job())
    async with ledger_on(database_url) as ledger:
        ledger.finish(job)
        ledger.finish(job)
        await all_written(ledger)
        ledger.finish(job)
        await all_written(ledger)
        await expect(database_url, [job])


async def test_a_job_that_runs_is_a_row_and_counts_when_it_has_finished(database_url: str) -> None:
    job = new_job()
    async with ledger_on(database_url) as ledger:
        ledger.begin(job)
        assert job.is_written
        await all_written(ledger)
        await expect(database_url, [job])
        assert await read(database_url, "SELECT FROM job_totals UNION ALL SELECT FROM job_open") == []
        ledger.finish(ended(job, Outcome.FAILED, reason="timeout"))
        await all_written(ledger)
        await expect(database_url, [job])
        assert len(await read(database_url, "SELECT FROM job_totals")) == 1


async def test_a_job_that_ends_before_its_beginning_was_written_is_one_row(database_url: str) -> None:
    job = new_job()
    async with ledger_on(database_url) as ledger:
        ledger.begin(job)
        ledger.begin(job)
        ledger.finish(ended(job))
        assert ledger.waiting == 1
        ledger.begin(ended(job))
        ledger.begin(late := ended(new_job()))  # too late: it has ended
        assert (ledger.waiting, late.is_written) == (1, False)
        await all_written(ledger)
        await expect(database_url, [job])


async def test_what_waits_is_written_when_the_task_is_cancelled(database_url: str) -> None:
    """In the middle of a statement too; nothing waits and nothing is missing afterwards."""
    chance = random.Random(3)
    nodes = [str(uuid4()) for _ in range(3)]
    written: list[Job] = []
    for pause in (0.0, 0.001, 0.004, 0.01, 0.03):
        async with ledger_on(database_url) as ledger:
            await asyncio.sleep(0.01)
            jobs = [random_job(chance, list(nodes)) for _ in range(2 * MAX_BATCH + 7)]
            await write(ledger, jobs, chance)
            written += jobs
            await asyncio.sleep(pause)
        assert ledger.waiting == 0
    await expect(database_url, written)


async def test_the_end_comes_in_time_when_the_database_is_away(caplog: pytest.LogCaptureFixture) -> None:
    """And the log says how many jobs are lost."""
    began = asyncio.get_running_loop().time()
    async with ledger_on("postgresql://nobody@127.0.0.1:1/none", flush_seconds=0.3) as ledger:
        ledger.finish(ended(new_job()))
        await asyncio.sleep(0.01)
    assert asyncio.get_running_loop().time() - began < 5
    assert "1 jobs could not be written before the end" in caplog.text


async def test_jobs_wait_for_a_database_that_is_away_and_are_refused_room_when_too_many_do(database_url: str) -> None:
    ledger = JobLedger("postgresql://nobody@127.0.0.1:1/none", replica_id=str(uuid4()))
    job = ended(new_job())
    for _ in range(MAX_WAITING - 1):
        ledger.finish(job)
    assert ledger.has_room()
    ledger.finish(job)
    assert not ledger.has_room()


async def test_a_table_that_is_missing_costs_no_job(database_url: str) -> None:
    """The fault is not the row's: it waits until someone has put it right."""
    job = ended(new_job())
    await read(database_url, "ALTER TABLE job_totals RENAME TO elsewhere")
    async with ledger_on(database_url) as ledger:
        ledger.finish(job)
        await asyncio.sleep(0.3)
        assert ledger.waiting == 1
        await read(database_url, "ALTER TABLE elsewhere RENAME TO job_totals")
        await all_written(ledger)
        await expect(database_url, [job])


@given(st.datetimes(datetime(2020, 1, 1), datetime(2106, 1, 1), timezones=st.just(UTC)))  # noqa: DTZ001 - hypothesis
def test_instants_are_written_to_the_microsecond(instant: datetime) -> None:
    row = RowWriter(str(uuid4())).write(new_job(started_at=instant))
    assert datetime.fromtimestamp(0, UTC) + timedelta(microseconds=int(row.split(",")[11])) == instant


@pytest.mark.parametrize("text", ["half a pair \ud800", "nul \0", '"', "\\", '\\"', "a,b)", '("{'])
async def test_no_text_costs_a_job_its_row(database_url: str, text: str) -> None:
    """What Postgres can't keep is replaced."""
    async with ledger_on(database_url) as ledger:
        ledger.finish(ended(new_job(), reason=text))
        await all_written(ledger)
    ((kept,),) = await read(database_url, "SELECT reason FROM jobs")
    assert kept == text.replace("\0", "\N{REPLACEMENT CHARACTER}").replace("\ud800", "?")


async def test_migrations_go_down_and_up_on_a_filled_ledger(database_url: str) -> None:
    chance = random.Random(0)
    for _ in range(2):
        async with ledger_on(database_url) as ledger:
            await write(ledger, [random_job(chance, [None, str(uuid4())]) for _ in range(50)], chance)
        assert await read(database_url, "SELECT FROM jobs")
        await schema.downgrade(database_url, "registry")
        assert await read(database_url, "SELECT FROM pg_class WHERE relname LIKE 'job%'") == []
        await schema.upgrade(database_url)
        await schema.check(database_url)
        await expect_sums(database_url)
