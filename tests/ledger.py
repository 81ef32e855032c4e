"""Jobs for tests, a running ledger, and its check: rows and sums agree with the jobs that were given to it."""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import ROUND_FLOOR, Context, Decimal
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.ledger import JobLedger
from lucid_compute.accounting.measured import BUCKETS, FIRST_MS, GROWTH
from lucid_compute.accounting.payouts.revenue import Terms
from lucid_compute.accounting.rollup_columns import ALL_NODES, JOB_COLUMNS, NARROW, UPSTREAM, Width, owner_scope
from lucid_compute.postgres.database import connect
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.domain.prices import EXACT, total

MODEL_ID = str(uuid4())
ENDED = [Outcome.COMPLETED, Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED]
AWKWARD = [
    'a "quoted" name',
    "back\\slash\\",
    "tab\tand\nnew line",
    "(a,b)",
    "{x}",
    "",
    " ",
    "NULL",
    "\\N",
    "ünï😀",
    "'",
]


class LosesReplies(DedicatedConnection):
    """A connection that breaks after each of the first commits, before the writer has their reply."""

    def __init__(self, url: str, purpose: Purpose, *, losses: int) -> None:
        super().__init__(url, purpose)
        self.losses = losses

    @asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Yield the connection; raise after the block has committed."""
        async with super().within(seconds) as connection:
            yield connection
        if self.losses:
            self.losses -= 1
            raise ConnectionResetError


def new_job(**changes: Any) -> Job:
    """Return a job that was just dispatched, with `changes`."""
    fields: dict[str, Any] = {
        "id": str(uuid4()),
        "attempt": 1,
        "model_id": MODEL_ID,
        "model_name": "org/model",
        "node_id": str(uuid4()),
        "node_owner": "acme",
        "key_id": "Abc123Abc123",
        "consumer": "customer",
        "endpoint": "chat/completions",
        "is_stream": False,
        "started_at": datetime.now(UTC),
    }
    return Job(**{**fields, **changes})


def ended(job: Job, outcome: Outcome = Outcome.COMPLETED, **changes: Any) -> Job:
    """Return the job as it ended, with its tokens, price and durations."""
    job.outcome = outcome
    job.status = 200
    job.first_byte_ms, job.latency_ms = 12.5, 250.25
    job.tokens_in, job.tokens_out, job.price_usd = 100, 20, Decimal("0.000123456789")
    for name, value in changes.items():
        setattr(job, name, value)
    return job


def random_job(chance: random.Random, nodes: list[str | None]) -> Job:
    """Return a job with any outcome on one of the nodes, from the last few minutes."""
    node = chance.choice(nodes)
    job = new_job(
        node_id=node,
        node_owner=None if node is None else chance.choice(AWKWARD),
        model_name=chance.choice(AWKWARD),
        consumer=chance.choice(AWKWARD),
        attempt=chance.randint(1, 3),
        is_stream=chance.random() < 0.5,
        started_at=datetime.now(UTC) - timedelta(seconds=chance.uniform(0, 200)),
    )
    ended(job, chance.choice(ENDED), reason=chance.choice([None, *AWKWARD]))
    job.latency_ms = chance.choice([None, 0.0, 0.001, chance.uniform(0, 1e6)])
    job.first_byte_ms = chance.choice([None, job.latency_ms])
    job.price_usd = chance.choice([None, Decimal(0), Decimal("1E-7"), Decimal("123456.000000000001")])
    job.tokens_in, job.tokens_out = chance.choice([None, 0, 10**12]), chance.choice([None, 7])
    job.status = chance.choice([None, 200, 500])
    job.are_tokens_counted = chance.random() < 0.5
    return job


@asynccontextmanager
async def ledger_on(url: str, **options: Any) -> AsyncIterator[JobLedger]:
    """Run a ledger. At the end of the block it has written everything, or given up after a minute."""
    ledger = JobLedger(url, **{"replica_id": str(uuid4()), "flush_seconds": 60.0, **options})
    task = asyncio.create_task(ledger.run())
    await asyncio.sleep(0)  # it has begun: a task that is cancelled before writes nothing
    try:
        yield ledger
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def all_written(*ledgers: JobLedger, deadline_seconds: float = 60.0) -> None:
    """Wait until the ledgers have committed everything."""
    async with asyncio.timeout(deadline_seconds):
        while any(ledger.waiting for ledger in ledgers):  # noqa: ASYNC110 - the ledger has no event for it
            await asyncio.sleep(0.005)


async def read(url: str, statement: str, *arguments: Any) -> list[Any]:
    """Run one statement on a connection of its own; return its rows."""
    connection = await connect(url, application="lucid tests", timeout_seconds=60)
    try:
        return list(await connection.fetch(statement, *arguments))
    finally:
        await connection.close()


async def expect(url: str, expected: Iterable[Job]) -> None:
    """Fail unless the rows are exactly the expected jobs, and the sums exactly those of the rows."""
    jobs = {(job.id, job.attempt): job for job in expected}
    rows = {(str(row["id"]), row["attempt"]): row for row in await read(url, "SELECT * FROM jobs")}
    assert rows.keys() == jobs.keys()
    for key, job in jobs.items():
        row = rows[key]
        for name in ("node_owner", "model_name", "key_id", "consumer", "endpoint", "is_stream", "outcome", "reason"):
            assert row[name] == getattr(job, name), name
        for name in ("started_at", "status", "tokens_in", "tokens_out", "are_tokens_counted", "price_usd"):
            assert row[name] == getattr(job, name), name
        for name in ("model_id", "node_id"):
            assert (row[name] and str(row[name])) == getattr(job, name), name
        for name in ("first_byte_ms", "latency_ms"):
            assert row[name] == pytest.approx(getattr(job, name), abs=0.001), name
    await expect_sums(url)


async def expect_sums(url: str) -> None:
    """Fail unless the sums are exactly those of the rows."""
    totals = """
        SELECT node_id::text, min(node_owner), count(*) FILTER (WHERE outcome = 'completed'),
            count(*) FILTER (WHERE outcome = 'failed'), count(*) FILTER (WHERE outcome = 'rejected'),
            count(*) FILTER (WHERE outcome = 'cancelled')
        FROM jobs WHERE node_id IS NOT NULL AND outcome NOT IN ('running', 'lost') GROUP BY 1 ORDER BY 1
    """
    held = "SELECT node_id::text, node_owner, completed, failed, rejected, cancelled FROM job_totals ORDER BY 1"
    # a node has one owner; these tests give it several
    counted = [(row[0], *row[2:]) for row in await read(url, totals)]
    assert [(row[0], *row[2:]) for row in await read(url, held)] == counted
    await expect_rollups(url)
    await expect_payouts(url)


async def expect_payouts(url: str) -> None:
    """Fail unless each line of the payouts, closed or not, is exactly the sum of its jobs."""
    by_jobs: dict[Any, list[Any]] = {}
    terms = [tuple(row) for row in await read(url, "SELECT * FROM payout_terms ORDER BY since")]
    for row in await read(url, f"{ENDED_ROWS} AND price_usd IS NOT NULL AND node_id IS NOT NULL"):
        shares = split(row["price_usd"], Terms(*max(term for term in terms if term[0] <= row["started_at"])[1:]))
        by_jobs.setdefault((row["node_id"], row["started_at"].date(), row["model_id"], row["node_owner"]), []).append(
            (1, row["tokens_in"] or 0, row["tokens_out"] or 0, row["price_usd"], shares.model_owner, shares.protocol)
        )
    names = "node_id, day, model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"
    stored: dict[Any, list[Any]] = {}
    for row in await read(url, f"SELECT {names} FROM payout_open UNION ALL SELECT {names} FROM payout_lines"):
        stored.setdefault(tuple(row)[:4], []).append(tuple(row)[4:])
    summed = [
        {key: [total(map(Decimal, column)) for column in zip(*rows, strict=True)] for key, rows in each.items()}
        for each in (by_jobs, stored)
    ]
    assert summed[0] == summed[1]


async def expect_rollups(url: str) -> None:
    """Fail unless the rollups of minutes, open or not, are exactly the sums of the jobs by node and model."""
    expected = {key: sums_of(rows) for key, rows in _by_minute(await read(url, ENDED_ROWS)).items()}
    columns = ", ".join(_COLUMNS)
    parts = await read(
        url,
        f"SELECT node_id::text, bucket, model_id::text, {columns} FROM job_open "
        f"UNION ALL SELECT scope_id::text, bucket, model_id::text, {columns} FROM job_minutes "
        f"WHERE scope_id <> '{ALL_NODES}' AND NOT scope_id IN "
        f"(SELECT {owner_scope('coalesce(node_owner, $1)')} FROM jobs)",
        "",
    )
    stored: dict[Any, dict[str, Any]] = {}
    for part in parts:
        add_rollup(stored.setdefault(tuple(part)[:3], {}), part)
    assert stored == expected


ENDED_ROWS = "SELECT * FROM jobs WHERE outcome NOT IN ('running', 'lost')"
_COLUMNS = [column.name for column in JOB_COLUMNS]


def _by_minute(rows: Iterable[Any]) -> dict[Any, list[Any]]:
    grouped: dict[Any, list[Any]] = {}
    for row in rows:
        minute = row["started_at"].replace(second=0, microsecond=0)
        grouped.setdefault((str(row["node_id"] or UPSTREAM), minute, str(row["model_id"])), []).append(row)
    return grouped


def sums_of(rows: Iterable[Any]) -> dict[str, Any]:
    """Return the rollup that these jobs must have, counted one by one; a histogram by bucket, faults by name."""
    record: dict[str, Any] = {}
    for row in rows:
        is_completed = row["outcome"] == "completed"
        part: dict[str, Any] = {name: int(row["outcome"] == name) for name in _COLUMNS[:4]}
        part |= {"priced": int(row["price_usd"] is not None), "revenue_usd": row["price_usd"]}
        part |= {name: row[name] for name in ("tokens_in", "tokens_out")}
        spread = []
        for kind, name in enumerate(("latency", "first_byte")):
            milliseconds = row[f"{name}_ms"] if is_completed else None
            part[f"{name}_us"] = None if milliseconds is None else round(milliseconds * 1000)
            if milliseconds is not None:
                spread.append((kind * BUCKETS + bucket_of(milliseconds)) << NARROW.bits | 1)
        part["spread"] = spread or None
        part["faults"] = None if is_completed else json.dumps({f"{row['outcome']}:{_reason(row)}": 1})
        add_rollup(record, part)
    return record


def _reason(row: Any) -> str:
    return "unknown" if row["reason"] is None else str(row["reason"])


def add_rollup(held: dict[str, Any], part: Any, width: Width = NARROW) -> None:
    """Add one rollup to another, in plain Python; a known value replaces null."""
    for name in _COLUMNS:
        value = part[name]
        if value is None:
            held.setdefault(name, None)
        elif name == "spread":
            held[name] = Counter(held.get(name) or {})
            for element in value:
                held[name][element >> width.bits] += element & width.most
        elif name == "faults":
            held[name] = (held.get(name) or Counter()) + Counter(json.loads(value))
        else:
            held[name] = (held.get(name) or 0) + value


def bucket_of(duration_ms: float) -> int:
    """Return the bucket that a duration belongs to, in plain Python."""
    if duration_ms <= FIRST_MS:
        return 0
    return min(math.ceil(math.log(duration_ms / FIRST_MS) / math.log(GROWTH)), BUCKETS - 1)


class Shares(NamedTuple):
    """The parts of one price; they add up to it."""

    provider: Decimal
    model_owner: Decimal
    protocol: Decimal


def split(price: Decimal, terms: Terms, *, has_model_owner: bool = True) -> Shares:
    """Return the parts of a price, in plain Python; the part of a model without an owner is the provider's."""
    model_owner = _share(price, terms.model_owner_bps) if has_model_owner else Decimal(0)
    protocol = _share(price, terms.protocol_bps)
    return Shares(EXACT.subtract(price, EXACT.add(model_owner, protocol)), model_owner, protocol)


def _share(price: Decimal, bps: int) -> Decimal:
    whole = EXACT.scaleb(EXACT.multiply(price, bps), -4)
    return whole.quantize(Decimal("0.000000000001"), context=Context(prec=EXACT.prec, rounding=ROUND_FLOOR))
