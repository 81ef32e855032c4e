"""One HTTP/1.1 connection to a provider: writes a request, takes in one answer within limits, and can be used again.

Written by hand on httptools because forwarding is what a gateway spends its time on (docs/adr/0009-own-http-client.md).
Nothing here trusts the answer: sizes are bounded, what is not asked for ends the connection, and whatever goes wrong
becomes an `EgressFault`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.write_batching import WriteBatch

MAX_ANSWER_BYTES = 16 * 1024 * 1024
MAX_STREAM_BYTES = 64 * 1024 * 1024
MAX_PARTS = 64  # of a body, each of which takes some 50 bytes besides its own; more are joined
_STREAM = b"text/event-stream"
_MINDED = frozenset({b"content-type", b"content-length", b"transfer-encoding", b"content-encoding", b"retry-after"})
_CONTINUE, _SWITCHING, _OK = 100, 101, 200  # plain numbers, because HTTPStatus costs a look-up each time


class IncomingAnswer:
    """One answer: `status`, `content_type`, and the body in parts. `is_whole`: it has ended as HTTP says it must."""

    __slots__ = (
        "_body_bytes",
        "_buffered",
        "_fault",
        "_head_bytes",
        "_is_framed",
        "_joins_after",
        "_keeps_alive",
        "_parts",
        "_wants_stream",
        "content_type",
        "has_head",
        "heard",
        "is_stream",
        "is_whole",
        "parser",
        "retry_after",
        "status",
    )

    parser: HttpResponseParser

    def _start(self, *, wants_stream: bool) -> None:
        self._fault: EgressFault | None = None
        self._parts: list[bytes] = []
        self._head_bytes = self._body_bytes = self._buffered = 0
        self._joins_after = MAX_PARTS
        self._wants_stream = wants_stream
        self._is_framed = self.has_head = self.heard = self.is_whole = self.is_stream = False
        self.status = 0
        self.content_type = b""
        self.retry_after = b""

    def on_message_begin(self) -> None:
        """Stop the parser when a second answer begins: nobody asked for it, and the next request must not get it."""
        if self.is_whole:
            self._refuse("The node answered more than it was asked.")
            raise ValueError

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look at the few headers that matter."""
        lowered = name.lower()
        if lowered not in _MINDED or self.has_head:  # a trailer says nothing
            return
        if lowered == b"content-type":
            self.content_type = value
        elif lowered == b"retry-after":
            self.retry_after = value
        elif lowered == b"content-encoding":
            if value.strip().lower() != b"identity":
                self._refuse("The node compressed its answer although it was asked not to.")
        elif self._is_framed or (lowered == b"transfer-encoding" and value.strip().lower() != b"chunked"):
            self._refuse("The node's answer says in more than one way, or in none we know, where it ends.")
        else:
            self._is_framed = True

    def on_headers_complete(self) -> None:
        """Know what kind of answer it is."""
        status = self.status = self.parser.get_status_code()
        if status < _OK:  # 100 Continue and the like: the answer is still to come
            self.content_type = self.retry_after = b""
            self._is_framed = False
            if status < _CONTINUE or status == _SWITCHING:
                self._refuse(f"The node answered status {status}, which nobody asked for.")
            return
        self.has_head = True
        self.is_stream = self._wants_stream and status == _OK and self.content_type[: len(_STREAM)].lower() == _STREAM

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body."""
        self._parts.append(part)
        self._buffered += len(part)
        self._body_bytes += len(part)
        if self._body_bytes > MAX_ANSWER_BYTES and (not self.is_stream or self._body_bytes > MAX_STREAM_BYTES):
            self._refuse("The node's answer is longer than it may be.")

    def on_message_complete(self) -> None:
        """End the answer, unless it only said that one will come."""
        self.is_whole = self.status >= _OK
        self._keeps_alive = self.parser.should_keep_alive()  # the parser knows it only now

    def _refuse(self, message: str) -> None:
        if self._fault is None:
            self._fault = EgressFault(FaultKind.BAD_RESPONSE, message)


MAX_HEAD_BYTES = 32 * 1024
MAX_BUFFERED_BYTES = 16 * 1024  # of a stream whose reader is slow; one more read of the socket may come on top
READ_BYTES = 32 * 1024  # of the socket at once; asyncio and uvloop would take 256 KiB
_NEVER = float("inf")


class Deadlines(NamedTuple):
    """How long a provider may take, in seconds: to a stream's first byte, between two reads, and in total.

    `answer_seconds` is for an answer that is not a stream, from the request to its last byte.
    """

    first_byte_seconds: float = 120.0
    between_seconds: float = 60.0
    total_seconds: float = 1800.0
    answer_seconds: float = 600.0


class HttpConnection(IncomingAnswer, asyncio.BufferedProtocol):
    """A connection and the answer it is taking in: `status`, `content_type`, and the body in parts.

    `is_whole` says that the answer has ended as HTTP says it must. `on_ready`, when it is set, is called in place of
    waking who awaits `receive`.
    """

    __slots__ = (
        "_is_in_use",
        "_is_paused",
        "_late_writes",
        "_transport",
        "_view",
        "_waiter",
        "between_seconds",
        "due_at",
        "is_lost",
        "last_read_at",
        "made_at",
        "on_ready",
        "total_due_at",
        "used",
    )

    def __init__(self, view: memoryview, late_writes: WriteBatch | None = None) -> None:
        """Not connected yet. Reads go into `view`, which all the connections of one loop may share.

        Requests are written at once, or with `late_writes`.
        """
        self._view = view
        self._late_writes = late_writes
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.on_ready: Callable[[], None] | None = None
        self._is_in_use = self._is_paused = self._keeps_alive = self.is_lost = False
        self.made_at = time.monotonic()
        self.used = 0
        self.between_seconds = self.due_at = self.total_due_at = _NEVER
        self._start(wants_stream=False)

    # --- use

    @property
    def is_reusable(self) -> bool:
        """Return whether another request may be written: the answer is whole and neither side closed or will."""
        if not self.is_whole or not self._keeps_alive or self.is_lost or self._transport is None:
            return False
        return not self._transport.get_write_buffer_size()  # else it answered before it had read the request

    def send(self, head: bytes, body: bytes, deadlines: Deadlines, *, wants_stream: bool) -> None:
        """Write a request, its head without the length; what comes from now on is its answer."""
        self._start(wants_stream=wants_stream)
        self._is_in_use = True
        self.used += 1
        now = self.last_read_at = time.monotonic()
        self.due_at = now + (deadlines.first_byte_seconds if wants_stream else deadlines.answer_seconds)
        self.total_due_at = now + deadlines.total_seconds
        self.between_seconds = deadlines.between_seconds
        if self.is_lost or self._transport is None:
            self._fault = EgressFault(FaultKind.CONNECTION_LOST, "The node closed the connection.")
            return
        request = b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        if self._late_writes is None:
            self._transport.write(request)
        else:
            self._late_writes.write(self._transport, request)

    async def receive(self) -> bytes:
        """Return what has come of the body: all of it, or of a stream what there is; empty when it is over.

        Raises:
            EgressFault: the answer broke off, broke a rule or came too late.
        """
        while not self.is_ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.take()

    @property
    def is_ready(self) -> bool:
        """Return whether there is something to take: the whole answer, a part of a stream, or what went wrong."""
        return self.is_whole or self._fault is not None or (self.is_stream and bool(self._parts))

    def take(self) -> bytes:
        """Return as `receive` does what is there, for one whom `on_ready` has called.

        Raises:
            EgressFault: as `receive`.
        """
        parts = self._parts
        if self._fault is not None and not (self.is_whole or (self.is_stream and parts)):
            raise self._fault
        if not parts:
            return b""
        self._parts = []
        self._buffered, self._joins_after = 0, MAX_PARTS
        if self._is_paused:
            self._resume()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def release(self) -> None:
        """Belong to nobody: whatever comes now is not asked for, and ends the connection."""
        self._is_in_use = False
        self.on_ready = None
        self._parts = []
        self._fault = None  # whose traceback holds this connection and the request

    def fail(self, fault: EgressFault) -> None:
        """End the exchange and the connection with `fault`, unless it is over already."""
        if self._fault is None and not self.is_whole:
            self._fault = fault
        self.abort()
        self._wake()

    def abort(self) -> None:
        """Close at once."""
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()

    def overdue(self, now: float) -> EgressFault | None:
        """Return what the provider is late with at `now` (`time.monotonic`); None when nothing is."""
        if self.is_whole:
            return None
        if now >= self.total_due_at:
            return EgressFault(FaultKind.TOTAL_TIMEOUT, "The answer took longer than it may in total.")
        if not (self.is_stream and self._body_bytes):
            if now >= self.due_at:
                kind = FaultKind.FIRST_BYTE_TIMEOUT if self._wants_stream else FaultKind.ANSWER_TIMEOUT
                return EgressFault(kind, "The answer did not come in time.")
        elif now - self.last_read_at >= self.between_seconds and not self._is_paused:
            return EgressFault(FaultKind.IDLE_TIMEOUT, "The stream fell silent for too long.")
        return None

    # --- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hold the transport, until it is lost."""
        self._transport = cast("asyncio.Transport", transport)
        self.parser = HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio asks so
        """Lend the place to read into; what is read there is taken in before anything else is read."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Take in a part of the answer."""
        if not self._is_in_use or self.is_whole:
            self.abort()  # nobody asked: it would be read as the next answer
            return
        self.last_read_at = time.monotonic()
        self.heard = True
        had_head, body_bytes = self.has_head, self._body_bytes
        try:
            self.parser.feed_data(self._view[:nbytes])
        except (HttpParserError, HttpParserUpgrade):
            self._refuse("The node's answer is not HTTP/1.1.")
        if not had_head or body_bytes == self._body_bytes:
            self._head_bytes += nbytes + body_bytes - self._body_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(f"The head of the node's answer, or its trailer, is over {MAX_HEAD_BYTES} bytes.")
        else:
            self._head_bytes = 0
        if len(self._parts) > self._joins_after:
            joined = self._joins_after - MAX_PARTS  # the parts that are joined already
            self._parts[joined:] = [b"".join(self._parts[joined:])]
            self._joins_after += 1
        if self._fault is not None:
            self.is_whole = False
            self.abort()
            self._wake()
        elif self.is_whole or (self.is_stream and self._parts):
            self._wake()
            if self._buffered > MAX_BUFFERED_BYTES and self._transport is not None and not self.is_whole:
                self._is_paused = True
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        """Close our side too; over TLS that takes its time, in which nobody may write a request."""
        self.is_lost = True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End what was going on: well only if the answer's length was its connection's."""
        self.is_lost = True
        if self._is_in_use and not self.is_whole and self._fault is None:
            if error is None and self.has_head and not self._is_framed:
                self.is_whole = True
            else:
                self._fault = EgressFault(FaultKind.CONNECTION_LOST, "The node closed the connection.")
        self._wake()
        if self._transport is not None:
            self._transport = None
            del self.parser  # it and this connection hold each other, and would until garbage is collected

    # --- inside

    def _resume(self) -> None:
        self._is_paused = False
        self.last_read_at = time.monotonic()
        if self._transport is not None and not self.is_lost:
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self.on_ready is not None:
            self.on_ready()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
