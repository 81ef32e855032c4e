"""Kills a real `lucid serve` and its Postgres at random instants, and looks for every acknowledged heartbeat after.

By hand: `python -m tests.kill_harness --app-kills 200 --postgres-kills 50`. It exits 1 when a heartbeat was lost, or a
client saw anything but 200, 503 with Retry-After, and broken connections.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import TypeVar
from uuid import uuid4

import httpx

from lucid_compute.postgres.database import connect
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, serving

Found = TypeVar("Found")

NODES = 24
PAUSE_SECONDS = 0.005  # between an answer and the node's next heartbeat
RECOVERY_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.002
CALM_SECONDS = (0.05, 0.6)  # heartbeats run for so long before the next kill


@dataclass
class SimulatedNode:
    """A node that beats with a boot id of its own and a growing sequence, and remembers what was acknowledged."""

    passport_id: str
    boot_id: str = field(default_factory=lambda: uuid4().hex)
    sequence: int = 0
    acknowledged: int = 0

    def next_heartbeat(self) -> dict[str, object]:
        """Return the next heartbeat's body."""
        self.sequence += 1
        return {
            "passportId": self.passport_id,
            "status": "healthy",
            "load": 0.5,
            "availableModels": [],
            "queueDepth": 0,
            "bootId": self.boot_id,
            "sequence": self.sequence,
        }


@dataclass
class Figures:
    """What came of it. Recovery after an app's or a worker's kill counts from the kill, after Postgres's from ready."""

    acknowledged: int = 0
    lost: int = 0
    checked: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    forbidden: list[str] = field(default_factory=list)
    recoveries: dict[str, list[float]] = field(default_factory=lambda: {"app": [], "worker": [], "postgres": []})

    def lines(self) -> list[str]:
        """Return the figures for a person."""
        lines = [
            f"acknowledged {self.acknowledged}, lost {self.lost} (in {self.checked} readings back)",
            f"answers {dict(self.seen)}, forbidden {len(self.forbidden)} {self.forbidden[:3]}",
        ]
        for kind, seconds in self.recoveries.items():
            if seconds:
                figures = f"median {median(seconds):.2f} s, max {max(seconds):.2f} s"
                lines.append(f"{len(seconds)} kills of the {kind}: first 200 after {figures}")
        return lines


class KillHarness:
    """Nodes that beat without end, and a hand that kills what serves them."""

    def __init__(self, served: Served, seed: int) -> None:
        """Torment `served`, a running service on its embedded Postgres; `seed` fixes the pauses between kills."""
        self._served = served
        self._random = random.Random(seed)
        self._nodes: list[SimulatedNode] = []
        self._last_success_sent_at = 0.0
        self.figures = Figures()

    @asynccontextmanager
    async def beating(self, nodes: int = NODES) -> AsyncIterator[None]:
        """Register the nodes, and let them beat for as long as the block runs."""
        async with self._served.client() as client:
            self._nodes = [SimulatedNode(await _register(client, f"node {number}")) for number in range(nodes)]
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._beat(node)) for node in self._nodes]
            yield
            for task in tasks:
                task.cancel()
        await self._read_back()

    async def kill_app(self) -> None:
        """SIGKILL the outermost process, start the service again at once, and read back."""
        await self._calm()
        killed_at = time.monotonic()
        await asyncio.to_thread(self._served.kill)
        self._served.start()
        await asyncio.to_thread(self._served.wait_until_listening)
        self._note("app", await self._first_success_after(killed_at) - killed_at)
        await self._read_back()

    async def kill_worker(self) -> None:
        """SIGKILL the worker, which the service has to replace by itself, and read back."""
        await self._calm()
        (worker,) = await self._wait_for(self._served.workers)
        killed_at = time.monotonic()
        os.kill(worker, signal.SIGKILL)
        self._note("worker", await self._first_success_after(killed_at) - killed_at)
        await self._read_back()

    async def kill_postgres(self) -> None:
        """SIGKILL the postmaster, which the service has to start again by itself, and read back."""
        await self._calm()
        postmaster = await self._wait_for(self._served.ready_postmaster)
        killed_at = time.monotonic()
        os.kill(postmaster, signal.SIGKILL)
        await self._wait_for(lambda: self._served.ready_postmaster() not in {None, postmaster})
        ready_at = time.monotonic()
        self._note("postgres", max(await self._first_success_after(killed_at) - ready_at, 0.0))
        await self._read_back()

    async def _beat(self, node: SimulatedNode) -> None:
        """Beat without end, whatever the answers; any but those that are allowed is noted."""
        async with self._served.client(timeout_seconds=10.0) as client:
            while True:
                body, sent_at = node.next_heartbeat(), time.monotonic()
                try:
                    answer = await client.post(f"{self._served.url}/compute/heartbeat", json=body)
                except httpx.TransportError as error:
                    self.figures.seen["broken connection"] += 1
                    if isinstance(error, httpx.TimeoutException):
                        self.figures.forbidden.append(repr(error))
                    await asyncio.sleep(0.02)
                else:
                    self._judge(node, body, answer, sent_at)
                    await asyncio.sleep(PAUSE_SECONDS if answer.is_success else 0.02)

    def _judge(self, node: SimulatedNode, body: dict[str, object], answer: httpx.Response, sent_at: float) -> None:
        self.figures.seen[str(answer.status_code)] += 1
        if answer.status_code == httpx.codes.OK:
            node.acknowledged = max(node.acknowledged, int(str(body["sequence"])))
            self.figures.acknowledged += 1
            self._last_success_sent_at = max(self._last_success_sent_at, sent_at)
        elif answer.status_code != httpx.codes.SERVICE_UNAVAILABLE or "retry-after" not in answer.headers:
            self.figures.forbidden.append(f"{answer.status_code} {answer.text[:200]}")

    async def _calm(self) -> None:
        await asyncio.sleep(self._random.uniform(*CALM_SECONDS))

    async def _first_success_after(self, killed_at: float) -> float:
        """Return when a heartbeat that was sent after `killed_at` was acknowledged."""
        await self._wait_for(lambda: self._last_success_sent_at > killed_at)
        return time.monotonic()

    async def _read_back(self) -> None:
        """Count every node whose row in Postgres is older than what was acknowledged before it was read."""
        acknowledged = {node.passport_id: node.acknowledged for node in self._nodes}
        connection = await connect(self._served.database_url, application="kill harness")
        try:
            rows = await connection.fetch("SELECT passport_id::text, sequence FROM heartbeats")
        finally:
            await connection.close()
        held = {row["passport_id"]: row["sequence"] or 0 for row in rows}
        self.figures.checked += len(acknowledged)
        self.figures.lost += sum(held.get(passport_id, 0) < sequence for passport_id, sequence in acknowledged.items())

    def _note(self, kind: str, seconds: float) -> None:
        self.figures.recoveries[kind].append(seconds)

    async def _wait_for(self, find: Callable[[], Found | None]) -> Found:
        """Return what is found once it is there."""
        deadline = time.monotonic() + RECOVERY_TIMEOUT_SECONDS
        while not (found := find()):
            assert time.monotonic() < deadline, f"waited {RECOVERY_TIMEOUT_SECONDS} s in vain; {self._served.log}"
            await asyncio.sleep(POLL_SECONDS)
        return found


async def torment(
    served: Served,
    *,
    app_kills: int,
    postgres_kills: int,
    worker_kills: int,
    seed: int = 1,
    deadline: float = float("inf"),
) -> Figures:
    """Kill so often, in turn, and return what came of it; `deadline` is of the monotonic clock."""
    harness = KillHarness(served, seed)
    kills = [harness.kill_app] * app_kills + [harness.kill_postgres] * postgres_kills
    kills += [harness.kill_worker] * worker_kills
    random.Random(seed).shuffle(kills)
    async with harness.beating():
        for number, kill in enumerate(kills, start=1):
            if time.monotonic() > deadline:
                print(f"out of time after {number - 1} of {len(kills)} kills")  # noqa: T201 - said to who runs it
                break
            await kill()
            if number % 25 == 0:
                print(f"{number} kills:", "; ".join(harness.figures.lines()), flush=True)  # noqa: T201 - said to who runs it
    return harness.figures


async def _register(client: httpx.AsyncClient, name: str) -> str:
    answer = await client.post("/passports", json={**GUIDE_PASSPORT, "name": name})
    answer.raise_for_status()
    return str(answer.json()["id"])


def main() -> int:
    """Run it by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--app-kills", type=int, default=200)
    parser.add_argument("--postgres-kills", type=int, default=50)
    parser.add_argument("--worker-kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--max-minutes", type=float, default=60.0)
    wanted = parser.parse_args()
    figures = Figures()
    with suppress(KeyboardInterrupt), serving(HEARTBEAT_MAX_PER_SECOND="0", LOG_LEVEL="ERROR") as served:
        figures = asyncio.run(
            torment(
                served,
                app_kills=wanted.app_kills,
                postgres_kills=wanted.postgres_kills,
                worker_kills=wanted.worker_kills,
                seed=wanted.seed,
                deadline=time.monotonic() + wanted.max_minutes * 60,
            )
        )
    print("\n".join(figures.lines()))  # noqa: T201 - said to who runs it
    return 1 if figures.lost or figures.forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
