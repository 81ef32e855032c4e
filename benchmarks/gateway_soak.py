"""The claim: the gateway's memory, sockets and tasks stay flat over 100,000 requests, whatever clients and nodes do.

A real `lucid serve` before nodes of which one is killed and started again every few seconds, and clients of which some
leave in the middle, do not read, or send 10 MB or nonsense. The worker is looked at once a second from outside. It is
run by name alone (`python -m benchmarks gateway_soak`), since it takes minutes.

BENCH_SOAK_REQUESTS (100000), BENCH_SOAK_CLIENTS (96), BENCH_SOAK_BIG_SHARE (0.001, of requests with 10 MB), and
BENCH_SOAK_SECONDS (240), after which no more is sent.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import linear_regression, median
from threading import Thread
from typing import NamedTuple
from urllib.request import Request, urlopen

from benchmarks.gateway_targets import Target, lucid
from benchmarks.servers import ADMIN_KEY, LOAD_CORE, Server, on_core
from benchmarks.soak_clients import Plan
from benchmarks.soak_nodes import MortalNode, mortal_nodes

REQUESTS = int(os.environ.get("BENCH_SOAK_REQUESTS", "100000"))
CLIENTS = int(os.environ.get("BENCH_SOAK_CLIENTS", "96"))
BIG_SHARE = float(os.environ.get("BENCH_SOAK_BIG_SHARE", "0.001"))
SECONDS = float(os.environ.get("BENCH_SOAK_SECONDS", "240"))
NODES = 3
KILL_EVERY, DEAD_FOR = 6, 2  # seconds
COOL_SECONDS = 75  # idle connections to nodes are closed after 60
FLAT_SHARE = 0.03  # of the memory after the warm-up: by how much it may grow until the end
_SHOWN = 20


class Look(NamedTuple):
    """What the worker held at one instant."""

    second: float
    requests: int
    memory_mb: float
    files: int
    tasks: int


def main() -> None:
    """Soak, print what was held over time, and say whether that is flat."""
    with mortal_nodes(NODES) as nodes, lucid([node.port for node in nodes]) as target:
        server = target.processes[0]
        _look(server, 0.0, 0)  # the first look makes what it needs, and that is not to be counted
        before = _look(server, 0.0, 0)
        looks, outcomes = _soak(server, target, nodes)
        cooled = _cool_down(server, before)
    print(f"{sum(outcomes.values()):,} requests in {looks[-1].second:.0f} s, {CLIENTS} clients at a time")
    for outcome, count in outcomes.most_common():
        print(f"  {count:>8,} {outcome}")
    _print_looks(before, looks, cooled)
    _print_verdict(before, looks, cooled)


def _soak(server: Server, target: Target, nodes: Sequence[MortalNode]) -> tuple[list[Look], Counter[str]]:
    """Look at the worker once a second, and let nodes die, until every request has been sent."""
    looks: list[Look] = []
    outcomes: Counter[str] = Counter()
    plan = Plan(target.ports[0], target.key, REQUESTS, CLIENTS, BIG_SHARE)
    began = time.monotonic()
    with _clients(plan, outcomes) as clients:
        for second in range(int(SECONDS)):
            node = nodes[second // KILL_EVERY % len(nodes)]
            if second % KILL_EVERY == KILL_EVERY - 1:
                node.kill()
            for other in nodes:
                if not other.is_alive and second % KILL_EVERY == DEAD_FOR - 1:
                    other.start()
            time.sleep(max(0.0, began + second + 1 - time.monotonic()))
            looks.append(_look(server, time.monotonic() - began, sum(outcomes.values())))
            if clients.poll() is not None:
                break
    return looks, outcomes


@contextmanager
def _clients(plan: Plan, outcomes: Counter[str]) -> Iterator[subprocess.Popen[str]]:
    """Run the clients; `outcomes` is kept up to date with what they say."""
    command = [sys.executable, "-m", "benchmarks.soak_clients"]
    with on_core(LOAD_CORE):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin
    assert process.stdout
    process.stdin.write(json.dumps(plan._asdict()))
    process.stdin.close()
    lines = process.stdout

    def listen() -> None:
        for line in lines:
            outcomes.update({name: count - outcomes[name] for name, count in json.loads(line).items()})

    listener = Thread(target=listen)
    listener.start()
    try:
        yield process
    finally:
        process.terminate()
        process.wait()
        listener.join()
        lines.close()


def _cool_down(server: Server, before: Look) -> Look:
    """Return what is held after the load, once it is no more than before, or after about a minute."""
    deadline = time.monotonic() + COOL_SECONDS
    while True:
        time.sleep(1)
        look = _look(server, 0.0, 0)
        if (look.files <= before.files and look.tasks <= before.tasks) or time.monotonic() > deadline:
            return look


def _look(server: Server, second: float, requests: int) -> Look:
    files = sum(1 for _ in Path(f"/proc/{server.worker_pid}/fd").iterdir())
    url = f"http://127.0.0.1:{server.port}/metrics"
    with urlopen(Request(url, headers={"Authorization": f"Bearer {ADMIN_KEY}"}), timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    tasks = next(float(line.split()[1]) for line in lines if line.startswith("lucid_loop_tasks "))
    return Look(second, requests, server.memory_mb(), files, int(tasks))


def _print_looks(before: Look, looks: Sequence[Look], cooled: Look) -> None:
    print(f"{'second':>8}{'requests':>10}{'RSS MB':>9}{'files':>7}{'tasks':>7}")
    step = max(1, len(looks) // _SHOWN)
    for look in [before, *looks[step - 1 :: step]]:
        print(f"{look.second:>8.0f}{look.requests:>10,}{look.memory_mb:>9.1f}{look.files:>7}{look.tasks:>7}")
    print(f"{'after':>8}{'':>10}{cooled.memory_mb:>9.1f}{cooled.files:>7}{cooled.tasks:>7}")


def _print_verdict(before: Look, looks: Sequence[Look], cooled: Look) -> None:
    """Compare the last quarter with the second, by medians: the first one fills pools and caches."""
    quarter = max(1, len(looks) // 4)
    second, last = looks[quarter : 2 * quarter], looks[-quarter:]
    second_mb, last_mb = (median(look.memory_mb for look in part) for part in (second, last))
    settled = looks[quarter:]
    slope = linear_regression([look.requests for look in settled], [look.memory_mb for look in settled]).slope
    print(f"RSS, median of the second quarter and of the last: {second_mb:.1f} and {last_mb:.1f} MB")
    print(f"RSS, slope from the second quarter on: {slope * 10_000:+.2f} MB for 10,000 requests")
    print(f"files {before.files} before and {cooled.files} after; tasks {before.tasks} before and {cooled.tasks} after")
    is_flat = last_mb <= second_mb * (1 + FLAT_SHARE)
    is_clean = cooled.files <= before.files and cooled.tasks <= before.tasks
    print("memory is flat" if is_flat else "MEMORY IS NOT FLAT")
    print("no socket and no task is left over" if is_clean else "SOCKETS OR TASKS ARE LEFT OVER")


if __name__ == "__main__":
    main()
