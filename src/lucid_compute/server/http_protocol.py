"""uvicorn's HTTP/1.1, but: headers come soon and are bounded, and a refusal at this level has the contract's shape.

A request is fed to uvicorn as it comes. Only what did not come whole, or is large, is looked at closely, so the usual
request of one packet pays next to nothing; and one timer serves all connections of a worker.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, cast
from weakref import WeakKeyDictionary

from httptools import HttpParserUpgrade, HttpRequestParser
from uvicorn._types import HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from lucid_compute.errors import InvalidRequest

_HEAD = b"HTTP/1.1 "
_INFORMATIONAL = b"HTTP/1.1 1"


class CorkedTransport:
    """uvicorn writes an answer's head by itself; held until the body comes, it saves a third of a request's writes.

    Whoever ends an answer without a body has to `flush`. Everything else is the transport's own.
    """

    __slots__ = ("_held", "_transport", "abort", "get_extra_info", "is_closing")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        """Return what is the transport's own."""
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Write what was held and `data`; hold it if it begins with the head of a final answer."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held + data)
        elif data.startswith(_HEAD) and not data.startswith(_INFORMATIONAL):
            self._held = data
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write what was held."""
        if self._held:
            held, self._held = self._held, b""
            self._transport.write(held)

    def write_eof(self) -> None:
        """Write what was held, and end our side."""
        self.flush()
        self._transport.write_eof()

    def close(self) -> None:
        """Write what was held, and close."""
        self.flush()
        self._transport.close()


HEAD_SECONDS = 10.0  # from a connection's opening or a later request's first byte to the end of its headers
MAX_HEAD_BYTES = 64 * 1024
READ_SECONDS = 60.0  # for a client to read so much of an answer that is written, or the rest of it
LEAST_READ_BYTES = 64 * 1024
GOODBYE_SECONDS = 5.0  # for a client to take its refusal; what it still sends is thrown away
SWEEP_SECONDS = 0.5
CLOSED_AT_ONCE = 20  # by one sweep, some 1 ms; more of them wait for a moment, so that others are answered
PAUSE_SECONDS = 0.01
ONE_PACKET_BYTES = 4096  # a request of no more that came whole needs no closer look
ABORT = "lucid.abort"  # in scope["extensions"]: call it, and the connection is gone, whatever is still to be sent
UNKNOWN = float("inf")
_REFUSALS = {
    HTTPStatus.BAD_REQUEST: "This is not HTTP/1.1: correct the first line, the headers or the framing of the body.",
    HTTPStatus.REQUEST_TIMEOUT: f"The headers did not come within {HEAD_SECONDS:.0f} s: send them at once.",
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: f"The headers are over {MAX_HEAD_BYTES} bytes: send fewer or shorter.",
}


class ClientDeadlines:
    """The connections of one worker that have to do something soon, and one timer for all of them."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Watch nobody yet; the timer runs only while somebody is watched."""
        self._loop = loop
        self._due_at: dict[HttpProtocol, float] = {}
        self._is_timed = False

    def set(self, connection: HttpProtocol, seconds: float) -> None:
        """Let the connection's time run out in so many seconds, whatever was set before."""
        self._due_at[connection] = self._loop.time() + seconds
        if not self._is_timed:
            self._call_later(SWEEP_SECONDS)

    def clear(self, connection: HttpProtocol) -> None:
        """Expect nothing of the connection any more."""
        self._due_at.pop(connection, None)

    def __contains__(self, connection: HttpProtocol) -> bool:
        """Return whether something is expected of the connection."""
        return connection in self._due_at

    def _call_later(self, seconds: float) -> None:
        self._is_timed = True
        self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        self._is_timed = False
        now = self._loop.time()
        due = [connection for connection, due_at in self._due_at.items() if due_at <= now]
        if self._due_at:
            self._call_later(SWEEP_SECONDS if len(due) <= CLOSED_AT_ONCE else PAUSE_SECONDS)
        for connection in due[:CLOSED_AT_ONCE]:
            self.clear(connection)
            connection.run_out_of_time()


_receive = HttpToolsProtocol.data_received  # by name, which costs half of what super() does


def _feed(connection: HttpProtocol, data: bytes) -> None:
    """Feed uvicorn's parser."""
    try:
        _receive(connection, data)
    except HttpParserUpgrade as upgrade:
        connection.decline_upgrade(data[upgrade.args[0] :])


_begin_message = HttpToolsProtocol.on_message_begin
_deadlines: WeakKeyDictionary[ServerState, ClientDeadlines] = WeakKeyDictionary()  # each server's, and so each worker's


class HttpProtocol(HttpToolsProtocol):
    """One connection. It uses insides of uvicorn, which tests/unit/test_guarded_protocol.py names one by one."""

    # In the instance's dict they would be more than the 30 names that instances share, and every access slower.
    __slots__ = (
        "_awaited_scope",
        "_cork",
        "_deadlines",
        "_extensions",
        "_idle_bytes",
        "_is_leaving",
        "_is_whole",
        "_unread_bytes",
    )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Expect the first request's headers."""
        super().connection_made(transport)
        self._cork = CorkedTransport(transport)
        self.transport = cast("asyncio.Transport", self._cork)  # it is one in all but its class
        self._is_whole = False  # whether all that came so far was requests that came whole
        self._is_leaving = False  # whether no more is read
        self._idle_bytes = 0  # what came since the last headers that were whole, or the last byte of a body
        self._unread_bytes = UNKNOWN  # of an answer, when its reader was looked at last
        self._awaited_scope: HTTPScope | None = None  # of the request, after the first, that has a deadline
        self._extensions: Any = {ABORT: transport.abort}
        self._deadlines = _deadlines.setdefault(self.server_state, ClientDeadlines(self.loop))
        self._deadlines.set(self, HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Expect nothing any more."""
        self._deadlines.clear(self)
        super().connection_lost(exc)
        self.cycle = self.scope = None  # type: ignore[assignment]  # as uvicorn begins; cycle and protocol hold each other

    def on_response_complete(self) -> None:
        """Write a head that no body followed, and go on, or see to it that the client reads before it is closed."""
        self._cork.flush()
        super().on_response_complete()
        if self._cork.is_closing():
            self._unread_bytes = UNKNOWN
            self._deadlines.set(self, READ_SECONDS)

    def on_message_begin(self) -> None:
        """Start a request's scope."""
        _begin_message(self)
        self.scope["extensions"] = self._extensions

    def data_received(self, data: bytes) -> None:
        """Feed uvicorn's parser; a request that came whole in one packet needs no more."""
        if not self._is_whole or len(data) > ONE_PACKET_BYTES:
            self._feed_closely(data)
            return
        _feed(self, data)
        cycle = self.cycle
        if cycle.more_body or cycle.scope is not self.scope or cycle.response_complete:
            self._is_whole = False
            self._idle_bytes = len(data) if cycle.response_complete else 0  # then no headers became whole by it
            self._expect_what_is_missing()

    def handle_websocket_upgrade(self) -> None:
        """Hand what uvicorn has caught on to `_feed`."""
        raise  # noqa: PLE0704 - uvicorn calls this where it has caught the parser's HttpParserUpgrade

    def _should_upgrade(self) -> bool:
        """Start no request yet whose client wants to change the protocol: its parser takes no body after that."""
        return True

    def decline_upgrade(self, rest: bytes) -> None:
        """Read the request again without its wish, which a server may ignore (RFC 9110, 7.8): its body comes now.

        Java's client wishes for h2c whenever there is no TLS.
        """
        kept = [(name, value) for name, value in self.headers if name not in {b"upgrade", b"connection"}]
        if any(name == b"connection" and b"close" in value.lower() for name, value in self.headers):
            kept.append((b"connection", b"close"))
        method, version = self.scope["method"].encode(), self.parser.get_http_version().encode()
        lines = [method + b" " + self.url + b" HTTP/" + version, *(b"%b: %b" % pair for pair in kept), b"", rest]
        self.parser = HttpRequestParser(self)
        _feed(self, b"\r\n".join(lines))

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002 - uvicorn's signature
        """Refuse what uvicorn's parser can't read."""
        self._refuse(HTTPStatus.BAD_REQUEST)

    def timeout_keep_alive_handler(self) -> None:
        """Close a connection that asks for nothing more, once its client has read the answer."""
        self._unread_bytes = UNKNOWN
        self.run_out_of_time()

    def run_out_of_time(self) -> None:
        """Close the connection, with a word if its first request has begun; one that is being answered may go on.

        So may a client that reads, however large the answer is.
        """
        if self._is_being_answered:
            self._deadlines.set(self, HEAD_SECONDS)
        elif self._is_leaving:
            self.transport.abort()
        elif unread_bytes := self.transport.get_write_buffer_size():
            self._await_reader(unread_bytes)
        elif self._is_at_its_first_request and self._idle_bytes:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
        else:
            self._stop_reading()
            self.transport.close()

    @property
    def _is_at_its_first_request(self) -> bool:
        """Return whether no headers were whole yet."""
        return self.cycle is None

    @property
    def _is_inside_head(self) -> bool:
        """Return whether the newest request's headers are incomplete; also true before the first byte."""
        return self._is_at_its_first_request or self.cycle.scope is not self.scope

    @property
    def _is_being_answered(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.disconnected

    def _await_reader(self, unread_bytes: int) -> None:
        """Wait for a client that reads, and cut one that does not."""
        if unread_bytes > self._unread_bytes - LEAST_READ_BYTES:
            self.transport.abort()
            return
        self._unread_bytes = unread_bytes
        self._deadlines.set(self, READ_SECONDS)

    def _feed_closely(self, data: bytes) -> None:
        """Feed uvicorn's parser no further than the limit, and refuse headers (or trailers) that are not over by then.

        The same bytes must not come after an answer either, as a body that nobody reads any more.
        """
        while data and not self._is_leaving and not self.transport.is_closing():
            room = MAX_HEAD_BYTES - self._idle_bytes
            piece, data = data[:room], data[room:]
            cycle = self.cycle
            body_bytes = 0 if cycle is None else len(cycle.body)
            _feed(self, piece)
            is_idle = self.cycle is cycle and (cycle is None or len(cycle.body) == body_bytes)
            self._idle_bytes = self._idle_bytes + len(piece) if is_idle else 0
            self._expect_what_is_missing()
            if self._idle_bytes == MAX_HEAD_BYTES and not self._is_leaving:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def _expect_what_is_missing(self) -> None:
        """Set or clear the deadline: headers have one from their first byte on, a body has the application's.

        What comes after an answer and is no request (uvicorn stops its own keep-alive timer then) counts as headers.
        """
        if self._is_leaving:
            return
        if self._is_inside_head or self.cycle.response_complete:
            is_new = self._awaited_scope is not self.scope and not self._is_at_its_first_request
            if is_new or self not in self._deadlines:  # as when a lane before uvicorn served those that came first
                self._awaited_scope = self.scope
                self._deadlines.set(self, HEAD_SECONDS)
            return
        self._awaited_scope = None
        self._deadlines.clear(self)
        self._is_whole = not self.cycle.more_body
        if self._is_whole:
            self._idle_bytes = 0

    def _refuse(self, status: HTTPStatus) -> None:
        """Return the newest request and end the connection; requests before it that came whole are answered first.

        The client may still be sending: closed at once, it would meet a reset before it has read why.
        """
        self._stop_reading()
        cycle = self.cycle
        if self._is_being_answered and (self._is_inside_head or self.pipeline):
            self.shutdown()  # uvicorn closes after the last answer
            return
        if self._is_inside_head or not cycle.response_started:
            self.transport.write(_answer(status, self.server_state.default_headers))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write_eof()

    def _stop_reading(self) -> None:
        self._is_leaving = True
        self._is_whole = False
        self._deadlines.set(self, GOODBYE_SECONDS)


def _answer(status: HTTPStatus, default_headers: list[tuple[bytes, bytes]]) -> bytes:
    """Return the bytes of a refusal."""
    error: dict[str, Any] = {
        "code": InvalidRequest.code,
        "message": _REFUSALS[status],
        "status": status.value,
        "details": {},
    }
    body = json.dumps({"error": error}, separators=(",", ":")).encode()
    head = [
        f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode(),
        *(b"%b: %b\r\n" % pair for pair in default_headers),
        b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body),
    ]
    return b"".join([*head, body])
