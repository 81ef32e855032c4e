"""An open-loop generator: requests at fixed instants, whether or not the previous ones have ended.

Latencies count from the scheduled instant, so a server that stalls is charged for everyone who came meanwhile: those
wait for one of the connections, in their order. Run by `benchmarks.gateway_overload`, which writes a `Schedule` to its
standard input as JSON and reads what was found as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter, deque
from typing import Any, NamedTuple, cast

import uvloop

from benchmarks.gateway_load import find_body

WAIT_SECONDS = 10.0  # for the last answers, after which they count as timed out
TICK_SECONDS = 0.001
_END = b"}"  # of every answer that is looked for


class Schedule(NamedTuple):
    """`request`, so many times a second for so many seconds, over so many connections."""

    port: int
    request: str
    per_second: float
    seconds: float
    connections: int


class Found(NamedTuple):
    """What became of the requests: how many were accepted, how many refused (429, 503), and the latencies of each.

    `in_time` of those accepted were answered before the schedule's end.
    """

    in_time: int
    accepted: int
    refused: int
    others: dict[str, int]
    accepted_p50_ms: float
    accepted_p99_ms: float
    refused_p50_ms: float
    refused_p99_ms: float
    late_p99_ms: float  # how long after its instant a request was sent, for want of a connection, or of the generator


class Load:
    """The requests of one schedule."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.request = schedule.request.encode()
        self.idle: list[Connection] = []
        self.waiting: deque[float] = deque()
        self.in_time = 0
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.others: Counter[str] = Counter()
        self.late: list[float] = []
        self.under_way = 0

    async def run(self) -> Found:
        """Send everything at its instant, or as soon as there is a connection for it."""
        schedule, loop = self.schedule, asyncio.get_running_loop()
        for _ in range(schedule.connections):
            self.idle.append((await loop.create_connection(lambda: Connection(self), "127.0.0.1", schedule.port))[1])
        began, sent = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < schedule.seconds:
            for number in range(sent, int(passed * schedule.per_second)):
                self.waiting.append(began + number / schedule.per_second)
                sent = number + 1
            while self.waiting and self.idle:
                self.idle.pop().send(self.waiting.popleft())
            await asyncio.sleep(TICK_SECONDS)
        self.in_time = len(self.accepted)
        self.others["still waiting at the end"] += len(self.waiting)
        self.waiting.clear()
        ends_at = time.perf_counter() + WAIT_SECONDS
        while self.under_way and time.perf_counter() < ends_at:  # noqa: ASYNC110 - once, at the end
            await asyncio.sleep(0.01)
        self.others["timed out"] += self.under_way
        return self._found()

    def count(self, due_at: float, status: bytes) -> None:
        """Count one answer."""
        self.under_way -= 1
        if status == b"200":
            self.accepted.append(time.perf_counter() - due_at)
        elif status in {b"429", b"503"}:
            self.refused.append(time.perf_counter() - due_at)
        else:
            self.others[status.decode(errors="replace")] += 1

    def _found(self) -> Found:
        return Found(
            self.in_time,
            len(self.accepted),
            len(self.refused),
            {name: count for name, count in self.others.items() if count},
            accepted_p50_ms=_percentile(self.accepted, 0.5),
            accepted_p99_ms=_percentile(self.accepted, 0.99),
            refused_p50_ms=_percentile(self.refused, 0.5),
            refused_p99_ms=_percentile(self.refused, 0.99),
            late_p99_ms=_percentile(self.late, 0.99),
        )


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._answer = b""
        self._due_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to send."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass of it

    def send(self, due_at: float) -> None:
        """Send the request that was due at this instant."""
        self._due_at = due_at
        self._load.under_way += 1
        self._load.late.append(time.perf_counter() - due_at)
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        """Take in an answer, or a part of one."""
        if self._answer or not data.endswith(_END):  # one that came whole needs no closer look
            data = self._answer = self._answer + data
            if find_body(data) is None:
                return
            self._answer = b""
        self._load.count(self._due_at, data[9:12])
        self._due_at = 0.0
        if self._load.waiting:
            self.send(self._load.waiting.popleft())
        else:
            self._load.idle.append(self)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Count an answer that will not come, and be used no more."""
        if self._due_at:
            self._load.count(self._due_at, b"connection lost")
        elif self in self._load.idle:
            self._load.idle.remove(self)


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values) or [float("nan")]
    return ordered[int(len(ordered) * share)] * 1000


def main() -> None:
    """Read the schedule from standard input, and print what was found."""
    schedule: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(uvloop.run(Load(Schedule(**schedule)).run())._asdict()))


if __name__ == "__main__":
    main()
