"""The claim: a durable, authenticated heartbeat costs little more than any POST that uvicorn answers.

One worker of a real `lucid serve` on its embedded Postgres (fsync on), 64 connections, 1,000 nodes, interpreted and
compiled; against a bare uvicorn app that reads the same requests and answers as many bytes. Rounds alternate, so that
the machine's moods fall on all; every answer is held against what Postgres has afterwards.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.fleet_rows import OWNER, plain_nodes, write_fleet
from benchmarks.load import Load, Requests, has_wrk, heartbeat_requests, run_load
from benchmarks.servers import (
    Server,
    bare_server,
    data_folder,
    describe_cores,
    forms,
    lucid_serve,
    postgres_of,
    wait_for_quiet,
)
from lucid_compute.compilation import PYTHON
from lucid_compute.postgres.database import connect

CONNECTIONS = 64
NODES = 1000
ROUNDS = int(os.environ.get("BENCH_ROUNDS", "7"))
ROUND_SECONDS = float(os.environ.get("BENCH_SECONDS", "4"))


class Round(NamedTuple):
    """One round of load on one server, and the processor time that its worker took for each answer."""

    load: Load
    cpu_us: float


class Measured(NamedTuple):
    """A server, and the requests that it is sent."""

    server: Server
    requests: Requests


BARE = "bare uvicorn POST"


def main() -> None:
    """Measure each form of the service, and print the ratios."""
    nodes = plain_nodes(NODES)
    with ExitStack() as stack:
        compiled = forms()
        folders = {form: stack.enter_context(data_folder()) for form in compiled}
        for folder in folders.values():
            with postgres_of(folder) as url:
                asyncio.run(write_fleet(url, nodes, []))
        with ExitStack() as running:
            measured = {
                form: _heartbeats_of(running.enter_context(_serve(folder, compiled[form])), [node.id for node in nodes])
                for form, folder in folders.items()
            }
            first = next(iter(measured.values()))
            size = _size_of_an_answer(first.server, nodes[0].id)
            measured[BARE] = Measured(running.enter_context(bare_server()), _for_bare(first.requests, size))
            rounds = _alternate(measured)
        committed = {}
        for form, folder in folders.items():
            with postgres_of(folder) as url:
                durability, committed[form] = asyncio.run(_look(url))
    _print(rounds, durability, committed)


def _serve(folder: Path, compiled: str) -> AbstractContextManager[Server]:
    return lucid_serve(folder, heartbeat_max_per_second="0", compiled=compiled)


def _heartbeats_of(server: Server, ids: list[str]) -> Measured:
    return Measured(server, heartbeat_requests(ids, server.make_key(OWNER)))


def _alternate(measured: Mapping[str, Measured]) -> list[dict[str, Round]]:
    """Measure each server once a round, after a round that does not count; another one begins each time."""
    names, rounds = list(measured), []
    for number in range(ROUNDS + 1):
        wait_for_quiet()
        first = number % len(names)
        rounds.append({name: _measure(*measured[name], number) for name in names[first:] + names[:first]})
    return rounds[1:]


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


def _print(rounds: list[dict[str, Round]], durability: str, committed: Mapping[str, int]) -> None:
    tool = "wrk" if has_wrk() else "our own generator"
    print(
        f"{CONNECTIONS} connections, {NODES} nodes, load by {tool}; {describe_cores()}; {durability}; Python {PYTHON}"
    )
    print(f"{'':<20}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}{'errors':>8}")
    for name in rounds[0]:
        _print_row(name, [round_[name] for round_ in rounds])
    for form, count in committed.items():
        answered = sum(round_[form].load.requests for round_ in rounds)
        print(f"{form}: {answered:,} heartbeats answered in the rounds; {count:,} in Postgres, the warm-up among them")
        pairs = [(round_[form], round_[BARE]) for round_ in rounds]
        ratios = sorted(ours.load.per_second / bare.load.per_second for ours, bare in pairs)
        print(f"  ratio to bare, requests/s: {median(ratios):.2f} (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")
        ours, bare = max(pairs, key=lambda pair: pair[1].load.per_second)
        print(f"    in the quietest round:   {ours.load.per_second / bare.load.per_second:.2f}")
        print(f"  ratio to bare, by CPU:     {median(bare.cpu_us / ours.cpu_us for ours, bare in pairs):.2f}")


def _print_row(name: str, rounds: list[Round]) -> None:
    figures = [(r.load.per_second, r.load.p50_ms, r.load.p99_ms, r.cpu_us) for r in rounds]
    rate, p50, p99, cpu_us = (median(column) for column in zip(*figures, strict=True))
    print(f"{name:<20}{rate:>12,.0f}{p50:>9.2f}{p99:>9.2f}{cpu_us:>9.1f}{sum(r.load.errors for r in rounds):>8}")


if __name__ == "__main__":
    main()
