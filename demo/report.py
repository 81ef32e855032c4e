"""The demo's texts beside its timeline: where to look while it runs, and the final comparison of all counts."""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from demo.clients import REFUSED_BY_NODE, TOO_LARGE, Counts
from demo.llama_cpp import MODEL
from demo.scenario import Network
from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.shapes import JobView

SERIES = ("completed", "failed", "rejected", "tokensIn", "tokensOut", "revenueUsd", "latencyP50Ms", "latencyP99Ms")
NAMES = (
    "requests answered",
    "attempts that failed",
    "refused by a node",
    "tokens read",
    "tokens written",
    "revenue, USD",
)
SETTLE_SECONDS = 5.0  # a job is listed some hundredths of a second after its end
POLL_SECONDS = 0.2
QUESTION = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}
Figure = int | Decimal | None


def introduction(network: Network, data_dir: Path) -> str:
    """Return addresses, keys, and commands to paste into another terminal."""
    url, reader, guest = network.url, network.reader, network.guest
    folder = Path(sys.executable).parent
    folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
    lucid = shlex.quote(str(folder / "lucid"))
    return f"""
  the service    {url}, its calls at {url}/docs
  the dashboard  {url}/dashboard
  a key to look  {reader.key}   (may read, and see the nodes of {reader.owner})
  a key to ask   {guest.key}   (may ask for inference)

  In another terminal, in this folder:

    export LUCID_API_URL={url} LUCID_DATA_DIR={shlex.quote(str(data_dir))}
    {lucid} nodes --watch
    {lucid} models
    {lucid} jobs --limit 10
    {lucid} match {MODEL}
    {lucid} events {network.nodes[0].name}
    curl -s $LUCID_API_URL/models/{TOO_LARGE}/availability -H "Authorization: Bearer {reader.key}"
    curl -s $LUCID_API_URL/v1/chat/completions -H "Authorization: Bearer {guest.key}" \\
      -d '{json.dumps(QUESTION)}'
"""


class Row(NamedTuple):
    """One figure as counted by clients, as the ledger has it for their keys and for all keys, and by the metrics."""

    name: str
    clients: Figure
    their_jobs: Figure
    all_jobs: Figure
    metrics: Figure

    @property
    def agrees(self) -> bool:
        """Return whether clients agree with their jobs, and all jobs with the metrics."""
        return (self.clients is None or self.clients == self.their_jobs) and self.all_jobs == self.metrics


class Report(NamedTuple):
    """The comparison of all counts. Latencies are in milliseconds."""

    counts: Counts
    rows: Sequence[Row]
    p50_ms: float
    p99_ms: float

    @property
    def reconciles(self) -> bool:
        """Return whether all rows agree."""
        return all(row.agrees for row in self.rows)

    def text(self) -> str:
        """Return the report as text."""
        counts = self.counts
        heads = ("", "clients", "their jobs", "all jobs", "metrics")
        cells = [("-" if cell is None else f"{cell:,}" for cell in row[1:]) for row in self.rows]
        lines = [_line(*heads), *(_line(row.name, *cell) for row, cell in zip(self.rows, cells, strict=True))]
        differing = ", ".join(row.name for row in self.rows if not row.agrees)
        verdict = f"THEY DO NOT RECONCILE: {differing}" if differing else "Clients, job ledger and metrics reconcile."
        refused = ", ".join(f"{count:,} x {how}" for how, count in sorted(counts.refused.items()))
        errors = "; ".join(f"{count} x {error}" for error, count in counts.errors.most_common(5))
        cut = f"{counts.cut} (their clients were told, and nothing was sent twice)" if counts.cut else "none"
        return "\n".join(
            (
                "",
                *lines,
                "",
                f"  {verdict}",
                f"  errors seen by clients      {errors or 'none'}",
                f"  streams cut half-way        {cut}",
                f"  saved by another node       {counts.rescued}",
                f"  refused, as they should be  {refused or 'none'}",
                f"  time to answer              p50 {self.p50_ms:.1f} ms, p99 {self.p99_ms:.1f} ms",
            )
        )


async def compare(network: Network, counts: Counts, since: datetime) -> Report:
    """Read ledger and metrics until all counts agree, at most SETTLE_SECONDS; no client sends requests any more."""
    async with network.lucid() as lucid:
        await lucid.keys.revoke(network.guest.id)
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        report = await _read(network, counts, since)
        if report.reconciles or time.monotonic() > deadline:
            return report
        await asyncio.sleep(POLL_SECONDS)


async def _read(network: Network, counts: Counts, since: datetime) -> Report:
    async with network.lucid() as lucid:
        jobs = [job async for job in lucid.compute.jobs(since=since)]
        totals = (await lucid.metrics.fleet(from_=since, series=SERIES)).totals
    keys = {key.id for key in network.consumers.values()}
    # The client of a cut stream can't know how many tokens it had.
    tokens = (None, None) if counts.cut else (counts.tokens_in, counts.tokens_out)
    clients: tuple[Figure, ...] = (
        counts.answered,
        counts.failed_attempts,
        counts.refused[REFUSED_BY_NODE],
        *tokens,
        None,
    )
    metrics: tuple[Figure, ...] = (*(int(totals[name] or 0) for name in SERIES[:5]), Decimal(totals["revenueUsd"] or 0))
    rows = map(Row, NAMES, clients, _sums([job for job in jobs if job.key_id in keys]), _sums(jobs), metrics)
    return Report(counts, list(rows), float(totals["latencyP50Ms"] or 0), float(totals["latencyP99Ms"] or 0))


def _sums(jobs: Sequence[JobView]) -> tuple[Figure, ...]:
    """Return the sums over jobs, in the order of NAMES."""
    outcomes = (Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED)
    return (
        *(sum(job.outcome == outcome for job in jobs) for outcome in outcomes),
        sum(job.tokens_in or 0 for job in jobs),
        sum(job.tokens_out or 0 for job in jobs),
        sum((Decimal(job.price_usd or 0) for job in jobs), Decimal(0)),
    )


def _line(name: str, *cells: str) -> str:
    return "  " + f"{name:<22}" + "".join(f"{cell:>13}" for cell in cells)
