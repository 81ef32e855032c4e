"""uvicorn's HTTP/1.1 protocol with deadlines and limits for clients, and refusals in the contract's shape.

A request is fed to uvicorn as it comes. Only large or incomplete input is checked closely, so the usual request of one
packet costs almost nothing more. One timer serves all connections of a worker. See docs/adr/0016-http-protocol.md.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakKeyDictionary

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn._types import ASGI3Application, HTTPScope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from lucid_compute.registry.tunnel_routes import UPGRADE
from lucid_compute.server.request_head import (
    LONG_HEAD,
    MAX_HEAD_BYTES,
    NOT_HTTP,
    HeadFault,
    Refused,
    asks_for_websocket,
    fault_of,
    head_bytes,
    refusal_bytes,
    too_slow,
    without_upgrade,
)
from lucid_compute.server.tunnel_connection import TunnelConnection
from lucid_compute.tunnel.tunnels import TunnelGrant, Tunnels

LEAST_READ_BYTES = 64 * 1024
CLOSED_PER_SWEEP = 20  # some 1 ms of work; the others wait for the next sweep, so that requests are served in between
PAUSE_SECONDS = 0.01  # between two sweeps when more connections are due
ONE_PACKET_BYTES = 4096  # a complete request up to this size needs no closer check; also read at once of pipelined ones
MAX_WAITING_BYTES = 1024 * 1024  # behind pipelined requests; a client that sends more is disconnected
ABORT = "lucid.abort"  # in scope["extensions"]: call it to cut the connection, even with data still to be sent
UNKNOWN = float("inf")
_HEAD = b"HTTP/1.1 "
_INFORMATIONAL = b"HTTP/1.1 1"


class ConnectionLimits(NamedTuple):
    """How long a client may take, in seconds."""

    head_seconds: float = 10.0  # from the opening, or the first byte of a later request, to the end of the headers
    read_seconds: float = 60.0  # to read LEAST_READ_BYTES of a written response, or the rest of it
    goodbye_seconds: float = 5.0  # to read a refusal; what the client still sends is discarded
    sweep_seconds: float = 0.5  # between two looks for connections whose time is over


class CorkedTransport:
    """A transport that joins the head of a response to its body, which saves a third of the writes of a request.

    uvicorn writes the head on its own. A response without a body needs a `flush`. A closed transport ignores writes:
    the client has left, and whoever serves its request learns that elsewhere.
    """

    __slots__ = ("_connection", "_held", "_transport", "abort", "get_extra_info", "is_closing")

    def __init__(self, transport: asyncio.Transport, connection: HttpProtocol) -> None:
        self._transport = transport
        self._connection = connection
        self._held = b""
        self.abort = transport.abort
        self.get_extra_info = transport.get_extra_info
        self.is_closing = transport.is_closing

    def __getattr__(self, name: str) -> Any:
        """Return what is the transport's own."""
        return getattr(self._transport, name)

    @property
    def transport(self) -> asyncio.Transport:
        """The transport below."""
        return self._transport

    def write(self, data: bytes) -> None:
        """Write `data`, or hold it if it begins with the head of a final response; first write what was held."""
        if self.is_closing():
            return
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
            if not self.is_closing():
                self._transport.write(held)

    def write_eof(self) -> None:
        """Write what was held, and end our side."""
        self.flush()
        if not self.is_closing():
            self._transport.write_eof()

    def close(self) -> None:
        """Write what was held, and close; if the client still sends, only end our side until it has read that."""
        self.flush()
        if not self._connection.says_goodbye():
            self._transport.close()


class ClientDeadlines:
    """The deadlines of one worker's connections. One timer serves all of them; it runs only while there are any."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sweep_seconds: float) -> None:
        self._loop = loop
        self._sweep_seconds = sweep_seconds
        self._due_at: dict[HttpProtocol, float] = {}
        self._is_timed = False

    def set(self, connection: HttpProtocol, seconds: float) -> None:
        """Set the connection's deadline to so many seconds from now. It replaces an earlier one."""
        self._due_at[connection] = self._loop.time() + seconds
        if not self._is_timed:
            self._call_later(self._sweep_seconds)

    def clear(self, connection: HttpProtocol) -> None:
        """Remove the connection's deadline."""
        self._due_at.pop(connection, None)

    def __contains__(self, connection: HttpProtocol) -> bool:
        """Return whether the connection has a deadline."""
        return connection in self._due_at

    def _call_later(self, seconds: float) -> None:
        self._is_timed = True
        self._loop.call_later(seconds, self._sweep)

    def _sweep(self) -> None:
        self._is_timed = False
        now = self._loop.time()
        due = [connection for connection, due_at in self._due_at.items() if due_at <= now]
        if self._due_at:
            self._call_later(self._sweep_seconds if len(due) <= CLOSED_PER_SWEEP else PAUSE_SECONDS)
        for connection in due[:CLOSED_PER_SWEEP]:
            self.clear(connection)
            connection.run_out_of_time()


_begin_message = HttpToolsProtocol.on_message_begin  # direct references cost half of what super() does
_keep_header = HttpToolsProtocol.on_header
_start_request = HttpToolsProtocol.on_headers_complete
_deadlines: WeakKeyDictionary[ServerState, ClientDeadlines] = WeakKeyDictionary()  # by server: one in each worker


class HttpProtocol(HttpToolsProtocol):
    """One connection. It uses private parts of uvicorn; tests/unit/server/test_guarded_protocol.py names them."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    # In the instance's dict there would be more than the 30 names that instances share, and every access be slower.
    __slots__ = (
        "_awaited_scope",
        "_cork",
        "_deadlines",
        "_extensions",
        "_fault",
        "_has_head",
        "_idle_bytes",
        "_is_complete",
        "_is_leaving",
        "_running",
        "_unread_bytes",
        "_waiting",
    )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start the deadline of the first request's headers."""
        super().connection_made(transport)
        self._cork = CorkedTransport(transport, self)
        self.transport = cast("asyncio.Transport", self._cork)  # has a transport's methods, but not its class
        self._is_complete = False  # whether each request so far arrived complete
        self._is_leaving = False  # whether no more is read
        self._has_head = False  # whether the newest request's headers are complete; what comes then are trailers
        self._fault = NOT_HTTP  # why the parser stopped, if it did
        self._running: RequestResponseCycle | None = None  # the request that is served; others wait behind it
        self._waiting = b""  # received behind pipelined requests, and parsed after them
        self._idle_bytes = 0  # received since the last complete headers, or the last byte of a body
        self._unread_bytes = UNKNOWN  # of a response, at the last check of its reader
        self._awaited_scope: HTTPScope | None = None  # of the request, after the first, that has a deadline
        self._extensions: Any = {ABORT: transport.abort}
        self._deadlines = _deadlines.setdefault(
            self.server_state, ClientDeadlines(self.loop, self.limits.sweep_seconds)
        )
        self._deadlines.set(self, self.limits.head_seconds)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove the deadline. uvicorn tells the newest request that its client left; tell the one that is served."""
        self._deadlines.clear(self)
        if (running := self._running) is not None and not running.response_complete:
            running.disconnected = True
            running.message_event.set()
        super().connection_lost(exc)
        self.pipeline.clear()
        self._waiting = b""
        self.cycle = self.scope = self._running = None  # type: ignore[assignment]  # as at the start; they refer to each other

    def on_response_complete(self) -> None:
        """Write a head without a body; give the client time to read before the connection closes."""
        self._cork.flush()
        super().on_response_complete()
        if self._cork.is_closing():
            self._unread_bytes = UNKNOWN
            self._deadlines.set(self, self.limits.read_seconds)
        elif self._waiting and not self.pipeline:
            waiting, self._waiting = self._waiting, b""
            self._feed_closely(waiting)

    def on_message_begin(self) -> None:
        """Start a request's scope, with our extensions."""
        _begin_message(self)
        self._has_head = False
        self.scope["extensions"] = self._extensions

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header. Ignore a trailer: it came after a proxy, and after us, had looked at the headers."""
        if not self._has_head:
            _keep_header(self, name, value)

    def on_headers_complete(self) -> None:
        """Start a request.

        Raises:
            Refused: its head is refused; the parser stops.
        """
        self._has_head = True
        parser = self.parser
        fault = fault_of(parser.get_method(), parser.get_http_version(), self.url, self.headers)
        if fault is not None:
            self._fault = fault
            raise Refused
        _start_request(self)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        """Start to serve a request, and remember which one is served."""
        self._running = cycle
        if cycle.waiting_for_100_continue or cycle.scope["http_version"] != "1.1":
            app = _framed(app, cycle)
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        """Feed the parser. A request that arrives complete in one packet needs nothing else."""
        self._unset_keepalive_if_required()
        if not self._is_complete or len(data) > ONE_PACKET_BYTES or self.pipeline:
            self._feed_closely(data)
            return
        self._feed(data)
        cycle = self.cycle
        if cycle.more_body or cycle.scope is not self.scope or cycle.response_complete:
            self._is_complete = False
            self._idle_bytes = len(data) if cycle.response_complete else 0  # then it completed no headers
            self._update_deadline()

    def _feed(self, data: bytes | memoryview) -> None:
        """Feed the parser, or refuse what it can't read.

        A request with an Upgrade header is parsed again without it, which a server may do (RFC 9110, 7.8): Java's
        client asks for h2c whenever there is no TLS. No request is parsed more than twice.
        """
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                except HttpParserUpgrade as upgrade:
                    data = memoryview(data)[upgrade.args[0] :]
                    asked = (self.parser.get_method(), self.url, self.parser.get_http_version(), self.headers)
                    self.parser = HttpRequestParser(self)
                    self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                    usual = self._extensions
                    if asks_for_websocket(self.headers):  # then this request alone may call `_hand_over`
                        self._extensions = {**usual, UPGRADE: partial(self._hand_over, head_bytes(*asked))}
                    self.parser.feed_data(without_upgrade(*asked))
                    self._extensions = usual
                else:
                    return
        except HttpParserError:
            self._refuse(self._fault)

    def _hand_over(self, head: bytes, tunnels: Tunnels, grant: TunnelGrant) -> None:
        """Make the connection a tunnel, in the request that asked for it with `head`. It is uvicorn's no longer."""
        connection = TunnelConnection(self.server_state, head, tunnels, grant)
        transport, cycle = self._cork.transport, self.cycle
        self._deadlines.clear(self)
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        self.flow.resume_reading()
        cycle.disconnected = True
        self.cycle = self.scope = self._running = None  # type: ignore[assignment]  # as in connection_lost
        transport.set_protocol(connection)
        connection.connection_made(transport)

    def _should_upgrade(self) -> bool:
        """Return True, so that uvicorn starts no request with an upgrade: its parser would read no body after that."""
        return True

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection once its client has read the response."""
        self._unread_bytes = UNKNOWN
        self.run_out_of_time()

    def run_out_of_time(self) -> None:
        """Close the connection, with a 408 if its first request has begun; do not cut a response under way.

        So may a client that reads, however large the answer is.
        """
        if self._is_response_under_way:
            self._deadlines.set(self, self.limits.head_seconds)
        elif self._is_leaving:
            self.transport.abort()
        elif unread_bytes := self.transport.get_write_buffer_size():
            self._await_reader(unread_bytes)
        elif self._is_at_its_first_request and self._idle_bytes:
            self._refuse(too_slow(self.limits.head_seconds))
        else:
            self._stop_reading()
            self.transport.close()

    @property
    def _is_at_its_first_request(self) -> bool:
        """Return whether no headers are complete yet."""
        return self.cycle is None

    @property
    def _is_inside_head(self) -> bool:
        """Return whether the newest request's headers are incomplete; also true before the first byte."""
        return self._is_at_its_first_request or self.cycle.scope is not self.scope

    @property
    def _is_response_under_way(self) -> bool:
        cycle = self.cycle
        return cycle is not None and not cycle.response_complete and not cycle.disconnected

    def _await_reader(self, unread_bytes: int) -> None:
        """Go on waiting for a client that reads; cut one that does not."""
        if unread_bytes > self._unread_bytes - LEAST_READ_BYTES:
            self.transport.abort()
            return
        self._unread_bytes = float(unread_bytes)
        self._deadlines.set(self, self.limits.read_seconds)

    def _feed_closely(self, data: bytes) -> None:
        """Feed the parser up to the limit; refuse headers (or trailers) that are longer.

        The limit also holds for what follows a response, as a body that the application does not read. Of pipelined
        requests only a few are parsed before the first is served: a packet can hold thousands.
        """
        rest = memoryview(data)
        while rest and not self._is_leaving and not self.transport.is_closing():
            if self.pipeline:
                self._let_wait(rest)
                return
            cycle = self.cycle
            is_in_body = cycle is not None and cycle.scope is self.scope and cycle.more_body
            room = MAX_HEAD_BYTES - self._idle_bytes
            size = room if is_in_body else min(room, ONE_PACKET_BYTES)
            piece, rest = rest[:size], rest[size:]
            body_bytes = 0 if cycle is None else len(cycle.body)
            self._feed(piece)
            is_idle = self.cycle is cycle and (cycle is None or len(cycle.body) == body_bytes)
            self._idle_bytes = self._idle_bytes + len(piece) if is_idle else 0
            self._update_deadline()
            if self._idle_bytes == MAX_HEAD_BYTES and not self._is_leaving:
                self._refuse(LONG_HEAD)

    def _let_wait(self, data: memoryview) -> None:
        """Keep what is behind pipelined requests, and stop reading until they are served."""
        self._waiting += data
        self._is_complete = False
        self.flow.pause_reading()
        if len(self._waiting) > MAX_WAITING_BYTES:  # an application that waits for a disconnect lets uvicorn read on
            self.transport.abort()

    def _update_deadline(self) -> None:
        """Set or clear the deadline: headers have one from their first byte on; the application limits a body's time.

        Bytes after a response that are no request (uvicorn stops its own keep-alive timer then) count as headers.
        """
        if self._is_leaving:
            return
        if self._is_inside_head or self.cycle.response_complete:
            is_new = self._awaited_scope is not self.scope and not self._is_at_its_first_request
            if is_new or self not in self._deadlines:  # as when the fast path served the first requests
                self._awaited_scope = self.scope
                self._deadlines.set(self, self.limits.head_seconds)
            return
        self._awaited_scope = None
        self._deadlines.clear(self)
        self._is_complete = not self.cycle.more_body
        if self._is_complete:
            self._idle_bytes = 0

    def _refuse(self, fault: HeadFault) -> None:
        """Refuse the newest request and end the connection, after the responses to complete requests before it.

        The client may still be sending. If we closed at once, it would meet a reset before it reads the reason.
        """
        self._stop_reading()
        cycle = self.cycle
        if self._is_response_under_way and (self._is_inside_head or self.pipeline):
            self.shutdown()  # uvicorn closes after the last response
            return
        if self._is_inside_head or not cycle.response_started:
            self.transport.write(refusal_bytes(fault, self.server_state.default_headers))
        if cycle is not None:
            cycle.disconnected = True
            cycle.message_event.set()
        self.transport.write_eof()

    def says_goodbye(self) -> bool:
        """Return whether the connection stays for a moment, because its client still sends the body of its request.

        What it sends is discarded. If we closed at once, it would meet a reset before it reads the response.
        """
        cycle = self.cycle
        if self._is_leaving or cycle is None or not (cycle.more_body and cycle.response_complete):
            return False
        self._stop_reading()
        self.flow.resume_reading()
        self._cork.write_eof()
        return True

    def _stop_reading(self) -> None:
        self._is_leaving = True
        self._is_complete = False
        self._deadlines.set(self, self.limits.goodbye_seconds)


def _framed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """Return the application with the right framing of its response to this request.

    - A client that was not told to continue may send its body or not, so the connection ends with the response.
    - A client of HTTP/1.0 knows no chunks, so a response of unknown length ends with the connection.
    """
    is_old = cycle.scope["http_version"] == "1.0"

    async def call(scope: Any, receive: Any, send: Any) -> None:
        ends_with_connection = False

        async def send_framed(message: Any) -> None:
            nonlocal ends_with_connection
            if message["type"] == "http.response.start":
                if cycle.waiting_for_100_continue:
                    cycle.keep_alive = False
                if is_old and not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                    ends_with_connection = True
                    cycle.chunked_encoding = False
            elif ends_with_connection:
                cycle.expected_content_length = len(message.get("body", b""))  # uvicorn subtracts it at once
            await send(message)

        await app(scope, receive, send_framed)

    return call
