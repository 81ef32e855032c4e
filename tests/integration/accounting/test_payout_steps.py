"""Periods are closed in steps: whoever is killed, the next one goes on, and nobody sees a part of a period."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, date, datetime, time, timedelta
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.payouts.closer import PayoutCloser
from lucid_compute.accounting.payouts.closing import Closing, Period, PeriodClosing
from lucid_compute.accounting.payouts.revenue import PayoutsClose
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import connect
from lucid_compute.registry.domain.identity import SYSTEM
from tests.api import Api, error_code
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
from tests.ledger import expect_payouts
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'lucid long transactions'
"""
UNTIL = FIRST + 5 * DAY


def closing_of(api: Api, lines_a_step: int) -> PeriodClosing:
    """What closes periods in steps of so many lines."""
    return PeriodClosing(api.replica.payouts.long_transactions, lines_a_step=lines_a_step)


async def begin(api: Api, *, steps: int) -> Closing:
    """Begin to close the first days, in steps of two lines, and leave off after so many."""
    closing = closing_of(api, 2)
    begun = await closing._begin(SYSTEM, FIRST, UNTIL)
    assert isinstance(begun, Closing)
    for _ in range(steps):
        await closing._move_some(begun, FIRST)
    return begun


def closer_of(api: Api, when: PayoutsClose = PayoutsClose.NEVER) -> PayoutCloser:
    """A replica's closer, which closes nothing of its own accord."""
    return PayoutCloser(api.replica.database, api.replica.payouts, when=when, after_days=0)


async def test_no_step_moves_more_lines_than_it_may(api: Api) -> None:
    there = await parties(api)
    jobs = some_jobs(there, 200, days=5)
    await tell(api, jobs)
    period, is_new = await closing_of(api, 3).close(SYSTEM, FIRST, UNTIL)
    assert is_new
    steps = await run_sql(api, "SELECT count(*) FROM payout_lines GROUP BY xmin")
    assert {row[0] for row in steps} <= {1, 2, 3}
    assert sum(row[0] for row in steps) == 20
    assert amounts(await ask(api, f"/periods/{period.id}")) == told(there, jobs)
    assert await closing_of(api, 3).close(SYSTEM, FIRST, UNTIL) == (period, False)


async def test_a_period_ends_before_the_first_instant_of_its_last_day(api: Api) -> None:
    """What started at midnight is the next one's, and so is what still runs when the period is closed."""
    there = await parties(api)
    midnight = datetime.combine(UNTIL, time(), UTC)
    jobs = [job_of(there, "a", "mine", FIRST, price) for price in ("1", "2", "4")]
    for job, started_at in zip(jobs, (midnight - timedelta(microseconds=1), midnight, midnight - DAY), strict=True):
        job.started_at = started_at
    before, after, late = jobs
    late.outcome = Outcome.RUNNING
    api.replica.jobs.begin(late)
    await tell(api, [before, after])
    for lines_a_step in (1, 1000):  # in steps, and in the last step alone
        closing = closing_of(api, lines_a_step)
        since, until = (FIRST, UNTIL) if lines_a_step == 1 else (UNTIL, UNTIL + DAY)
        period, _ = await closing.close(SYSTEM, since, until)
        expected = [before] if lines_a_step == 1 else [after, late]
        assert amounts(await ask(api, f"/periods/{period.id}")) == told(there, expected)
        if lines_a_step == 1:
            assert [row[0] for row in await run_sql(api, "SELECT day FROM payout_open")] == [UNTIL]
            late.outcome = Outcome.COMPLETED
            await tell(api, [late])
    assert await run_sql(api, "SELECT FROM payout_open") == []
    await expect_payouts(api.replica.database.url)


async def test_the_last_step_ends_before_that_instant_too(api: Api) -> None:
    """It takes what is left: here all of it."""
    there = await parties(api)
    jobs = [job_of(there, "a", "mine", day, "1") for day in (UNTIL - DAY, UNTIL)]
    await tell(api, jobs)
    closing = closing_of(api, 10)
    begun = await closing._begin(SYSTEM, FIRST, UNTIL)
    assert isinstance(begun, Closing)
    period, _ = await closing._end(begun)
    assert amounts(await ask(api, f"/periods/{period.id}")) == told(there, jobs[:1])
    assert [row[0] for row in await run_sql(api, "SELECT day FROM payout_open")] == [UNTIL]


async def test_nobody_sees_a_part_of_a_period(api: Api) -> None:
    """Reports of days stay right, there is no period, and no job of it is deleted."""
    there = await parties(api)
    jobs = some_jobs(there, 200, days=5)
    await tell(api, jobs)
    begun = await begin(api, steps=2)
    assert len(await run_sql(api, "SELECT FROM payout_lines")) == 4
    assert amounts(await ask(api)) == told(there, jobs)
    assert (await api.http.get("/payouts/periods")).json()["periods"] == []
    assert error_code(await api.http.get(f"/payouts/periods/{begun.period_id}")) == "PERIOD_NOT_FOUND"
    statement = (await api.http.get("/payouts", params={"format": "csv", "from": str(FIRST), "to": str(UNTIL)})).text
    assert begun.period_id not in statement
    assert await JobRetention(api.replica.database, days=1).remove_all() == 0
    await expect_payouts(api.replica.database.url)


async def test_any_replica_ends_what_another_one_began(api: Api) -> None:
    """Also one that closes nothing of its own accord; jobs that came late belong to the next period."""
    there = await parties(api)
    jobs = some_jobs(there, 200, days=5)
    await tell(api, jobs)
    begun = await begin(api, steps=3)
    late = [job_of(there, node, model, FIRST, "0.7") for node in "ag" for model in ("mine", "theirs")]
    await tell(api, late)
    for since, until in ((FIRST, UNTIL - DAY), (UNTIL, UNTIL + DAY)):
        refused = await close(api, since, until)
        assert (refused.status_code, error_code(refused)) == (409, "PERIOD_CONFLICT")
        assert refused.json()["error"]["details"] == {"from": str(FIRST)}
    closer = closer_of(api)
    assert await closer.close_due() == 1
    assert await closer.close_due() == 0
    assert closer.open_days == (TODAY - UNTIL).days
    assert amounts(await ask(api, f"/periods/{begun.period_id}")) == told(there, jobs)
    second = await close(api, UNTIL, UNTIL + DAY)
    assert amounts(await ask(api, f"/periods/{second.json()['id']}")) == told(there, late)
    trail = (await api.http.get("/audit", params={"targetId": begun.period_id})).json()["events"]
    assert [event["action"] for event in trail] == ["payouts.close"]


async def test_the_same_request_goes_on_after_a_kill(api: Api) -> None:
    """The one that closes is killed, in one step or another, and asked again until it answers."""
    there = await parties(api)
    jobs = some_jobs(there, 200, days=5)
    await tell(api, jobs)
    closing = closing_of(api, 1)
    for lines in (1, 5, 15):
        async with a_locked_line(api):
            running = asyncio.create_task(closing.close(SYSTEM, FIRST, UNTIL))

            async def have_moved(lines: int = lines) -> bool:
                return len(await run_sql(api, "SELECT FROM payout_lines")) >= lines

            await eventually(have_moved, 30)
            await run_sql(api, KILL)
            with pytest.raises(DatabaseUnavailable):  # at the latest for the line that is locked
                await running
        await expect_payouts(api.replica.database.url)
    period, _ = await closing.close(SYSTEM, FIRST, UNTIL)
    assert amounts(await ask(api, f"/periods/{period.id}")) == told(there, jobs)
    assert await run_sql(api, "SELECT FROM payout_open UNION ALL SELECT FROM payout_closings") == []


@asynccontextmanager
async def a_locked_line(api: Api) -> AsyncIterator[None]:
    """Lock an open line of the first days, as the ledger does while it bills a job."""
    locker = await connect(api.replica.database.url, application="lucid tests")
    async with locker.transaction():
        await locker.execute("SELECT FROM payout_open ORDER BY day DESC LIMIT 1 FOR UPDATE")
        yield
    await locker.close()


async def test_a_step_waits_for_no_line_that_is_locked(api: Api) -> None:
    """It leaves it to a later one."""
    there = await parties(api)
    await tell(api, some_jobs(there, 200, days=5))
    closing = closing_of(api, 1000)
    begun = await closing._begin(SYSTEM, FIRST, UNTIL)
    assert isinstance(begun, Closing)
    day: date | None = FIRST
    async with a_locked_line(api):
        while day is not None:
            day, _ = await closing._move_some(begun, day)
        assert len(await run_sql(api, "SELECT FROM payout_open")) == 1
    period, is_new = await closing._end(begun)
    assert isinstance(period, Period)
    assert is_new
    assert await run_sql(api, "SELECT FROM payout_open") == []


async def test_a_replica_of_an_older_version_closes_nothing_meanwhile(api: Api) -> None:
    """It would make a period of the rest. Nor is a line added to any other period than the one that is being closed."""
    there = await parties(api)
    await tell(api, some_jobs(there, 200, days=5))
    begun = await begin(api, steps=1)
    period = "INSERT INTO payout_periods (id, starts_on, ends_on, closed_by) VALUES ($1::text::uuid, $2, $3, 'old')"
    with pytest.raises(asyncpg.RaiseError, match="another period is being closed"):
        await run_sql(api, period, str(uuid4()), FIRST, UNTIL)
    line = "INSERT INTO payout_lines SELECT * FROM jsonb_populate_record(NULL::payout_lines, $1::text::jsonb)"
    copied = (await run_sql(api, 'SELECT to_jsonb(l) || \'{"day": "2020-01-01"}\' FROM payout_lines l'))[0][0]
    with pytest.raises(asyncpg.RaiseError, match="nothing is added"):
        await run_sql(api, line, copied.replace(begun.period_id, str(uuid4())))
    await closer_of(api).close_due()
    with pytest.raises(asyncpg.RaiseError, match="nothing is added"):
        await run_sql(api, line, copied)
    await run_sql(api, _SECOND)
    with pytest.raises(asyncpg.UniqueViolationError):
        await run_sql(api, _SECOND)


_SECOND = "INSERT INTO payout_closings VALUES (gen_random_uuid(), '2020-01-01', '2020-02-01', now(), 'x')"


async def test_a_downgrade_opens_again_what_is_being_closed(api: Api) -> None:
    """No line is lost, and none counts twice; corrections are dropped."""
    there = await parties(api)
    jobs = some_jobs(there, 200, days=5)
    await tell(api, jobs)
    await begin(api, steps=2)
    await tell(api, late := [job_of(there, node, "mine", FIRST, "0.7") for node in "ag"])
    url = api.replica.database.url
    await schema.downgrade(url, "refused")
    assert await run_sql(api, "SELECT FROM payout_lines") == []
    await expect_payouts(url)
    await schema.upgrade(url)
    assert amounts(await ask(api)) == told(there, [*jobs, *late])


async def test_how_long_days_have_been_open_is_known_before_they_are_closed(api: Api) -> None:
    """From the first billed day, then from the end of the last period."""
    closer = closer_of(api)
    found = [closer.open_days]

    async def look() -> None:
        await closer.close_due()
        found.append(closer.open_days)

    await look()
    await tell(api, [job_of(await parties(api), "a", "mine", FIRST, "1")])
    await look()
    await close(api, FIRST, FIRST + 3 * DAY)
    await look()
    assert found == [None, 0, 10, 7]
