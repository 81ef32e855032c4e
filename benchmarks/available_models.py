"""The claim: `GET /models?available=true` costs the same over 50,000 nodes as over 500.

A real `lucid serve` answers it over HTTP with 50,000 nodes of 2,000 kinds, and in turn another one with 500 of the same
kinds; both have the same 1,000 models, half of them unavailable, and no answer is cached. Heartbeats arrive meanwhile:
as many a second on both, so that only the fleet's size differs, and on the small one also as few as 500 nodes send.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.fleet_rows import OWNER, NodeRow, refresh, write_fleet
from benchmarks.fleet_shapes import KINDS, MODELS, models, nodes_of_many_kinds
from benchmarks.load import Load, get_requests, heartbeat_requests, run_load, steady_load
from benchmarks.servers import Server, data_folder, describe_cores, lucid_serve, postgres_of, wait_for_quiet

LARGE, SMALL = 50_000, 500
HEARTBEAT_SECONDS = 9.0
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "5"))
ROUND_SECONDS = float(os.environ.get("BENCH_SECONDS", "5"))
WARM_UP_SECONDS = 3.0
READ = get_requests(["/models?available=true"])


class Fleet(NamedTuple):
    """Nodes in a Postgres whose data is in `folder`."""

    folder: Path
    nodes: list[NodeRow]

    @property
    def own_rate(self) -> float:
        """Return how many heartbeats a second so many nodes send."""
        return len(self.nodes) / HEARTBEAT_SECONDS


class Visit(NamedTuple):
    """One start of the service on a fleet: what it was like, and reads and heartbeats at each rate of these."""

    start_seconds: float
    memory_mb: float
    available: int
    reads: list[Load]
    beats: list[Load]


def main() -> None:
    """Measure, and print the ratios."""
    with ExitStack() as stack:
        large, small = (_write(stack.enter_context(data_folder()), size) for size in (LARGE, SMALL))
        visits = [
            (_visit(large, [large.own_rate], number), _visit(small, [large.own_rate, small.own_rate], number))
            for number in range(ROUNDS)
        ]
    print(f"GET /models?available=true, 1 connection, {KINDS:,} kinds, {MODELS:,} models; {describe_cores()}")
    for fleet, of_fleet in zip((large, small), zip(*visits, strict=True), strict=True):
        _describe(fleet, list(of_fleet))
    print(f"{'nodes':>8}{'heartbeats/s':>14}{'median ms':>11}{'p99 ms':>9}{'errors':>8}{'of heartbeats':>15}")
    _print_row(large, [visit for visit, _ in visits], 0)
    for position in (0, 1):
        _print_row(small, [visit for _, visit in visits], position)
        ratios = [a.reads[0].p50_ms / b.reads[position].p50_ms for a, b in visits]
        print(f"  50,000 nodes cost {median(ratios):.2f} times that (rounds {min(ratios):.2f} to {max(ratios):.2f})")


def _write(folder: Path, size: int) -> Fleet:
    nodes = nodes_of_many_kinds(size)
    with postgres_of(folder) as url:
        asyncio.run(write_fleet(url, nodes, models()))
    return Fleet(folder, nodes)


def _visit(fleet: Fleet, rates: list[float], number: int) -> Visit:
    """Start the service on the fleet, as if all its nodes had just been heard, and measure."""
    wait_for_quiet()
    with postgres_of(fleet.folder) as url:
        asyncio.run(refresh(url))
    with lucid_serve(fleet.folder, heartbeat_max_per_second="0") as server:
        key = server.make_key(OWNER)
        found = [
            _measure(server, fleet, key, rate, number * len(rates) + position) for position, rate in enumerate(rates)
        ]
        available = server.call("GET", "/models?available=true")["pagination"]["total"]
        reads, beats = [read for read, _ in found], [beat for _, beat in found]
        return Visit(server.start_seconds, server.memory_mb(), available, reads, beats)


def _measure(server: Server, fleet: Fleet, key: str, rate: float, round_: int) -> tuple[Load, Load]:
    requests = heartbeat_requests([node.id for node in fleet.nodes], key)
    with steady_load(server.port, requests, per_second=rate, round_=round_) as beats:
        run_load(server.port, READ, connections=1, seconds=WARM_UP_SECONDS)
        reads = run_load(server.port, READ, connections=1, seconds=ROUND_SECONDS)
    return reads, beats[0]


def _describe(fleet: Fleet, visits: list[Visit]) -> None:
    print(
        f"{len(fleet.nodes):>8,} nodes: ready {median(visit.start_seconds for visit in visits):.1f} s after the start, "
        f"worker {median(visit.memory_mb for visit in visits):.0f} MB, "
        f"{visits[-1].available} of {MODELS} models available"
    )


def _print_row(fleet: Fleet, visits: list[Visit], position: int) -> None:
    reads, beats = [visit.reads[position] for visit in visits], [visit.beats[position] for visit in visits]
    p50, p99 = median(load.p50_ms for load in reads), median(load.p99_ms for load in reads)
    rate = median(load.per_second for load in beats)
    refused = f"{sum(load.errors for load in beats)}/{sum(load.requests for load in beats)}"
    errors = sum(load.errors for load in reads)
    print(f"{len(fleet.nodes):>8,}{rate:>14,.0f}{p50:>11.2f}{p99:>9.2f}{errors:>8}{refused:>15}")


if __name__ == "__main__":
    main()
