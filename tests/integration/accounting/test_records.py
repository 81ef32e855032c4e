"""Rollups: every job counts once at any time, however far rollups are moved, and all add up to the ledger."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting.job_counts import JobFilter, count_jobs
from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.measured import JobRollup
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.accounting.rollup_columns import NARROW, WIDE, Width
from lucid_compute.accounting.rollup_reader import RollupQuery, RollupReader
from lucid_compute.accounting.rollups import (
    CLEAN_MINUTES,
    DAYS,
    FIRST_PLACE,
    HOURS,
    KINDS,
    Retention,
    RollupKeeper,
)
from lucid_compute.accounting.timeline import EPOCH, STEPS, Timeline
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import Database, connect
from tests.ledger import ENDED_ROWS, all_written, ended, ledger_on, new_job, random_job, read, sums_of
from tests.record_checks import expect_tiers

# What becomes of a statement whose connection is ended, by how far it was.
CUT = (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError)
KEEP_ALL = Retention(24 * 30, 90, 1000)
NODES = [str(uuid4()) for _ in range(4)]
OWNERS = dict(zip(NODES, ["acme", "acme", "globex", "ünï"], strict=True))
MODELS = [str(uuid4()) for _ in range(2)]
KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = ANY($1)
"""


def job_ago(chance: random.Random, ago: timedelta) -> Job:
    """A job of any kind that ended, on one of `NODES` or on an upstream, started so long ago at most."""
    job = random_job(chance, [None, *NODES])
    job.node_owner = OWNERS.get(job.node_id or "")
    job.model_id = chance.choice(MODELS)
    job.started_at = datetime.now(UTC) - ago * chance.random()
    return job


async def keep(url: str, *, until: timedelta = timedelta(0), rows_a_move: int = 37) -> None:
    """Move the rollups on, as at `until` from now; so few rows at a time that a minute or an hour takes several."""
    keeper = RollupKeeper(url, KEEP_ALL, rows_a_move=rows_a_move, rows_a_part=11)
    await keeper.keep(cleans=False, now=datetime.now(UTC) + until)


async def begin_a_part(url: str) -> None:
    """Add up the first minutes of the next hour, and the first hours of the next day, and leave off, as when killed."""
    connection = await connect(url, application="lucid tests")
    try:
        for tier, length in ((HOURS, timedelta(hours=1)), (DAYS, timedelta(days=1))):
            found = await connection.fetchrow(tier.find, await connection.fetchval(_PARTS_END[tier]))
            if found is not None and found["start"] is not None and found["part"] is None:
                start = found["start"]
                end = await connection.fetchval(tier.find_end, start, start + length, 1)
                if end < start + length:
                    async with connection.transaction():
                        for kind in KINDS:
                            add_up = kind.add_up_hour if tier is HOURS else kind.add_up_day
                            await connection.execute(add_up, start, start, end)
                        await connection.execute(tier.part_is_done, end)
    finally:
        await connection.close()


# Hours of the future are whole as far as there are minutes; a day is added up from whole hours alone.
_PARTS_END = {HOURS: "SELECT now() + interval '1 day'", DAYS: "SELECT date_trunc('day', hours_until) FROM record_marks"}


@pytest.mark.parametrize("seed", range(3))
async def test_every_record_is_the_sum_of_its_jobs_whenever_they_come(database_url: str, seed: int) -> None:
    """Jobs of the last days come in any order, before and after their hour and their day were added up."""
    chance = random.Random(seed)
    async with ledger_on(database_url) as ledger:
        for _ in range(4):
            for _ in range(150):
                ledger.finish(job_ago(chance, timedelta(days=chance.choice([0, 0.01, 0.2, 3]))))
            await all_written(ledger)
            await keep(database_url, until=timedelta(hours=chance.choice([-30, -3, 0, 0.1])))
            await begin_a_part(database_url)
            await expect_tiers(database_url)
    await keep(database_url, until=timedelta(days=2))
    await expect_tiers(database_url)
    assert not await read(database_url, "SELECT FROM job_open")
    marks = (await read(database_url, "SELECT * FROM record_marks"))[0]
    assert marks["days_until"] > datetime.now(UTC) - timedelta(days=1)


async def test_a_minute_and_an_hour_are_over_at_their_instant_and_not_before(database_url: str) -> None:
    """A minute is moved a minute after its end, an hour is added up three minutes after; with its own minutes alone."""
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=5)
    end, instant = hour + timedelta(hours=1), timedelta(microseconds=1)
    await read(database_url, "UPDATE record_marks SET hours_until = $1, days_until = $2", hour, hour.replace(hour=0))
    async with ledger_on(database_url) as ledger:
        for started_at in (hour, end - instant, end):
            ledger.finish(ended(new_job(node_id=NODES[0], node_owner="acme", started_at=started_at)))
        await all_written(ledger)
    keeper = RollupKeeper(database_url, KEEP_ALL, rows_a_part=1)
    of_node = f"WHERE scope_id = '{NODES[0]}' ORDER BY bucket"
    seen = []
    for seconds, micros in ((59, 0), (60, 0), (119, 999_999), (179, 999_999), (180, 0)):
        await keeper.keep(cleans=False, now=end + timedelta(seconds=seconds, microseconds=micros))
        minutes = await read(database_url, f"SELECT bucket FROM job_minutes {of_node}")
        hours = await read(database_url, f"SELECT bucket, completed FROM job_hours {of_node}")
        seen.append(([row[0] for row in minutes], [tuple(row) for row in hours]))
        await expect_tiers(database_url)
    last = end - timedelta(minutes=1)
    assert seen == [
        ([hour], []),
        ([hour, last], []),
        ([hour, last], []),
        ([hour, last, end], []),
        ([hour, last, end], [(hour, 2)]),
    ]
    assert keeper.hours_until == end


async def test_a_keeper_that_knows_no_parts_can_not_raise_the_mark_over_one(database_url: str) -> None:
    """One of an older version would add up the whole hour, and the part twice. What comes late for it counts once."""
    start = datetime.now(UTC).replace(minute=0, second=0, microsecond=0) - timedelta(hours=30)
    async with ledger_on(database_url) as ledger:
        for minute in (3, 50):
            ledger.finish(ended(new_job(started_at=start + timedelta(minutes=minute))))
        await all_written(ledger)
    await read(
        database_url, "UPDATE record_marks SET hours_until = $1, days_until = date_trunc('day', $1::timestamptz)", start
    )
    connection = await connect(database_url, application="lucid tests")
    await connection.fetchval(KINDS[0].move, datetime.now(UTC), 10, FIRST_PLACE)
    await connection.close()
    await begin_a_part(database_url)
    (marks,) = await read(database_url, "SELECT * FROM record_marks")
    assert marks["hours_part"] == start + timedelta(minutes=4)
    async with ledger_on(database_url) as ledger:  # jobs that come late, for the part that is done and for the rest
        for minute in (3, 3, 50):
            ledger.finish(ended(new_job(started_at=start + timedelta(minutes=minute))))
        await all_written(ledger)
    for mark in ("hours_until = now()", "hours_until = hours_until + interval '1 hour'"):
        with pytest.raises(asyncpg.CheckViolationError):
            await read(database_url, f"UPDATE record_marks SET {mark}")
    await keep(database_url)
    (marks,) = await read(database_url, "SELECT * FROM record_marks")
    assert (marks["hours_part"], marks["days_part"]) == (None, None)
    await expect_tiers(database_url)


async def test_a_backlog_is_moved_by_parts_that_each_hold(database_url: str) -> None:
    """One that is larger than a round has time for, as after a migration of a large ledger, is moved anyway.

    A row that is locked is left, and the keeper is cut while it waits for the marks.
    """
    chance = random.Random(3)
    async with ledger_on(database_url) as ledger:
        for _ in range(300):
            ledger.finish(job_ago(chance, timedelta(days=1)))
        await all_written(ledger)
    backlog = len(await read(database_url, "SELECT FROM job_open"))
    locker = await connect(database_url, application="lucid tests")
    async with locker.transaction():
        await locker.execute("SELECT FROM job_open LIMIT 1 FOR UPDATE")
        await locker.execute("SELECT FROM record_marks FOR UPDATE")
        keeper = asyncio.create_task(keep(database_url, until=timedelta(minutes=2), rows_a_move=1))
        while (left := len(await read(database_url, "SELECT FROM job_open"))) == backlog:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0)
        await read(database_url, KILL, ["lucid record keeper"])
        with pytest.raises(CUT):  # killed, or tired of waiting for the lock
            await keeper
    await locker.close()
    assert 0 < left < backlog
    await expect_tiers(database_url)
    await keep(database_url, until=timedelta(minutes=2))
    assert not await read(database_url, "SELECT FROM job_open")
    await expect_tiers(database_url)


async def test_no_job_is_lost_or_counts_twice_while_everything_is_killed(database_url: str) -> None:
    """Two replicas write, two keep the records, and the connections of all four die at any instant."""
    chance = random.Random(5)
    names = ["lucid jobs", "lucid record keeper"]

    async def keep_on(deadline: float) -> None:
        while asyncio.get_running_loop().time() < deadline:
            try:
                await keep(database_url, until=timedelta(minutes=chance.choice([1, 61, 1500])))
            except CUT:
                await asyncio.sleep(0)

    async def kill(deadline: float) -> None:
        while asyncio.get_running_loop().time() < deadline:
            await read(database_url, KILL, names)
            await asyncio.sleep(chance.uniform(0, 0.1))

    async with ledger_on(database_url) as one, ledger_on(database_url) as other:
        deadline = asyncio.get_running_loop().time() + 4
        tasks = [asyncio.create_task(work(deadline)) for work in (keep_on, keep_on, kill)]
        while asyncio.get_running_loop().time() < deadline:
            for ledger in (one, other):
                ledger.finish(job_ago(chance, timedelta(days=chance.choice([0, 0.05, 1]))))
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        await all_written(one, other)
    await expect_tiers(database_url)
    await keep(database_url, until=timedelta(days=2))
    await expect_tiers(database_url)
    assert not await read(database_url, "SELECT FROM job_open")


@pytest.mark.parametrize("step", STEPS)
async def test_what_is_read_is_the_sum_of_the_ledger_in_every_step(database_url: str, step: str) -> None:
    """However far rollups were moved; for a node, an owner, all, and of one model."""
    chance = random.Random(11)
    database = Database(database_url)
    reader = RollupReader(database, KEEP_ALL)
    async with ledger_on(database_url) as ledger:
        for until in (timedelta(days=-2), timedelta(hours=-20), timedelta(0), timedelta(days=1, hours=3)):
            for _ in range(100):
                ledger.finish(job_ago(chance, timedelta(days=2)))
            await all_written(ledger)
            await keep(database_url, until=until)
            await begin_a_part(database_url)
            rows = await read(database_url, ENDED_ROWS)
            now = datetime.now(UTC)
            timeline = Timeline.around(now - timedelta(days=3), now, STEPS[step])
            for wanted in (
                *(RollupQuery(node_id=node) for node in NODES[:2]),
                RollupQuery(owner="acme"),
                RollupQuery(),
                RollupQuery(owner="acme", model_id=MODELS[0]),
                RollupQuery(node_id=NODES[2], model_id=MODELS[1]),
                RollupQuery(model_id=MODELS[1]),
            ):
                found = await reader.measure(wanted, timeline, now=now, known_since=None)
                for start, measured in zip(timeline.starts(), found.steps, strict=True):
                    mine = [
                        row
                        for row in rows
                        if start <= row["started_at"] < start + timeline.step
                        and wanted.node_id in {None, str(row["node_id"])}
                        and wanted.owner in {None, row["node_owner"]}
                        and wanted.model_id in {None, str(row["model_id"])}
                    ]
                    if mine or measured.jobs is not None:
                        assert measured.jobs == _record_of(mine)
    await database.close()


@pytest.mark.parametrize("seed", range(2))
async def test_a_list_of_jobs_counts_what_its_filter_finds(database_url: str, seed: int) -> None:
    """By any span, model, node, owner and outcome, however far rollups were moved, and after rows were removed."""
    chance = random.Random(seed)
    database, oldest = Database(database_url), timedelta(days=4)
    async with ledger_on(database_url) as ledger:
        for until in (timedelta(days=-2), timedelta(hours=-20), timedelta(0), timedelta(days=1, hours=3)):
            for _ in range(100):
                ledger.finish(job_ago(chance, oldest))
            ledger.begin(running := job_ago(chance, oldest))
            running.outcome = Outcome.RUNNING
            await all_written(ledger)
            await keep(database_url, until=until)
            if until == timedelta(0):
                await JobRetention(database, days=3).remove_all()
                await RollupKeeper(database_url, Retention(2, 31, 31)).keep()
                oldest = timedelta(days=2.9)  # no job ends that is older than what is removed
            await begin_a_part(database_url)
            rows = await read(database_url, "SELECT * FROM jobs")
            for _ in range(150):
                wanted = _random_filter(chance)
                async with database.transaction() as connection:
                    found = await count_jobs(connection, wanted)
                assert found == sum(_is_found(row, wanted) for row in rows), wanted
    await database.close()


def _random_filter(chance: random.Random) -> JobFilter:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    instants = [None, *(hour - timedelta(days=4) * chance.random() for _ in range(3))]
    instants += [hour - timedelta(hours=chance.randint(-1, 100)), hour.replace(hour=0), hour - timedelta(days=30)]
    return JobFilter(
        owner=chance.choice([None, None, "acme"]),
        node_id=chance.choice([None, None, *NODES[:2]]),
        outcome=chance.choice([None, None, *Outcome]),
        model_ids=chance.choice([None, None, [], MODELS[:1], MODELS]),
        since=chance.choice(instants),
        until=chance.choice(instants),
    )


def _is_found(row: Any, wanted: JobFilter) -> bool:
    return (
        wanted.owner in {None, row["node_owner"]}
        and wanted.node_id in {None, str(row["node_id"])}
        and wanted.outcome in {None, row["outcome"]}
        and (wanted.model_ids is None or str(row["model_id"]) in wanted.model_ids)
        and (wanted.since is None or row["started_at"] >= wanted.since)
        and (wanted.until is None or row["started_at"] < wanted.until)
    )


@pytest.mark.parametrize("seed", range(2))
async def test_time_in_states_is_what_counting_each_nodes_own_finds(database_url: str, seed: int) -> None:
    """For nodes, an owner and all, over windows and steps, outages of ours left out, those that overlap once."""
    chance = random.Random(seed)
    now = datetime.now(UTC).replace(second=0, microsecond=0)
    database = Database(database_url)
    reader = RollupReader(database, KEEP_ALL)
    columns = "id, type, name, owner, status, metadata"
    told: dict[str, list[tuple[datetime, str]]] = {}
    for node, owner in OWNERS.items():
        values = (node, node, owner)
        await read(
            database_url, f"INSERT INTO passports ({columns}) VALUES ($1, 'compute', $2, $3, 'active', '{{}}')", *values
        )
        since = sorted({now - timedelta(minutes=chance.randint(0, 60 * 24 * 40)) for _ in range(chance.randint(0, 30))})
        told[node] = [(at, chance.choice(["healthy", "unhealthy", "draining"])) for at in since]
        for at, state in told[node]:
            await read(database_url, "INSERT INTO node_states VALUES ($1, $2, $3, $4)", node, at, state, owner)
    outages = []
    for _ in range(6):
        start = now - timedelta(minutes=chance.randint(100, 60 * 24 * 32))
        outages.append((start, start + timedelta(minutes=chance.randint(1, 600))))
        await read(database_url, "INSERT INTO outages (started_at, ended_at) VALUES ($1, $2)", *outages[-1])
    lengths = [timedelta(days=days) for days in (1, 7, 30)]
    of_nodes = await reader.states_of_nodes(NODES, lengths, now=now)
    for wanted in (*(RollupQuery(node_id=node) for node in NODES), RollupQuery(owner="acme"), RollupQuery()):
        mine = [node for node in NODES if wanted.node_id in {None, node} and wanted.owner in {None, OWNERS[node]}]
        found = await reader.states(wanted, lengths, now=now)
        timeline = Timeline.around(now - timedelta(days=2), now, STEPS["1h"])
        steps = (await reader.measure(wanted, timeline, now=now, known_since=None)).steps
        spans = [(now - length, now) for length in lengths]
        spans += [(start, min(start + timeline.step, now)) for start in timeline.starts()]
        for span, record in zip(spans, [*found, *(step.states for step in steps)], strict=True):
            counted, lost = _counted_states([told[node] for node in mine], outages, *span)
            assert {state: seconds for state, seconds in record.seconds.items() if seconds} == pytest.approx(counted)
            assert record.outage_seconds == lost
        if wanted.node_id is not None:
            assert [record.seconds for record in of_nodes[wanted.node_id]] == [record.seconds for record in found]
    await database.close()


def _counted_states(
    nodes: list[list[tuple[datetime, str]]],
    outages: list[tuple[datetime, datetime]],
    since: datetime,
    until: datetime,
) -> tuple[dict[str, float], float]:
    """Seconds of each state, and of outages, minute by minute."""
    counted: Counter[str] = Counter()
    lost, at = 0.0, since
    while at < until:
        end = min(at.replace(second=0) + timedelta(minutes=1), until)
        seconds = (end - at).total_seconds()
        if any(start <= at < stop for start, stop in outages):
            lost += seconds
        else:
            for node in nodes:
                held = [state for began, state in node if began <= at]
                counted.update({held[-1]: seconds} if held else {})
        at = end
    return dict(counted), lost


def _record_of(rows: list[Any]) -> JobRollup:
    sums = sums_of(rows)
    record = JobRollup(**{name: value for name, value in sums.items() if value is not None})
    record.spread, record.faults = Counter(record.spread), Counter(record.faults)
    return record


async def test_records_that_are_old_are_cleaned_away_once_they_are_added_up(database_url: str) -> None:
    async with ledger_on(database_url) as ledger:
        for days in (0, 1, 40, 200):
            ledger.finish(ended(new_job(started_at=datetime.now(UTC) - timedelta(days=days, hours=1))))
        await all_written(ledger)
    long_ago = "date_trunc('day', now() - interval '1 year')"
    await read(database_url, f"UPDATE record_marks SET hours_until = {long_ago}, days_until = {long_ago}")
    keeper = RollupKeeper(database_url, Retention(2, 31, 100))
    await keeper.keep(now=datetime.now(UTC) - timedelta(days=300))  # nothing is added up yet, so nothing may go
    assert len(await read(database_url, "SELECT FROM job_open")) == 4
    await keeper.keep()  # by parts, one after the other
    for tier, kept in (("minutes", 2), ("hours", 31 * 24), ("days", 100 * 24)):
        oldest = (await read(database_url, f"SELECT now() - min(bucket) AS age FROM job_{tier}"))[0]["age"]
        assert oldest < timedelta(hours=kept + 24), tier
    assert len(await read(database_url, "SELECT FROM job_totals")) == 4


async def test_a_move_does_not_read_what_others_have_moved(database_url: str) -> None:
    """The rows of a large fleet's hour are a hundred moves, and deleted rows stay in the table until it is vacuumed."""
    fill = """
        INSERT INTO job_open (node_id, bucket, model_id, node_owner, completed, failed, rejected, cancelled, priced)
        SELECT gen_random_uuid(), date_trunc('minute', now()) - interval '5 minutes', gen_random_uuid(), 'olga',
            1, 0, 0, 0, 1
        FROM generate_series(1, 8000)
    """
    await read(database_url, fill)
    connection = await connect(database_url, application="lucid tests")
    read_by_move, place = [], FIRST_PLACE
    for _ in range(8):
        arguments = (datetime.now(UTC), 1000, place)
        moving = connection.transaction()
        await moving.start()
        plan = await connection.fetchval(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {KINDS[0].move}", *arguments)
        await moving.rollback()
        read_by_move.append(blocks_read(json.loads(plan)[0]["Plan"], "job_open"))
        moved = await connection.fetchrow(KINDS[0].move, *arguments)
        assert moved is not None
        assert moved["rows"] == 1000
        place = moved["place"]
    await connection.close()
    assert read_by_move[-1] <= read_by_move[0] + 1


def blocks_read(plan: dict[str, Any], table: str) -> int:
    """Return how many blocks the scans of a table by place, or of all of it, have read."""
    if plan.get("Relation Name") == table and plan["Node Type"] in {"Seq Scan", "Tid Range Scan"}:
        return int(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])
    return sum(blocks_read(part, table) for part in plan.get("Plans", ()))


async def test_cleaning_reads_no_more_than_it_deletes(database_url: str) -> None:
    """A fleet's minutes of two days are gigabytes, and a minute's worth of them is deleted each minute."""
    fill = """
        INSERT INTO job_minutes (bucket, scope_id, model_id, completed, failed, rejected, cancelled, priced)
        SELECT date_trunc('minute', now()) - n * interval '1 minute', gen_random_uuid(), gen_random_uuid(),
            1, 0, 0, 0, 1
        FROM generate_series(1, 2900) AS n, generate_series(1, 10)
    """
    await read(database_url, fill)
    await read(database_url, "ANALYZE job_minutes")
    (cleaning, *_) = CLEAN_MINUTES
    await read(database_url, "UPDATE record_marks SET hours_until = now()")
    (before,) = (await read(database_url, cleaning.find, 48, EPOCH))[0]
    plan = "\n".join(row[0] for row in await read(database_url, f"EXPLAIN {cleaning.delete}", before, EPOCH))
    assert "Seq Scan" not in plan
    assert "job_minutes_pkey" in plan
    await RollupKeeper(database_url, Retention(48, 90, 1000)).keep()
    (after,) = (await read(database_url, cleaning.find, 48, EPOCH))[0]
    oldest, newest, count = (await read(database_url, "SELECT min(bucket), max(bucket), count(*) FROM job_minutes"))[0]
    assert before <= oldest < after + timedelta(minutes=1)  # whatever time this took
    assert count == 10 * ((newest - oldest) // timedelta(minutes=1) + 1)


async def test_migrations_take_the_ledger_in_and_back_out(database_url: str) -> None:
    """Down to the ledger alone and up again: the same records, made of its rows."""
    chance = random.Random(2)
    async with ledger_on(database_url) as ledger:
        for _ in range(400):
            ledger.finish(job_ago(chance, timedelta(days=1)))
        await all_written(ledger)
    await keep(database_url)
    await schema.downgrade(database_url, "job_ledger")
    assert len(await read(database_url, "SELECT FROM job_minutes")) > 0
    await schema.upgrade(database_url)
    await schema.check(database_url)
    await keep(database_url, until=timedelta(days=2))
    await expect_tiers(database_url)
    began = (await read(database_url, "SELECT began_at FROM record_marks"))[0]["began_at"]
    assert began == (await read(database_url, "SELECT min(started_at) AS at FROM jobs"))[0]["at"]


def test_histograms_keep_their_buckets_at_either_width() -> None:
    """The highest bucket of the second kind fits, with the highest count."""
    for width in (NARROW, WIDE):
        assert (511 << width.bits | width.most) < 2 ** (31 if width is NARROW else 63)
    assert json.dumps([NARROW.type, WIDE.type]) == '["integer", "bigint"]'
    assert Width("integer", 22) == NARROW
