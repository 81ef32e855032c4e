"""GET /usage: what consumers have used, exactly, however it was written; budgets of keys; and filling in older jobs."""

from __future__ import annotations

import asyncio
import csv
import io
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.usage import MAX_LINES
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import connect
from tests.api import Api, error_code
from tests.ledger import all_written, ended, ledger_on, new_job, random_job, read

NOW = datetime.now(UTC)
TODAY, YESTERDAY = NOW.date().isoformat(), (NOW - timedelta(days=1)).date().isoformat()
SUMS = ("requests", "completed", "failed", "rejected", "cancelled", "tokens_in", "tokens_out", "price_usd")
COUNTED = """
    SELECT consumer, (started_at AT TIME ZONE 'UTC')::date AS day, key_id, model_id,
        count(*) FILTER (WHERE attempt = 1) AS requests,
        count(*) FILTER (WHERE outcome = 'completed') AS completed,
        count(*) FILTER (WHERE outcome = 'failed') AS failed,
        count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
        count(*) FILTER (WHERE outcome = 'cancelled') AS cancelled,
        coalesce(sum(tokens_in), 0) AS tokens_in, coalesce(sum(tokens_out), 0) AS tokens_out,
        coalesce(sum(price_usd), 0) AS price_usd
    FROM jobs WHERE outcome NOT IN ('running', 'lost') GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
"""
HELD = f"SELECT consumer, day, key_id, model_id, {', '.join(SUMS)} FROM usage_days ORDER BY 1, 2, 3, 4"


async def write(api: Api, *jobs: Job) -> None:
    """Have the jobs written."""
    for job in jobs:
        api.replica.jobs.finish(job)
    await all_written(api.replica.jobs)


async def usage(api: Api, **query: Any) -> dict[str, Any]:
    """The report."""
    answer = await api.http.get("/usage", params=query)
    assert answer.status_code == 200, answer.text
    report: dict[str, Any] = answer.json()
    return report


async def expect_usage(url: str) -> None:
    """The sums are those of the rows, to the cent."""
    assert [tuple(row) for row in await read(url, HELD)] == [tuple(row) for row in await read(url, COUNTED)]


def job(outcome: Outcome = Outcome.COMPLETED, *, days_ago: int = 0, price: str | None = "0.5", **changes: Any) -> Job:
    """A job of carl's key at noon, or now."""
    started_at = NOW if not days_ago else NOW.replace(hour=12) - timedelta(days=days_ago)
    made = new_job(**{"consumer": "carl", "key_id": "carlskey", "started_at": started_at, **changes})
    return ended(made, outcome, price_usd=None if price is None else Decimal(price))


async def test_the_sums_are_those_of_the_jobs_however_they_were_written(database_url: str) -> None:
    """Attempts, outcomes, jobs that ran first, batches that were written twice, two replicas at once."""
    chance = random.Random(14)
    nodes = [*(str(uuid4()) for _ in range(3)), None]
    async with ledger_on(database_url) as one, ledger_on(database_url) as two:
        for _ in range(600):
            made = random_job(chance, nodes)
            made.key_id = f"key-{chance.randint(1, 4)}"
            made.started_at -= timedelta(days=chance.randint(0, 2))
            ledger = chance.choice([one, two])
            if chance.random() < 0.3:
                outcome, made.outcome = made.outcome, Outcome.RUNNING
                ledger.begin(made)
                await all_written(ledger)
                made.outcome = outcome
            ledger.finish(made)
        await all_written(one, two)
    await expect_usage(database_url)
    await read(database_url, "UPDATE jobs SET outcome = outcome, price_usd = price_usd")
    await expect_usage(database_url)
    assert len(await read(database_url, HELD)) >= 4


async def test_a_request_counts_once_however_often_it_is_tried(api: Api) -> None:
    """And what all of its attempts cost is charged: a part that was delivered before a node died is."""
    request = str(uuid4())
    await write(
        api,
        job(Outcome.FAILED, id=request, price=None),
        job(Outcome.FAILED, id=request, attempt=2, price="0.25"),
        job(id=request, attempt=3),
        job(Outcome.FAILED, price=None),
        job(Outcome.CANCELLED),
    )
    total = (await usage(api, owner="carl"))["total"]
    assert {name: total[name] for name in ("requests", "completed", "errors", "cancelled")} == {
        "requests": 3,
        "completed": 1,
        "errors": 1,
        "cancelled": 1,
    }
    assert (total["priceUsd"], total["tokensIn"], total["tokensOut"]) == ("1.25", 500, 100)


async def test_usage_is_grouped_by_day_model_and_key(api: Api) -> None:
    model_id = await api.add_model("org/model")
    key = (await api.http.post("/keys", json={"name": "k", "owner": "carl", "scopes": ["inference:run"]})).json()
    mine = {"model_id": model_id, "key_id": key["id"]}
    await write(api, job(**mine), job(**mine, days_ago=1), job(**mine, days_ago=1), job(price="0.001"))
    carl = api.with_key(key["key"])
    report = await usage(carl, **{"from": YESTERDAY})
    assert (report["owner"], report["from"], report["groupBy"]) == ("carl", YESTERDAY, ["day"])
    assert [(line["day"], line["priceUsd"]) for line in report["usage"]] == [(YESTERDAY, "1.0"), (TODAY, "0.501")]
    assert {line["modelId"] for line in report["usage"]} == {None}
    by = await usage(carl, **{"from": "-2d", "groupBy": "model,key"})
    lines = {(line["model"], line["key"]): line for line in by["usage"]}
    assert lines["org/model", "k"]["requests"] == 3
    assert lines["org/model", "k"]["keyId"] == key["id"]
    assert sorted(name for pair in lines for name in pair if name) == ["k", "org/model"]
    assert sum(Decimal(line["priceUsd"]) for line in by["usage"]) == Decimal(by["total"]["priceUsd"])
    assert (await usage(carl, **{"from": "-2d", "groupBy": ""}))["usage"][0]["requests"] == 4
    assert (await usage(carl, **{"from": "-2d", "model": "org/model"}))["total"]["requests"] == 3
    assert (await usage(carl, **{"from": "-2d", "model": "none"}))["total"]["requests"] == 0
    assert (await usage(carl, **{"from": "-2d", "keyId": "carlskey"}))["total"]["requests"] == 1
    assert (await usage(carl, **{"from": YESTERDAY, "to": TODAY}))["total"]["requests"] == 2
    assert (await usage(carl, **{"from": TODAY, "to": "now"}))["total"]["requests"] == 2


async def test_an_owner_sees_its_own_usage_and_an_admin_all(api: Api) -> None:
    await write(api, job(), job(consumer="rival", key_id="rivalskey"))
    carl = await api.new_key("carl", ["inference:run"])
    assert (await usage(carl))["total"]["requests"] == (await usage(carl, owner="carl"))["total"]["requests"] == 1
    refused = await carl.http.get("/usage?owner=rival")
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")
    everyone = await usage(api, groupBy="owner")
    assert [(line["owner"], line["requests"]) for line in everyone["usage"]] == [("carl", 1), ("rival", 1)]
    assert (everyone["owner"], everyone["budgets"]) == (None, None)
    assert (await usage(api, owner="rival"))["total"]["requests"] == 1


async def test_usage_is_read_by_spreadsheets(api: Api) -> None:
    """A line for each group; a name that would be a formula is text."""
    name = "=HYPERLINK(1)"
    key = (await api.http.post("/keys", json={"name": name, "owner": "carl", "scopes": ["compute"]})).json()
    await write(api, job(key_id=key["id"]), job(days_ago=1))
    answer = await api.http.get("/usage", params={"groupBy": "day,key", "from": "-1d", "format": "csv"})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [(row["day"], row["keyId"], row["key"], row["priceUsd"]) for row in rows] == [
        (YESTERDAY, "carlskey", "", "0.5"),
        (TODAY, key["id"], f"'{name}", "0.5"),
    ]
    accepted = await api.http.get("/usage", headers={"accept": "text/csv"})
    assert accepted.text.startswith("day,requests,")


async def test_queries_that_can_not_be_answered_say_what_to_send(api: Api) -> None:
    for query, path in (
        ({"groupBy": "week"}, "query.groupBy"),
        ({"from": "yesterday"}, "query.from"),
        ({"from": "1969-12-31"}, "query.from"),
        ({"from": "-1d", "to": "-2d"}, "query.to"),
        ({"from": "2000-01-01", "to": "2026-01-01"}, "query.to"),
        ({"from": "9999-12-31", "to": "9999-12-31T23:00:00Z"}, "query.to"),
    ):
        answer = await api.http.get("/usage", params=query)
        assert (answer.status_code, answer.json()["error"]["details"]["fields"][0]["path"]) == (422, path), query
    many = f"""
        INSERT INTO usage_days SELECT 'carl', current_date, 'k' || n, gen_random_uuid(), 1, 1, 0, 0, 0, 0, 0, 0
        FROM generate_series(0, {MAX_LINES}) n
    """
    await read(api.replica.database.url, many)
    assert (await usage(api))["total"]["requests"] == MAX_LINES + 1
    assert error_code(await api.http.get("/usage?groupBy=key")) == "INVALID_REQUEST"


async def test_budgets_show_what_is_spent_of_them(api: Api) -> None:
    limits = {"budgetUsd": "1", "budgetPeriod": "day"}
    body = {"owner": "carl", "scopes": ["inference:run"], "limits": limits}
    key = (await api.http.post("/keys", json={"name": "a", **body})).json()
    monthly = {**body, "limits": {"budgetUsd": 2, "budgetPeriod": "month"}}
    await api.http.post("/keys", json={"name": "b", **monthly})
    await write(api, job(key_id=key["id"], price="1.25"), job(key_id=key["id"], days_ago=1, price="9"))
    budgets = (await usage(api.with_key(key["key"])))["budgets"]
    assert [(each["name"], each["budgetUsd"], each["spentUsd"]) for each in budgets] == [
        ("a", "1", "1.25"),
        ("b", "2", "0"),
    ]
    tomorrow = (NOW + timedelta(days=1)).date().isoformat()
    assert budgets[0]["resetsAt"] == f"{tomorrow}T00:00:00.000Z"
    principal = api.replica.keys.authenticate(key["key"], api.replica.clock.now())
    parts = api.replica.usage
    assert not parts.budgets.admit(principal, NOW)
    await parts.budgets.ask(principal, NOW)
    with pytest.raises(Exception, match="budget of 1 US dollars a day is spent"):
        parts.budgets.admit(principal, NOW)


async def test_the_oldest_usage_is_deleted(api: Api) -> None:
    await write(api, job(), job(days_ago=30))
    old = "UPDATE usage_days SET day = current_date - 4000 WHERE day < current_date"
    await read(api.replica.database.url, old)
    await api.replica.rollup_keeper.keep()
    assert [row["day"] for row in await read(api.replica.database.url, HELD)] == [NOW.date()]


_OLD_JOBS = """
    INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, key_id, consumer, endpoint, is_stream, started_at,
        outcome, tokens_in, are_tokens_counted, price_usd)
    SELECT gen_random_uuid(), 1 + n % 2, '{replica}', '{model}', 'm', 'key' || n % 3, 'carl', 'embeddings', false,
        now() - n * interval '{step}', (ARRAY['completed', 'failed', 'running'])[1 + n % 3], n, true, 0.001
    FROM generate_series(1, {count}) n
"""
IDS = {"replica": uuid4(), "model": uuid4()}


async def test_jobs_from_before_are_filled_in_while_others_write(empty_url: str) -> None:
    """Old and new jobs, and such as end meanwhile: each counts once, also those older than what is filled in."""
    await schema.upgrade(empty_url, "settled")
    await read(empty_url, _OLD_JOBS.format(**IDS, step="50 milliseconds", count=70_000))
    is_done = asyncio.Event()

    async def write_meanwhile() -> None:
        connection = await connect(empty_url)
        try:
            while not is_done.is_set():
                await connection.execute(_OLD_JOBS.format(**IDS, step="10 seconds", count=300))
                await connection.execute("""
                    UPDATE jobs SET outcome = 'completed' WHERE (id, attempt) IN (
                        SELECT id, attempt FROM jobs WHERE outcome = 'running' ORDER BY random() LIMIT 200
                        FOR UPDATE SKIP LOCKED
                    )
                """)
        finally:
            await connection.close()

    writers = [asyncio.create_task(write_meanwhile()) for _ in range(2)]
    try:
        await schema.upgrade(empty_url)
    finally:
        is_done.set()
        await asyncio.gather(*writers)
    await expect_usage(empty_url)
    (mark,) = await read(empty_url, "SELECT filled_since = '-infinity' FROM usage_marks")
    assert mark[0]


@pytest.mark.parametrize("kept", [0, 1, 2])
async def test_a_migration_that_was_killed_goes_on_where_it_was(empty_url: str, kept: int) -> None:
    """After any of its batches, and before it was known to be done: nothing counts twice."""
    await schema.upgrade(empty_url, "settled")
    await read(empty_url, _OLD_JOBS.format(**IDS, step="1 day", count=90))
    await schema.upgrade(empty_url, "usage")
    await expect_usage(empty_url)
    days = {0: 0, 1: 40, 2: 4000}[kept]
    await read(empty_url, f"DELETE FROM usage_days WHERE day < current_date - {days}")
    await read(empty_url, f"UPDATE usage_marks SET filled_since = date_trunc('day', now()) - interval '{days} days'")
    await read(empty_url, "UPDATE alembic_version SET version_num = 'settled'")
    await schema.upgrade(empty_url)
    await expect_usage(empty_url)
