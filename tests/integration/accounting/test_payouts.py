"""Payouts over HTTP: amounts are traceable to jobs, exact, visible to their owner alone, and final once closed."""

from __future__ import annotations

import asyncio
import csv
import io
import random
from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.payouts.closing import PeriodClosing
from lucid_compute.accounting.payouts.revenue import DEFAULT_TERMS, Terms
from lucid_compute.accounting.payouts.store import record_terms
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.registry.domain.prices import total
from tests.api import Api, error_code
from tests.ledger import all_written, ended, expect_payouts, ledger_on, new_job, split
from tests.lucid_serve import eventually
from tests.other_replicas import run_sql

KILL = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'lucid jobs'
"""
TODAY = datetime.now(UTC).date()
DAY = timedelta(days=1)
FIRST = TODAY - 10 * DAY


class Parties(NamedTuple):
    """Two providers' nodes, and two models, one of which is the first provider's own."""

    nodes: dict[str, str]
    models: dict[str, str]
    owners: dict[str, str]


async def parties(api: Api) -> Parties:
    """Register them, as an admin for their owners."""
    owners = {"a": "acme", "g": "globex", "mine": "acme", "theirs": "lab"}
    made = {}
    for name, owner in owners.items():
        is_node = len(name) == 1
        metadata: dict[str, Any] = {"vram": 8, "inferenceUrl": "http://gpu"} if is_node else {"format": "gguf"}
        body = {"name": name, "type": "compute" if is_node else "model", "metadata": metadata, "owner": owner}
        made[name] = (await api.http.post("/passports", json=body)).json()["id"]
    return Parties({name: made[name] for name in ("a", "g")}, {name: made[name] for name in ("mine", "theirs")}, owners)


def job_of(there: Parties, node: str, model: str, day: date, price: str | None, **changes: Any) -> Job:
    """A completed job of that day with that price."""
    job = new_job(
        node_id=there.nodes[node],
        node_owner=there.owners[node],
        model_id=there.models[model],
        model_name=model,
        started_at=datetime.combine(day, time(12), UTC),
    )
    return ended(job, price_usd=None if price is None else Decimal(price), **changes)


def some_jobs(there: Parties, count: int, *, first: date = FIRST, days: int = 8) -> list[Job]:
    """Jobs of any node, model and price on these days, some without a price."""
    chance = random.Random(7)
    prices = [None, "0", "0.000000000001", "0.333333333333337", "1.999999999999999", "123456.000000000000001"]
    return [
        job_of(
            there,
            chance.choice("ag"),
            chance.choice(["mine", "theirs"]),
            first + chance.randrange(days) * DAY,
            chance.choice(prices),
        )
        for _ in range(count)
    ]


async def tell(api: Api, jobs: Sequence[Job]) -> None:
    """Have the ledger write the jobs."""
    for job in jobs:
        api.replica.jobs.finish(job)
    await all_written(api.replica.jobs)


async def ask(api: Api, path: str = "", **query: Any) -> dict[str, Any]:
    """Request payouts of the days of the tests."""
    span = {"from": str(FIRST), "to": str(TODAY + 2 * DAY)} if "/periods" not in path else {}
    answer = await api.http.get(f"/payouts{path}", params={**span, **query})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def close(api: Api, since: date, until: date) -> Any:
    """Close a period; return the raw response."""
    return await api.http.post("/payouts/periods", json={"from": str(since), "to": str(until)})


def told(there: Parties, jobs: Sequence[Job], terms: Terms = DEFAULT_TERMS) -> dict[tuple[str | None, str], Decimal]:
    """What each owner gets in each role, job by job, in plain Python."""
    parts: dict[tuple[str | None, str], list[Decimal]] = {}
    for job in jobs:
        if job.price_usd is not None:
            shares = split(job.price_usd, terms)
            model_owner = there.owners[job.model_name]
            for key, share in (
                ((job.node_owner, "provider"), shares.provider),
                ((model_owner, "model_owner"), shares.model_owner),
                ((None, "protocol"), shares.protocol),
            ):
                parts.setdefault(key, []).append(share)
    return {key: total(each) for key, each in parts.items()}


def amounts(report: dict[str, Any]) -> dict[tuple[str | None, str], Decimal]:
    """The totals of a report, which have to be the sums of its lines."""
    found = {(each["owner"], each["role"]): each for each in report["totals"]}
    for key, each in found.items():
        lines = [line for line in report["lines"] if (line["owner"], line["role"]) == key]
        for name in ("amountUsd", "grossUsd"):
            assert total(Decimal(line[name]) for line in lines) == Decimal(each[name])
        assert sum(line["jobs"] for line in lines) == each["jobs"]
    return {key: Decimal(each["amountUsd"]) for key, each in found.items()}


async def test_every_cent_is_somebodys_and_traces_to_jobs(api: Api) -> None:
    there = await parties(api)
    jobs = some_jobs(there, 300)
    await tell(api, jobs)
    report = await ask(api)
    assert amounts(report) == told(there, jobs)
    priced = [job for job in jobs if job.price_usd is not None]
    assert total(amounts(report).values()) == total(job.price_usd for job in priced if job.price_usd is not None)
    for line in report["lines"]:
        if line["role"] == "provider":
            listed = await api.http.get(
                "/compute/jobs", params={"passportId": line["passportId"], "model": line["modelId"], "perPage": 100}
            )
            prices = [job["priceUsd"] for job in listed.json()["jobs"] if job["priceUsd"] is not None]
            assert (len(prices), total(map(Decimal, prices))) == (line["jobs"], Decimal(line["grossUsd"]))
    await expect_payouts(api.replica.database.url)


async def test_an_owner_sees_its_own_parts_and_no_other_owners_nodes(api: Api) -> None:
    there = await parties(api)
    jobs = some_jobs(there, 100)
    await tell(api, jobs)
    everybodys = told(there, jobs)
    for owner in ("acme", "globex", "lab", "nobody"):
        its = await api.new_key(owner, ["compute"])
        expected = {key: amount for key, amount in everybodys.items() if key[0] == owner}
        report = await ask(its)
        assert amounts(report) == expected
        assert amounts(await ask(api, owner=owner)) == expected
        for line in report["lines"]:
            own = [id_ for name, id_ in there.nodes.items() if there.owners[name] == owner]
            assert line["passportId"] in own if line["role"] == "provider" else line["passportId"] is None
        refused = await its.http.get("/payouts", params={"owner": "somebody"})
        assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_a_model_without_a_passport_leaves_its_part_to_the_provider(api: Api) -> None:
    there = await parties(api)
    stray = job_of(there, "a", "mine", FIRST, "1")
    stray.model_id = str(uuid4())
    await tell(api, [stray])
    assert amounts(await ask(api)) == {("acme", "provider"): Decimal("0.9"), (None, "protocol"): Decimal("0.1")}


async def test_what_an_upstream_served_has_no_price_and_is_in_no_payout(api: Api) -> None:
    await tell(api, [ended(new_job(node_id=None, node_owner=None), price_usd=None)])
    assert await ask(api) == {**await ask(api), "totals": [], "lines": []}


async def test_new_terms_hold_for_jobs_that_start_later(api: Api) -> None:
    there = await parties(api)
    before, after = job_of(there, "a", "theirs", FIRST, "1"), job_of(there, "a", "theirs", TODAY, "1")
    terms = Terms(5000, 0, 5000)
    await record_terms(api.replica.database, terms)
    await record_terms(api.replica.database, terms)
    assert len(await run_sql(api, "SELECT * FROM payout_terms")) == 2
    after.started_at = datetime.now(UTC) + timedelta(seconds=1)
    await tell(api, [before, after])
    report = await ask(api, to=str(TODAY + 2 * DAY))
    assert amounts(report) == {
        ("acme", "provider"): Decimal("1.2"),
        ("lab", "model_owner"): Decimal("0.2"),
        (None, "protocol"): Decimal("0.6"),
    }
    assert [each["providerBps"] for each in report["terms"]] == [5000, 7000]
    await expect_payouts(api.replica.database.url)


@pytest.mark.parametrize("asks", [{"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}])
async def test_a_statement_has_a_line_for_each_day_and_totals_that_are_their_sums(api: Api, asks: Any) -> None:
    there = await parties(api)
    jobs = some_jobs(there, 200)
    await tell(api, jobs)
    span = {"from": str(FIRST), "to": str(TODAY)}
    answer = await api.http.get("/payouts", **{**asks, "params": {**asks.get("params", {}), **span}})
    assert answer.headers["content-type"].startswith("text/csv")
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    lines, totals = ([row for row in rows if row["kind"] == kind] for kind in ("line", "total"))
    assert len({row["day"] for row in lines}) > 5
    found = {}
    for each in totals:
        own = [row for row in lines if (row["owner"], row["role"]) == (each["owner"], each["role"])]
        for name in ("jobs", "tokensIn", "tokensOut", "grossUsd", "amountUsd"):
            assert total(Decimal(row[name]) for row in own) == Decimal(each[name])
        found[each["owner"] or None, each["role"]] = Decimal(each["amountUsd"])
    assert found == told(there, jobs)


async def test_a_closed_period_stays_as_it_is_and_what_comes_late_is_the_next_ones(api: Api) -> None:
    """Also when its jobs are gone, a name has changed, and everything is asked for again."""
    there = await parties(api)
    jobs, late = some_jobs(there, 100, days=5), [job_of(there, "g", "mine", FIRST, "0.7")]
    await tell(api, jobs)
    closed = await close(api, FIRST, FIRST + 5 * DAY)
    assert closed.status_code == 201, closed.text
    path = f"/periods/{closed.json()['id']}"
    frozen = await ask(api, path)
    statement = (await api.http.get(f"/payouts{path}?format=csv")).text
    assert amounts(frozen) == told(there, jobs)
    retention = JobRetention(api.replica.database, days=1)
    assert await retention.remove_all() == 100
    await tell(api, late)
    await api.http.patch(f"/passports/{there.nodes['a']}", json={"name": "renamed"})
    assert await retention.remove_all() == 0
    assert await ask(api, path) == frozen
    assert (await api.http.get(f"/payouts{path}?format=csv")).text == statement
    assert amounts(await ask(api)) == told(there, [*jobs, *late])
    again = await close(api, FIRST, FIRST + 5 * DAY)
    assert (again.status_code, again.json()) == (200, closed.json())
    second = await close(api, FIRST + 5 * DAY, FIRST + 8 * DAY)
    assert amounts(await ask(api, f"/periods/{second.json()['id']}")) == told(there, late)
    assert await retention.remove_all() == 1
    assert amounts(await ask(api)) == told(there, [*jobs, *late])
    listed = (await api.http.get("/payouts/periods")).json()
    assert [each["id"] for each in listed["periods"]] == [second.json()["id"], closed.json()["id"]]
    trail = (await api.http.get("/audit", params={"targetId": second.json()["id"]})).json()["events"]
    assert [event["action"] for event in trail] == ["payouts.close"]


async def test_an_owner_reads_its_own_part_of_a_period(api: Api) -> None:
    there = await parties(api)
    jobs = some_jobs(there, 50, days=5)
    await tell(api, jobs)
    closed = (await close(api, FIRST, FIRST + 5 * DAY)).json()
    lab = await api.new_key("lab", ["passports:read"])
    report = await ask(lab, f"/periods/{closed['id']}")
    assert amounts(report) == {("lab", "model_owner"): told(there, jobs)["lab", "model_owner"]}
    assert (closed["closedBy"], report["period"]["closedBy"]) == ("admin", None)
    assert error_code(await close(lab, FIRST + 5 * DAY, FIRST + 6 * DAY)) == "FORBIDDEN"


async def test_periods_follow_one_another_and_are_over(api: Api) -> None:
    there = await parties(api)
    await tell(api, [job_of(there, "a", "mine", FIRST, "1")])
    skipping = await close(api, FIRST + DAY, FIRST + 2 * DAY)
    assert (skipping.status_code, error_code(skipping)) == (409, "PERIOD_CONFLICT")
    assert skipping.json()["error"]["details"] == {"from": str(FIRST)}
    assert (await close(api, FIRST, FIRST + 2 * DAY)).status_code == 201
    for since, until in ((FIRST, FIRST + DAY), (FIRST + DAY, FIRST + 3 * DAY), (FIRST + 3 * DAY, FIRST + 4 * DAY)):
        refused = await close(api, since, until)
        assert refused.json()["error"]["details"] == {"from": str(FIRST + 2 * DAY)}
    for since, until in ((FIRST + 2 * DAY, TODAY + 2 * DAY), (FIRST + 2 * DAY, FIRST + 2 * DAY), (TODAY, FIRST)):
        refused = await close(api, since, until)
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
    assert error_code(await api.http.get(f"/payouts/periods/{uuid4()}")) == "PERIOD_NOT_FOUND"
    assert error_code(await api.http.get("/payouts/periods/x")) == "PERIOD_NOT_FOUND"


@pytest.mark.parametrize("table", ["payout_periods", "payout_lines", "payout_terms"])
async def test_what_is_closed_can_not_be_changed(api: Api, table: str) -> None:
    """Postgres refuses every UPDATE and DELETE."""
    for statement in (f"UPDATE {table} SET {{}} = {{}}", f"DELETE FROM {table}", f"TRUNCATE {table}"):
        column = {"payout_periods": "closed_by", "payout_lines": "jobs", "payout_terms": "provider_bps"}[table]
        with pytest.raises(asyncpg.RaiseError, match="append-only"):
            await run_sql(api, statement.format(column, column))


async def test_nothing_is_lost_or_paid_twice_while_periods_are_closed_under_the_ledger(api: Api) -> None:
    """Two replicas write to days that two others close, while their connections are killed.

    Each close waits until a job of its days is committed, and more jobs of these days are sent during it and after it.
    """
    there = await parties(api)
    url = api.replica.database.url
    api.replica.payouts._closing = PeriodClosing(api.replica.payouts.long_transactions, lines_a_step=3)
    jobs = some_jobs(there, 3000, days=6)
    parts = [jobs[number::13] for number in range(13)]  # one before and one during each close, and one after all

    async def has_open_lines(until: date) -> bool:
        return bool(await run_sql(api, "SELECT FROM payout_open WHERE day < $1 LIMIT 1", until))

    async with ledger_on(url) as one, ledger_on(url) as other:

        def finish(some: Sequence[Job]) -> None:
            for number, job in enumerate(some):
                (one, other)[number % 2].finish(job)

        async def write_under_kills(some: Sequence[Job]) -> None:
            for start in range(0, len(some), 50):
                finish(some[start : start + 50])
                await run_sql(api, KILL)
                await asyncio.sleep(0.02)

        codes = []
        for number in range(6):
            since, until = FIRST + number * DAY, FIRST + (number + 1) * DAY
            finish(parts[2 * number])
            await eventually(partial(has_open_lines, until), 30.0)
            first, second, _ = await asyncio.gather(
                close(api, since, until), close(api, since, until), write_under_kills(parts[2 * number + 1])
            )
            codes += [first.status_code, second.status_code]
        finish(parts[-1])
        await all_written(one, other)
    assert sorted(codes) == [200] * 6 + [201] * 6
    await expect_payouts(url)
    for table in ("payout_lines", "payout_open"):  # else nothing came before its day was closed, or nothing after
        assert await run_sql(api, f"SELECT FROM {table}")
    assert amounts(await ask(api)) == told(there, jobs)


async def test_a_lost_job_is_paid_when_its_true_outcome_comes_and_only_then(api: Api) -> None:
    there = await parties(api)
    job = new_job(node_id=there.nodes["a"], node_owner="acme", model_id=there.models["mine"], model_name="mine")
    api.replica.jobs.begin(job)
    await all_written(api.replica.jobs)
    await run_sql(api, "UPDATE jobs SET outcome = 'lost'")
    assert (await ask(api))["lines"] == []
    for _ in range(2):
        await tell(api, [ended(job, Outcome.COMPLETED, price_usd=Decimal(1))])
    assert amounts(await ask(api))[None, "protocol"] == Decimal("0.1")


@pytest.mark.parametrize(
    "query",
    [{"from": "2026-02-01", "to": "2026-02-01"}, {"from": "yesterday"}, {"to": "2026-02-30"}, {"from": "1700000000"}],
)
async def test_days_that_cannot_be_are_refused(api: Api, query: dict[str, str]) -> None:
    for path in ("/payouts", "/payouts/losses"):
        refused = await api.http.get(path, params=query)
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
