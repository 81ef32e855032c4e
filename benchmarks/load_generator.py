"""A load generator in one process: raw sockets on uvloop, prepared bytes, responses parsed no further than needed.

Run by `benchmarks.load`. Measured on a core of its own, it keeps the bare app as busy as wrk does (55,000 requests/s).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import uvloop

_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length: "


class Tally:
    """What was sent and answered, shared by every connection."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.heads: list[bytes] = [head.encode() for head in spec["heads"]]
        self.tail: bytes = spec["tail"].encode()
        self.sequence: int = spec["first"]
        self.position = 0
        self.latencies: list[float] = []
        self.errors = 0
        self.is_over = False

    def next_request(self) -> bytes:
        """Return the bytes of the next request."""
        head = self.heads[self.position]
        self.position = (self.position + 1) % len(self.heads)
        if not self.tail:
            return head
        self.sequence += 1
        return b"%b%d%b" % (head, self.sequence, self.tail)


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, tally: Tally, *, loops: bool) -> None:
        """`loops`: send the next request when the last is answered."""
        self._tally = tally
        self._loops = loops
        self._buffer = b""
        self._sent_at = 0.0
        self.is_busy = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass of it
        if self._loops:
            self.send()

    def send(self) -> None:
        """Send the next request."""
        self.is_busy = True
        self._sent_at = time.perf_counter()
        self._transport.write(self._tally.next_request())

    def data_received(self, data: bytes) -> None:
        """Take in an answer, or a part of one."""
        buffer = self._buffer = self._buffer + data if self._buffer else data
        end = buffer.find(_HEAD_END)
        if end < 0:
            return
        at = buffer.find(_LENGTH) + len(_LENGTH)
        if len(buffer) < end + len(_HEAD_END) + int(buffer[at : buffer.index(b"\r", at)]):
            return
        self._tally.latencies.append(time.perf_counter() - self._sent_at)
        self._tally.errors += not buffer.startswith(b"HTTP/1.1 200")
        self._buffer = b""
        self.is_busy = False
        if self._loops and not self._tally.is_over:
            self.send()

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Count an answer that will not come."""
        self._tally.errors += self.is_busy


async def run(spec: dict[str, Any], connections: int, seconds: float, rate: float) -> dict[str, float]:
    """Send the load; return what was found."""
    loop, tally = asyncio.get_running_loop(), Tally(spec)
    made = [
        (await loop.create_connection(lambda: Connection(tally, loops=not rate), "127.0.0.1", spec["port"]))[1]
        for _ in range(connections)
    ]
    began = time.perf_counter()
    if rate:
        await _pace(made, rate)
    else:
        await asyncio.sleep(seconds)
    took = time.perf_counter() - began
    requests = len(tally.latencies)
    tally.is_over = True
    await asyncio.sleep(0.2)
    ordered = sorted(tally.latencies) or [float("nan")]
    p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
    return {"requests": requests, "seconds": took, "errors": tally.errors, "p50_ms": p50, "p99_ms": p99}


async def _pace(connections: list[Connection], rate: float) -> None:
    """Send `rate` requests a second over whichever connections are idle, until standard input is closed."""
    loop = asyncio.get_running_loop()
    closed = asyncio.ensure_future(loop.run_in_executor(None, sys.stdin.read))
    began, sent, turn = time.perf_counter(), 0, 0
    while not closed.done():
        due = int((time.perf_counter() - began) * rate) - sent
        for _ in range(due):
            turn = next((t for t in range(turn + 1, turn + 1 + len(connections)) if _idle(connections, t)), -1)
            if turn < 0:
                break
            connections[turn % len(connections)].send()
            sent += 1
        await asyncio.sleep(0.001)


def _idle(connections: list[Connection], turn: int) -> bool:
    return not connections[turn % len(connections)].is_busy


def main() -> None:
    """Read the file that says what to send, remove it, and print what was found as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.0)
    arguments = parser.parse_args()
    spec = json.loads(arguments.spec.read_text())
    arguments.spec.unlink()
    print(json.dumps(uvloop.run(run(spec, arguments.connections, arguments.seconds, arguments.rate))))


if __name__ == "__main__":
    main()
