"""The load of the gateway benchmark: one process, raw sockets on uvloop, every response checked before it counts.

Run by `benchmarks.gateway`, which writes a `Spec` to its standard input as JSON and reads what was found as JSON. The
first answer on each connection is parsed whole; of the others every stream is taken out of its HTTP chunks and its
events are counted, and every completion is searched for its text and its usage.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from contextlib import suppress
from typing import Any, NamedTuple, cast

import uvloop

from benchmarks.gateway_backend import PACE_SECONDS, PACED_CHUNKS, TEXT, word

PACED_SECONDS = PACED_CHUNKS * PACE_SECONDS
DRAIN_SECONDS = 15.0
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_STREAM_END = b"\r\n0\r\n\r\n"
_DONE = b"data: [DONE]"
_TEXT = TEXT.encode()


class Spec(NamedTuple):
    """What is sent: `request`, over so many connections spread over the ports, each the next after an answer.

    `chunks` is how many a stream must have, and 0 asks for a completion. A `paced` load starts its streams evenly over
    the time that one takes, and measures those that begin once all connections have one.
    """

    ports: list[int]
    request: str
    chunks: int
    paced: bool
    connections: int
    seconds: float


class GatewayLoad(NamedTuple):
    """What was found. Latencies are those of completions, or from the request to the first chunk of a stream."""

    answers: int
    chunks: int
    seconds: float
    errors: int
    example: str
    p50_ms: float
    p99_ms: float

    @property
    def per_second(self) -> float:
        """Chunks a second of streams, else answers a second."""
        return (self.chunks or self.answers) / self.seconds


class Tally:
    """What was sent and answered, shared by every connection."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.request = spec.request.encode()
        self.latencies: list[float] = []
        self.answers = 0
        self.errors = 0
        self.example = ""
        self.measures_from = 0.0
        self.last_at = 0.0
        self.under_way = 0
        self.is_over = False
        self.is_drained = asyncio.Event()

    def begin(self) -> bytes | None:
        """Return the next request and count it as under way; None when the load is over."""
        if self.is_over:
            return None
        self.under_way += 1
        return self.request

    def end(self) -> None:
        """Take one request as no longer under way."""
        self.under_way -= 1
        if self.is_over and not self.under_way:
            self.is_drained.set()

    async def drain(self) -> None:
        """Begin no more requests, and wait for the last answer."""
        self.is_over = True
        if self.under_way:
            with suppress(TimeoutError):
                await asyncio.wait_for(self.is_drained.wait(), DRAIN_SECONDS)
        for _ in range(self.under_way):
            self.fail(f"there was no whole answer {DRAIN_SECONDS:.0f} s after the end")

    def count(self, sent_at: float, first_at: float, *, is_right: bool, answer: bytes) -> None:
        """Count one answer."""
        self.last_at = time.perf_counter()
        if not is_right:
            self.fail(answer[:300].decode(errors="replace"))
            return
        self.answers += 1
        if sent_at >= self.measures_from:
            self.latencies.append(first_at - sent_at)

    def fail(self, example: str) -> None:
        """Count an answer that was wrong or did not come; the first of them is kept."""
        self.errors += 1
        self.example = self.example or example

    def found(self, began: float) -> GatewayLoad:
        """Return the result."""
        ordered = sorted(self.latencies) or [float("nan")]
        p50, p99 = (ordered[int(len(ordered) * share)] * 1000 for share in (0.5, 0.99))
        took = max(self.last_at - began, 1e-9)
        chunks = self.answers * self.spec.chunks
        return GatewayLoad(self.answers, chunks, took, self.errors, self.example, p50, p99)


class Connection(asyncio.Protocol):
    """One connection with at most one request under way."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._streams = tally.spec.chunks > 0
        self._answered = 0
        self._is_busy = False
        self._pieces: list[bytes] = []
        self._tail = b""
        self._sent_at = self._first_at = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Be ready to send."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass of it

    def connection_lost(self, error: Exception | None) -> None:
        """Count an answer that will not come."""
        if self._is_busy:
            self._is_busy = False
            self._tally.end()
            self._tally.fail(f"the connection was closed before the answer ended ({error})")

    def send(self) -> None:
        """Send the next request."""
        if self._transport.is_closing() or not (request := self._tally.begin()):
            return
        self._is_busy = True
        self._pieces, self._tail, self._first_at = [], b"", 0.0
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take in an answer, or a part of one."""
        self._pieces.append(data)
        if self._streams:
            if not self._first_at and b"data: " in data:
                self._first_at = time.perf_counter()
            self._tail = (self._tail + data[-len(_STREAM_END) :])[-len(_STREAM_END) :]
            if self._first_at and self._tail != _STREAM_END:
                return
        answer = b"".join(self._pieces) if len(self._pieces) > 1 else data
        body = find_body(answer)
        if body is None:
            return
        self._first_at = self._first_at or time.perf_counter()
        is_right = answer.startswith(b"HTTP/1.1 200") and self._is_right(body)
        self._answered += 1
        self._is_busy = False
        self._tally.end()
        self._tally.count(self._sent_at, self._first_at, is_right=is_right, answer=answer)
        self.send()

    def _is_right(self, body: bytes) -> bool:
        chunks = self._tally.spec.chunks
        if not chunks:
            return is_completion(body) if not self._answered else _TEXT in body and b'"usage"' in body
        if not self._answered and not is_stream(body, chunks):
            return False
        return body.count(b"data: {") == chunks and body.rstrip().endswith(_DONE)


def find_body(answer: bytes) -> bytes | None:
    """Return the body, out of its HTTP chunks if it has any; None while it is incomplete."""
    head, found, rest = answer.partition(_HEAD_END)
    if not found:
        return None
    head = head.lower()
    if b"\r\ntransfer-encoding: chunked" in head:
        return _join_chunks(rest)
    length = _LENGTH.search(head)
    return rest if len(rest) >= (int(length[1]) if length else 0) else None


def is_completion(body: bytes) -> bool:
    """Return whether this is the backend's completion."""
    with suppress(ValueError, LookupError, TypeError):
        answer = json.loads(body)
        return bool(answer["choices"][0]["message"]["content"] == TEXT and answer["usage"]["total_tokens"] > 0)
    return False


def is_stream(body: bytes, chunks: int) -> bool:
    """Return whether these are the backend's events, each of them once and in their order."""
    *events, done = body.decode(errors="replace").strip().split("\n\n")
    with suppress(ValueError, LookupError, TypeError):
        parsed = [json.loads(event.removeprefix("data: ")) for event in events]
        kinds = {event["object"] for event in parsed}
        words = [event["choices"][0]["delta"]["content"] for event in parsed]
        is_whole = words == [word(number) for number in range(chunks)] and done == _DONE.decode()
        return is_whole and kinds == {"chat.completion.chunk"}
    return False


def _join_chunks(rest: bytes) -> bytes | None:
    parts: list[bytes] = []
    at = 0
    while (end := rest.find(b"\r\n", at)) >= 0:
        size = int(rest[at:end], 16)
        start, at = end + 2, end + 4 + size
        if len(rest) < at:
            return None
        if size == 0:
            return b"".join(parts)
        parts.append(rest[start : start + size])
    return None


async def run(spec: Spec) -> GatewayLoad:
    """Send the load; return what was found once the last answer is there."""
    loop, tally = asyncio.get_running_loop(), Tally(spec)
    made = [
        (await loop.create_connection(lambda: Connection(tally), "127.0.0.1", spec.ports[n % len(spec.ports)]))[1]
        for n in range(spec.connections)
    ]
    began = time.perf_counter()
    ramp = PACED_SECONDS if spec.paced else 0.0
    tally.measures_from = began + ramp
    for number, connection in enumerate(made):
        loop.call_later(ramp * number / spec.connections, connection.send)
    await asyncio.sleep(ramp + spec.seconds)
    await tally.drain()
    return tally.found(began)


def main() -> None:
    """Read what to send from standard input, and print what was found."""
    spec: dict[str, Any] = json.load(sys.stdin)
    print(json.dumps(uvloop.run(run(Spec(**spec)))._asdict()))


if __name__ == "__main__":
    main()
