"""One connection to a provider without a socket: it reads what the test feeds to it."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from lucid_compute.egress.connection import READ_BYTES, RESPONSE_LIMITS, Deadlines, HttpConnection, ResponseLimits
from lucid_compute.egress.faults import EgressFault, FaultKind

JSON_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SMALL = JSON_HEAD + b"Content-Length: 2\r\n\r\n{}"
CHUNKED = JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n001;a=b\r\n}\r\n0\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
EVENT = b"6\r\ndata\n\n\r\n"


class Outcome(NamedTuple):
    status: int
    body: bytes
    fault: FaultKind | None
    is_reusable: bool


class Wire(asyncio.Transport):
    """A transport that accepts every write and records the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = b""
        self.unsent_bytes = 0
        self.is_aborted = self.is_paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.sent += data

    def get_write_buffer_size(self) -> int:
        return self.unsent_bytes

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def abort(self) -> None:
        self.is_aborted = True


class Exchange:
    """A connection, with a request in flight if it `asks`."""

    def __init__(
        self,
        *,
        wants_stream: bool = False,
        deadlines: Deadlines | None = None,
        limits: ResponseLimits = RESPONSE_LIMITS,
        asks: bool = True,
    ) -> None:
        self.view = memoryview(bytearray(READ_BYTES))
        self.connection, self.wire = HttpConnection(self.view, limits=limits), Wire()
        self.connection.connection_made(self.wire)
        if asks:
            self.ask(wants_stream=wants_stream, deadlines=deadlines)

    def ask(self, *, wants_stream: bool = False, deadlines: Deadlines | None = None) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\n"
        self.connection.send(head, b"{}", deadlines or Deadlines(), wants_stream=wants_stream)

    def feed(self, *pieces: bytes) -> int:
        """Feed the pieces as the loop would, until the connection is aborted; return how many bytes were accepted."""
        fed = 0
        for piece in pieces:
            for start in range(0, len(piece), READ_BYTES):
                part = piece[start : start + READ_BYTES]
                if self.wire.is_aborted:
                    return fed
                self.connection.get_buffer(-1)[: len(part)] = part
                self.connection.buffer_updated(len(part))
                fed += len(part)
        return fed

    def end(self, error: Exception | None = None) -> None:
        """End the connection, as a FIN does or an error."""
        self.connection.connection_lost(error)

    async def outcome(self) -> Outcome:
        """Read the response."""
        connection = self.connection
        body = b""
        try:
            async with asyncio.timeout(1):
                while part := await connection.receive():
                    body += part
                    if not connection.is_stream:
                        break
        except EgressFault as fault:
            return Outcome(connection.status, body, fault.kind, is_reusable=connection.is_reusable)
        return Outcome(connection.status, body, None, is_reusable=connection.is_reusable)


async def exchange(*pieces: bytes, wants_stream: bool = False, limits: ResponseLimits = RESPONSE_LIMITS) -> Outcome:
    """Feed the pieces, then the end; return the outcome, `is_reusable` as it was before the end."""
    exchanged = Exchange(wants_stream=wants_stream, limits=limits)
    exchanged.feed(*pieces)
    is_reusable = exchanged.connection.is_reusable
    exchanged.end()
    return (await exchanged.outcome())._replace(is_reusable=is_reusable)


def splits(data: bytes) -> list[tuple[bytes, ...]]:
    """Split in two at every position, and into single bytes."""
    return [(data[:at], data[at:]) for at in range(len(data))] + [tuple(data[at : at + 1] for at in range(len(data)))]
