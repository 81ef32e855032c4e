"""What the demo came to, by the service's own word, and whether the clients, the ledger and the metrics agree."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from demo.cast import Cast
from demo.requests import REFUSED_BY_NODE
from demo.tally import Tally
from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.shapes import JobView

SERIES = ("completed", "failed", "rejected", "latencyP50Ms", "latencyP99Ms", "tokensIn", "tokensOut", "revenueUsd")
SETTLE_SECONDS = 5.0  # jobs are listed some hundredths of a second after they ended
LOOK_SECONDS = 0.2
NAMES = (
    "requests answered",
    "attempts that failed",
    "refused by a node",
    "tokens read",
    "tokens written",
    "revenue, USD",
)
Figure = int | Decimal | None


class Row(NamedTuple):
    """One figure from four sides: the clients', the ledger's of their keys, the ledger's of all keys, the metrics'."""

    name: str
    clients: Figure
    their_jobs: Figure
    all_jobs: Figure
    metrics: Figure

    @property
    def agrees(self) -> bool:
        """Return whether clients and their jobs agree, and all jobs and the metrics do."""
        return (self.clients is None or self.clients == self.their_jobs) and self.all_jobs == self.metrics


class Summary(NamedTuple):
    """The figures, and the latencies in milliseconds."""

    rows: Sequence[Row]
    p50_ms: float
    p99_ms: float

    @property
    def reconciles(self) -> bool:
        """Return whether every figure is the same from all sides."""
        return all(row.agrees for row in self.rows)


async def sum_up(cast: Cast, tally: Tally, since: datetime) -> Summary:
    """Read ledger and metrics until they agree, or until they have had time enough; nobody asks any more by then."""
    async with cast.lucid() as lucid:
        await lucid.keys.revoke(cast.guest.id)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        summary = await _read(cast, tally, since)
        if summary.reconciles or time.monotonic() > deadline:
            return summary
        await asyncio.sleep(LOOK_SECONDS)


async def _read(cast: Cast, tally: Tally, since: datetime) -> Summary:
    keys = {key.id for key in cast.consumers.values()}
    async with cast.lucid() as lucid:
        jobs = [job async for job in lucid.compute.jobs(since=since)]
        totals = (await lucid.metrics.fleet(from_=since, series=SERIES)).totals
    theirs = _of_jobs(job for job in jobs if job.key_id in keys)
    rows = list(map(Row, NAMES, _of_clients(tally), theirs, _of_jobs(jobs), _of_metrics(totals)))
    return Summary(rows, float(totals["latencyP50Ms"] or 0), float(totals["latencyP99Ms"] or 0))


def _of_clients(tally: Tally) -> tuple[Figure, ...]:
    """Return what the clients counted, by `NAMES`; nobody told the client of a cut stream how many tokens it had."""
    tokens = (None, None) if tally.cut else (tally.tokens_in, tally.tokens_out)
    return (tally.answered, tally.failed_attempts, tally.refused[REFUSED_BY_NODE], *tokens, None)


def _of_metrics(totals: Mapping[str, int | float | str | None]) -> tuple[Figure, ...]:
    """Return what the metrics say, by `NAMES`."""
    counts = (int(totals[name] or 0) for name in ("completed", "failed", "rejected", "tokensIn", "tokensOut"))
    return (*counts, Decimal(totals["revenueUsd"] or 0))


def _of_jobs(jobs: Iterable[JobView]) -> tuple[Figure, ...]:
    """Return what jobs add up to, by `NAMES`."""
    known = list(jobs)
    counts = (
        sum(job.outcome == outcome for job in known)
        for outcome in (Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED)
    )
    return (
        *counts,
        sum(job.tokens_in or 0 for job in known),
        sum(job.tokens_out or 0 for job in known),
        sum((Decimal(job.price_usd or 0) for job in known), Decimal(0)),
    )
