"""The claim: a durable, authenticated heartbeat costs little more than any POST that uvicorn answers.

One worker of a real `lucid serve` on its embedded Postgres (fsync on), 64 connections, 1,000 nodes; against a bare
uvicorn app that reads the same requests and answers as many bytes. Rounds alternate, so that the machine's moods fall
on both; every answer is held against what Postgres has afterwards.
"""

from __future__ import annotations

import asyncio
import os
from statistics import median
from typing import NamedTuple

from benchmarks.fleet_rows import OWNER, plain_nodes, write_fleet
from benchmarks.load import Load, Requests, has_wrk, heartbeat_requests, run_load
from benchmarks.servers import (
    Server,
    bare_server,
    data_folder,
    describe_cores,
    lucid_serve,
    postgres_of,
    wait_for_quiet,
)
from lucid_compute.postgres.database import connect

CONNECTIONS = 64
NODES = 1000
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))
ROUND_SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))


class Round(NamedTuple):
    """One round of load on one server, and the processor time that its worker took for each answer."""

    load: Load
    cpu_us: float


def main() -> None:
    """Measure, and print the ratio."""
    nodes = plain_nodes(NODES)
    with data_folder() as folder:
        with postgres_of(folder) as url:
            asyncio.run(write_fleet(url, nodes, []))
        with lucid_serve(folder, heartbeat_max_per_second="0") as lucid, bare_server() as bare:
            ids = [node.id for node in nodes]
            requests = heartbeat_requests(ids, lucid.make_key(OWNER))
            size = _size_of_an_answer(lucid, ids[0])
            rounds = _alternate(lucid, requests, bare, _for_bare(requests, size))
        with postgres_of(folder) as url:
            durability, committed = asyncio.run(_look(url))
    _print(rounds, durability, committed)


def _alternate(lucid: Server, requests: Requests, bare: Server, for_bare: Requests) -> list[tuple[Round, Round]]:
    _measure(lucid, requests, 0)
    _measure(bare, for_bare, 0)
    rounds = []
    for number in range(1, ROUNDS + 1):
        wait_for_quiet()
        rounds.append((_measure(lucid, requests, number), _measure(bare, for_bare, number)))
    return rounds


def _measure(server: Server, requests: Requests, number: int) -> Round:
    before = server.cpu_seconds()
    load = run_load(server.port, requests, connections=CONNECTIONS, seconds=ROUND_SECONDS, round_=number)
    return Round(load, (server.cpu_seconds() - before) / load.requests * 1e6)


def _size_of_an_answer(lucid: Server, passport_id: str) -> int:
    beat = {"passportId": passport_id, "status": "healthy", "load": 0.42, "availableModels": [], "queueDepth": 3}
    return len(str(lucid.call("POST", "/compute/heartbeat", beat)).replace(" ", ""))


def _for_bare(requests: Requests, size: int) -> Requests:
    return requests._replace(heads=[head.replace("/compute/heartbeat", f"/{size}", 1) for head in requests.heads])


async def _look(url: str) -> tuple[str, int]:
    """Return Postgres's setting of durability, and how many heartbeats it has committed."""
    connection = await connect(url)
    try:
        names = ("fsync", "synchronous_commit", "full_page_writes")
        durability = ", ".join([f"{name} {await connection.fetchval(f'SHOW {name}')}" for name in names])
        return durability, int(await connection.fetchval("SELECT sum(revision) - count(*) FROM heartbeats"))
    finally:
        await connection.close()


def _print(rounds: list[tuple[Round, Round]], durability: str, committed: int) -> None:
    tool = "wrk" if has_wrk() else "our own generator"
    print(f"{CONNECTIONS} connections, {NODES} nodes, load by {tool}; {describe_cores()}; {durability}")
    print(f"{'':<20}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}{'errors':>8}")
    _print_row("lucid heartbeat", [ours for ours, _ in rounds])
    _print_row("bare uvicorn POST", [bare for _, bare in rounds])
    answered = sum(ours.load.requests for ours, _ in rounds)
    print(f"{answered:,} heartbeats answered in the rounds; {committed:,} in Postgres, the warm-up among them")
    ratios = sorted(ours.load.per_second / bare.load.per_second for ours, bare in rounds)
    print(f"ratio to bare, requests/s: {median(ratios):.2f} (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")
    quietest = max(rounds, key=lambda pair: pair[1].load.per_second)
    print(f"  in the quietest round:   {quietest[0].load.per_second / quietest[1].load.per_second:.2f}")
    print(f"ratio to bare, by CPU:     {median(bare.cpu_us / ours.cpu_us for ours, bare in rounds):.2f}")


def _print_row(name: str, rounds: list[Round]) -> None:
    figures = [(r.load.per_second, r.load.p50_ms, r.load.p99_ms, r.cpu_us) for r in rounds]
    rate, p50, p99, cpu_us = (median(column) for column in zip(*figures, strict=True))
    print(f"{name:<20}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{cpu_us:>9.1f}{sum(r.load.errors for r in rounds):>8}")


if __name__ == "__main__":
    main()
