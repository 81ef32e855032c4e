"""Payout lines come from jobs alone, whichever replica writes these; none can be added, forged or lost."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.payouts.closer import PayoutCloser
from lucid_compute.accounting.payouts.revenue import PayoutsClose, Terms
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.postgres import schema
from lucid_compute.server.replica import Replica
from lucid_compute.server.settings import Settings
from tests.api import Api, open_api
from tests.integration.accounting.test_payouts import (
    DAY,
    FIRST,
    TODAY,
    amounts,
    ask,
    close,
    job_of,
    parties,
    some_jobs,
    tell,
    told,
)
from tests.ledger import ENDED_ROWS, all_written, ended, expect_payouts, new_job, read
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql

# As replicas write jobs that bill them in the same statement, and those that do not bill them at all.
_JOB = """
    INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
        is_stream, started_at, outcome, tokens_in, tokens_out, are_tokens_counted, price_usd)
    SELECT gen_random_uuid(), 1, gen_random_uuid(), gen_random_uuid(), 'm', gen_random_uuid(), 'acme', 'k', 'c',
        'chat/completions', false, now() - interval '3 days', 'completed', 10, 20, false, 0.333333333333337
"""
_BILLING = f"""
    WITH written AS ({_JOB} RETURNING *)
    INSERT INTO payout_open AS held
    SELECT node_id, (started_at AT TIME ZONE 'UTC')::date, model_id, node_owner, 1, 10, 20, price_usd,
        trunc(price_usd * 0.2, 12), trunc(price_usd * 0.1, 12)
    FROM written
    ON CONFLICT (node_id, day, model_id, node_owner) DO UPDATE SET jobs = held.jobs + excluded.jobs
"""


@pytest.mark.parametrize("statement", [_JOB, _BILLING])
async def test_a_job_that_an_older_replica_writes_is_billed_once(api: Api, statement: str) -> None:
    for _ in range(3):
        await run_sql(api, statement)
    assert await run_sql(api, "SELECT sum(jobs) FROM payout_open") == [(3,)]
    await expect_payouts(api.replica.database.url)


async def test_migrating_bills_what_was_left_out(database_url: str) -> None:
    """Of days that have lines, of days that have none, and of days that are closed."""
    await read(database_url, _JOB)
    await schema.downgrade(database_url, "revenue")
    columns = ", ".join(row[0] for row in await read(database_url, _COLUMNS))
    again = f"INSERT INTO jobs (id, {columns}) SELECT gen_random_uuid(), {columns} FROM jobs"
    for statement in (again, _JOB, _BILLING):
        await read(database_url, statement)
    assert await read(database_url, "SELECT sum(jobs) FROM payout_open") == [(2,)]
    await schema.upgrade(database_url)
    assert await read(database_url, "SELECT sum(jobs) FROM payout_open") == [(4,)]
    await expect_payouts(database_url)


_COLUMNS = "SELECT attname FROM pg_attribute WHERE attrelid = 'jobs'::regclass AND attnum > 0 AND attname <> 'id'"


async def test_nothing_is_added_to_what_is_closed(api: Api) -> None:
    there = await parties(api)
    await tell(api, some_jobs(there, 20, days=2))
    await close(api, FIRST, FIRST + 2 * DAY)
    copied = "SELECT period_id, node_id, day - 1, {} FROM payout_lines LIMIT 1"
    rest = "model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd, "
    rest += "node_name, model_name, model_owner"
    for statement in (copied.format(rest), copied.format(rest).replace("period_id,", "gen_random_uuid(),")):
        with pytest.raises(asyncpg.RaiseError, match="nothing is added"):
            await run_sql(api, f"INSERT INTO payout_lines {statement}")


async def test_a_job_that_was_billed_keeps_its_price(api: Api) -> None:
    """The ledger never tries; SQL that does is refused."""
    await run_sql(api, _JOB)
    for change in ("price_usd = 9", "price_usd = NULL", "outcome = 'lost'", "node_owner = 'me'", "started_at = now()"):
        with pytest.raises(asyncpg.IntegrityConstraintViolationError, match="does not change"):
            await run_sql(api, f"UPDATE jobs SET {change}")
    await run_sql(api, "UPDATE jobs SET reason = 'looked at'")
    await expect_payouts(api.replica.database.url)


async def test_jobs_stay_until_their_payouts_are_closed(api: Api) -> None:
    """However old they are; and a job that came late stays until it is in a period too."""
    there = await parties(api)
    retention = JobRetention(api.replica.database, days=2)
    await tell(api, [*some_jobs(there, 50, days=4), *(_unpriced(FIRST + number * DAY) for number in range(4))])
    assert await retention.remove_all() == 0
    assert (await close(api, FIRST, FIRST + 2 * DAY)).status_code == 201
    await tell(api, [job_of(there, "g", "mine", FIRST + DAY, "0.7")])
    before = await _count(api, "true")
    removed = await retention.remove_all()
    assert 0 < removed < before
    assert await read(api.replica.database.url, f"{ENDED_ROWS} AND started_at < $1", _at(FIRST + DAY)) == []
    assert await _count(api, "true") == before - removed
    assert (await close(api, FIRST + 2 * DAY, FIRST + 4 * DAY)).status_code == 201
    assert await retention.remove_all() == before - removed


def _unpriced(day: date) -> Any:
    return ended(new_job(started_at=datetime.combine(day, time(1), UTC)), Outcome.FAILED, price_usd=None)


async def _count(api: Api, condition: str) -> int:
    return int((await run_sql(api, f"SELECT count(*) FROM jobs WHERE {condition}"))[0][0])


def _at(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)


async def test_months_are_closed_when_they_are_due_by_one_of_all_replicas(api: Api) -> None:
    there = await parties(api)
    first = TODAY.replace(day=1) - timedelta(days=70)
    jobs = [job_of(there, "a", "mine", first + number * DAY, "1") for number in range(0, 70, 5)]
    await tell(api, [*jobs, job_of(there, "a", "mine", TODAY, "1")])
    database, store = api.replica.database, api.replica.payouts
    closers = [PayoutCloser(database, store, when=PayoutsClose.MONTHLY, after_days=0) for _ in range(2)]
    closed = await asyncio.gather(*(closer.close_due() for closer in closers))
    periods = (await api.http.get("/payouts/periods?sortBy=name&sortOrder=asc")).json()["periods"]
    assert sum(closed) == len(periods) == 3
    assert [each["from"] for each in periods][1:] == [each["to"] for each in periods][:-1]
    assert (periods[0]["from"], periods[-1]["to"]) == (str(first.replace(day=1)), str(TODAY.replace(day=1)))
    assert {each["closedBy"] for each in periods} == {"lucid"}
    parts = [await ask(api, f"/periods/{each['id']}") for each in periods]
    assert sum((amounts(part)[None, "protocol"] for part in parts), Decimal(0)) == told(there, jobs)[None, "protocol"]
    assert [await closer.close_due() for closer in closers] == [0, 0]
    assert len(await run_sql(api, "SELECT FROM payout_open")) == 1


@pytest.mark.parametrize(("when", "closed"), [(PayoutsClose.MONTHLY, 3), (PayoutsClose.NEVER, 0)])
async def test_a_service_closes_automatically_unless_the_settings_say_never(
    database_url: str, settings: Settings, when: PayoutsClose, closed: int
) -> None:
    """And it is ready either way."""

    def close_often(replica: Replica) -> None:
        closer = replica.background["payouts"]
        assert isinstance(closer, PayoutCloser)
        closer.every_seconds = 0.01

    await read(database_url, _JOB.replace("'3 days'", "'100 days'"))
    changed = settings.model_copy(update={"payouts_close": when, "payouts_close_after_days": 0})
    async with open_api(database_url, changed, close_often) as api:

        async def are_closed() -> bool:
            listed = await api.http.get("/payouts/periods")
            return bool(listed.json()["pagination"]["total"] >= closed)

        await eventually(are_closed)
        assert (await api.http.get("/readyz")).status_code == 200
    assert len(await read(database_url, "SELECT FROM payout_periods")) in ({3, 4} if closed else {0})


async def test_a_lost_job_is_billed_when_its_outcome_comes_from_an_older_replica(api: Api) -> None:
    there = await parties(api)
    job = new_job(node_id=there.nodes["a"], node_owner="acme", model_id=there.models["mine"], id=str(uuid4()))
    api.replica.jobs.begin(job)
    await all_written(api.replica.jobs)
    await run_sql(api, "UPDATE jobs SET outcome = 'lost'")
    await run_sql(api, "UPDATE jobs SET outcome = 'completed', price_usd = 1, tokens_in = 1, tokens_out = 1")
    await expect_payouts(api.replica.database.url)
    assert await run_sql(api, "SELECT gross_usd FROM payout_open") == [(Decimal(1),)]


EXTREMES = [
    *(Decimal(text) for text in ("0", "0E-15", "1E-15", "9E-13", "1E+3", "999999999999999999.999999999999999")),
    *(Decimal(f"0.{'9' * digits}") for digits in (12, 13, 28, 40)),
    Decimal("1234567890123.123456789012345"),
    Decimal(9999999999999999999999999999),  # 28 digits
]


@pytest.mark.parametrize("terms", [(10_000, 0, 0), (0, 10_000, 0), (0, 0, 10_000), (3333, 3333, 3334), (1, 9998, 1)])
async def test_postgres_splits_as_python_does_whatever_the_price_and_the_terms(
    api: Api, terms: tuple[int, int, int]
) -> None:
    """To the last decimal, job by job and in a sum of them."""
    await run_sql(api, "INSERT INTO payout_terms VALUES (now() - interval '30 days', $1, $2, $3)", *terms)
    there = await parties(api)
    jobs = [job_of(there, "a", "mine", FIRST, str(price)) for price in EXTREMES]
    jobs += [job_of(there, "g", "theirs", FIRST + number * DAY, str(price)) for number, price in enumerate(EXTREMES)]
    await tell(api, jobs)
    await expect_payouts(api.replica.database.url)
    report = await ask(api, to=str(FIRST + 30 * DAY))
    assert {key: amount for key, amount in amounts(report).items() if amount} == {
        key: amount for key, amount in told(there, jobs, Terms(*terms)).items() if amount
    }


@pytest.mark.parametrize("terms", [(7000, 2000, 999), (7000, 2000, 1001), (10_001, -1, 0), (12_000, -1000, -1000)])
async def test_terms_that_are_not_whole_are_refused_by_the_database_too(api: Api, terms: tuple[int, int, int]) -> None:
    with pytest.raises(asyncpg.CheckViolationError):
        await run_sql(api, "INSERT INTO payout_terms VALUES (now(), $1, $2, $3)", *terms)
