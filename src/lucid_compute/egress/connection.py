"""One HTTP/1.1 connection to a provider: writes a request, reads one response within limits, and can be used again.

Written on httptools because a gateway spends most of its time forwarding (docs/adr/0009-own-http-client.md). The
response is not trusted: sizes are bounded, unsolicited data ends the connection, and any failure becomes an
`EgressFault`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.write_batching import WriteBatch

MAX_PARTS = 64  # of a body; each takes some 50 bytes more than its data, so further ones are joined
_STREAM = b"text/event-stream"
# How an event stream begins, whatever the node calls it, and how many bytes say so; JSON begins with none of these.
_STREAM_STARTS = (b":", b"data:", b"event:", b"id:", b"retry:")
_SNIFFED_BYTES = 64
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_RELEVANT_HEADERS = frozenset(
    {b"content-type", b"content-length", b"transfer-encoding", b"content-encoding", b"retry-after"}
)
_CONTINUE, _SWITCHING, _OK = 100, 101, 200  # plain numbers: HTTPStatus costs a look-up each time


class ResponseLimits(NamedTuple):
    """The longest bodies, in bytes: of a response, and of a stream that was asked for."""

    max_body_bytes: int = 32 * 1024 * 1024
    max_stream_bytes: int = 256 * 1024 * 1024


RESPONSE_LIMITS = ResponseLimits()


class IncomingResponse:
    """One response as httptools parses it: `status`, `content_type`, and the body in parts.

    `is_whole`: it has ended as HTTP requires. `has_received`: at least one byte of it has come.
    """

    __slots__ = (
        "_body_bytes",
        "_buffered",
        "_fault",
        "_head_bytes",
        "_is_framed",
        "_joins_after",
        "_keeps_alive",
        "_max_body_bytes",
        "_max_stream_bytes",
        "_may_be_stream",
        "_parts",
        "_wants_stream",
        "content_type",
        "has_head",
        "has_received",
        "is_stream",
        "is_whole",
        "parser",
        "retry_after",
        "status",
    )

    __deletable__ = ("parser",)

    parser: HttpResponseParser
    _max_body_bytes: int
    _max_stream_bytes: int

    def _start(self, *, wants_stream: bool) -> None:
        self._fault: EgressFault | None = None
        self._parts: list[bytes] = []
        self._head_bytes = self._body_bytes = self._buffered = 0
        self._joins_after = MAX_PARTS
        self._wants_stream = wants_stream
        self._is_framed = self.has_head = self.has_received = self.is_whole = self.is_stream = False
        self._may_be_stream = False
        self.status = 0
        self.content_type = b""
        self.retry_after = b""

    def on_message_begin(self) -> None:
        """Stop the parser when a second response begins: it is unsolicited, and the next request must not get it."""
        if self.is_whole:
            raise ValueError

    def on_header(self, name: bytes, value: bytes) -> None:
        """Read the few headers that matter."""
        lowered = name.lower()
        if lowered not in _RELEVANT_HEADERS or self.has_head:  # trailers are ignored
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
        """Read the status, and decide whether the response is a stream."""
        status = self.status = self.parser.get_status_code()
        if status < _OK:  # interim, such as 100 Continue: the response is still to come
            self.content_type = self.retry_after = b""
            self._is_framed = False
            if status < _CONTINUE or status == _SWITCHING:
                self._refuse(f"The node answered status {status}, which nobody asked for.")
            return
        self.has_head = True
        is_awaited = self._wants_stream and status == _OK
        self.is_stream = is_awaited and self.content_type[: len(_STREAM)].lower() == _STREAM
        self._may_be_stream = is_awaited and not self.is_stream

    def on_body(self, part: bytes) -> None:
        """Keep a part of the body, unless it exceeds the limit."""
        self._parts.append(part)
        self._buffered += len(part)
        self._body_bytes += len(part)
        if self._may_be_stream:
            self._recognise_stream()
        if self._body_bytes > self._max_body_bytes and (
            not self.is_stream or self._body_bytes > self._max_stream_bytes
        ):
            self._refuse("The node's answer is longer than this service passes on.", FaultKind.TOO_LARGE)

    def on_message_complete(self) -> None:
        """End the response, unless it was an interim one."""
        self.is_whole = self.status >= _OK
        self._keeps_alive = self.parser.should_keep_alive()  # known only at the end

    def _recognise_stream(self) -> None:
        """Decide by the body's first bytes whether it is an event stream that the node calls something else."""
        read = b"".join(self._parts)
        start = read.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n")
        self.is_stream = start.startswith(_STREAM_STARTS)
        is_open = any(each.startswith(start) for each in _STREAM_STARTS) or _BYTE_ORDER_MARK.startswith(read)
        is_open = is_open and self._body_bytes < _SNIFFED_BYTES
        self._may_be_stream = is_open and not self.is_stream

    def _refuse(self, message: str, kind: FaultKind = FaultKind.BAD_RESPONSE) -> None:
        if self._fault is None:
            self._fault = EgressFault(kind, message)


MAX_HEAD_BYTES = 32 * 1024
MAX_BUFFERED_BYTES = 16 * 1024  # of a stream with a slow reader; one read of the socket may be added
READ_BYTES = 32 * 1024  # of the socket at once; by default asyncio and uvloop read 256 KiB
_NEVER = float("inf")


class Deadlines(NamedTuple):
    """How long a provider may take, in seconds: to a stream's first byte, between two reads, and in total.

    `answer_seconds` is for a response without a stream, from the request to its last byte.
    """

    first_byte_seconds: float = 120.0
    between_seconds: float = 60.0
    total_seconds: float = 1800.0
    answer_seconds: float = 600.0


class HttpConnection(IncomingResponse, asyncio.BufferedProtocol):
    """A connection and the response that it is reading.

    `on_ready`, if it is set, is called when something can be read, instead of waking the task that awaits `receive`.
    `awaits_content`: what came of a stream so far is no part of an answer, so the time for its first byte still runs.
    """

    __slots__ = (
        "_is_in_use",
        "_is_paused",
        "_monotonic",
        "_transport",
        "_view",
        "_waiter",
        "_write_batch",
        "awaits_content",
        "between_seconds",
        "due_at",
        "is_lost",
        "last_read_at",
        "made_at",
        "on_ready",
        "total_due_at",
        "used",
    )

    def __init__(
        self,
        view: memoryview,
        write_batch: WriteBatch | None = None,
        limits: ResponseLimits = RESPONSE_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`view`: the read buffer, which all connections of one loop may share. `write_batch`: None writes at once."""
        self._monotonic = monotonic
        self._max_body_bytes = limits.max_body_bytes
        self._max_stream_bytes = limits.max_stream_bytes
        self._view = view
        self._write_batch = write_batch
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.on_ready: Callable[[], None] | None = None
        self._is_in_use = self._is_paused = self._keeps_alive = self.is_lost = False
        self.made_at = monotonic()
        self.used = 0
        self.awaits_content = False
        self.between_seconds = self.due_at = self.total_due_at = _NEVER
        self._start(wants_stream=False)

    # --- use

    @property
    def is_reusable(self) -> bool:
        """Return whether another request may be written: the response is complete, and neither side closes."""
        if not self.is_whole or not self._keeps_alive or self.is_lost or self._transport is None:
            return False
        return not self._transport.get_write_buffer_size()  # else the node responded before it had read the request

    def send(self, head: bytes, body: bytes, deadlines: Deadlines, *, wants_stream: bool) -> None:
        """Write a request; `head` lacks the length. What is received from now on is the response."""
        self._start(wants_stream=wants_stream)
        self._is_in_use = True
        self.awaits_content = False
        self.used += 1
        now = self.last_read_at = self._monotonic()
        self.due_at = now + (deadlines.first_byte_seconds if wants_stream else deadlines.answer_seconds)
        self.total_due_at = now + deadlines.total_seconds
        self.between_seconds = deadlines.between_seconds
        if self.is_lost or self._transport is None:
            self._fault = EgressFault(FaultKind.CONNECTION_LOST, "The node closed the connection.")
            return
        request = b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body)
        if self._write_batch is None:
            self._transport.write(request)
        else:
            self._write_batch.write(self._transport, request)

    async def receive(self) -> bytes:
        """Return the complete body, or of a stream what has arrived; empty at the end.

        Raises:
            EgressFault: the response broke off, broke a rule or came too late.
        """
        while not self.is_ready:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self.read_available()

    @property
    def is_ready(self) -> bool:
        """Return whether there is something to read: the complete response, a part of a stream, or a fault."""
        return self.is_whole or self._fault is not None or (self.is_stream and bool(self._parts))

    def read_available(self) -> bytes:
        """Return what `receive` would return, without waiting; for use in `on_ready`.

        Raises:
            EgressFault: the response broke off, broke a rule or came too late.
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
        """End the use by a request: data that arrives now is unsolicited and ends the connection."""
        self._is_in_use = False
        self.on_ready = None
        self._parts = []
        self._fault = None  # its traceback holds this connection and the request

    def fail(self, fault: EgressFault) -> None:
        """End the response with `fault`, unless it is complete, and close the connection."""
        if self._fault is None and not self.is_whole:
            self._fault = fault
        self.abort()
        self._wake()

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()

    def overdue(self, now: float) -> EgressFault | None:
        """Return the deadline that the provider has missed at `now`; None when it missed none."""
        if self.is_whole:
            return None
        if now >= self.total_due_at:
            return EgressFault(FaultKind.TOTAL_TIMEOUT, "The answer took longer than it may in total.")
        has_begun = self.is_stream and self._body_bytes > 0
        if now >= self.due_at and (self.awaits_content or not has_begun):
            kind = FaultKind.FIRST_BYTE_TIMEOUT if self._wants_stream else FaultKind.ANSWER_TIMEOUT
            return EgressFault(kind, "The answer did not come in time.")
        if has_begun and now - self.last_read_at >= self.between_seconds and not self._is_paused:
            return EgressFault(FaultKind.IDLE_TIMEOUT, "The stream fell silent for too long.")
        return None

    # --- called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport until the connection is lost."""
        self._transport = cast("asyncio.Transport", transport)
        self.parser = HttpResponseParser(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - asyncio asks so
        """Return the read buffer. It is parsed before the loop reads anything else."""
        return self._view

    def buffer_updated(self, nbytes: int) -> None:
        """Parse a part of the response."""
        if not self._is_in_use or self.is_whole:
            self.abort()  # unsolicited: it would be read as the next response
            return
        self.last_read_at = self._monotonic()
        self.has_received = True
        had_head, body_bytes = self.has_head, self._body_bytes
        try:
            self.parser.feed_data(self._view[:nbytes])
        except (HttpParserError, HttpParserUpgrade):
            self._refuse_rest()
        if not had_head or body_bytes == self._body_bytes:
            self._head_bytes += nbytes + body_bytes - self._body_bytes
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(f"The head of the node's answer, or its trailer, is over {MAX_HEAD_BYTES} bytes.")
        else:
            self._head_bytes = 0
        if len(self._parts) > self._joins_after:
            joined = self._joins_after - MAX_PARTS  # parts that are joined already
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
        """Close our side too. Over TLS that takes a while, in which no request may be written."""
        self.is_lost = True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """End the response: successfully only if the connection's end marks the body's end."""
        self.is_lost = True
        if self._is_in_use and not self.is_whole and self._fault is None:
            if error is None and self.has_head and not self._is_framed:
                self.is_whole = True
            else:
                self._fault = EgressFault(FaultKind.CONNECTION_LOST, "The node closed the connection.")
        self._wake()
        if self._transport is not None:
            self._transport = None
            del self.parser  # a cycle, which only garbage collection would free

    # --- internal

    def _refuse_rest(self) -> None:
        """Refuse what can't be parsed. After a complete response it is unsolicited, and the response itself is good."""
        if self.is_whole and self._fault is None:
            self.abort()
        else:
            self._refuse("The node's answer is not HTTP/1.1.")

    def _resume(self) -> None:
        self._is_paused = False
        self.last_read_at = self._monotonic()
        if self._transport is not None and not self.is_lost:
            self._transport.resume_reading()

    def _wake(self) -> None:
        if self.on_ready is not None:
            self.on_ready()
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
