"""A connection's fast path: complete requests for a lane are served without uvicorn's cycle and task.

uvicorn parses all others. `asgi_client` passes those for a lane on to it. See docs/adr/0013-express-lane.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import STATUS_LINE
from uvicorn.server import ServerState

from lucid_compute.egress.write_batching import WriteBatch
from lucid_compute.server.app import LANES
from lucid_compute.server.http_protocol import UNKNOWN, HttpProtocol
from lucid_compute.server.request_head import MAX_HEADERS, HeadFault
from lucid_compute.web.lanes import CutReason, Headers, IncomingRequest, LaneRequest, Lanes

MAX_REQUEST_BYTES = 64 * 1024
MAX_HELD_BYTES = 64 * 1024
BODY_SECONDS = 0.5  # after the headers; uvicorn waits for a body that takes longer
_BEGINNINGS = (b"POST /v1/", b"POST /compute/heartbeat ")  # of the requests that lanes accept
# With one of these headers a body comes in chunks or compressed, the client waits for an interim response, the protocol
# changes, or a browser wants to know whether its page may read the response.
UNUSUAL = frozenset({b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"origin"})


class CompleteRequest(NamedTuple):
    """An HTTP/1.1 request after which the connection stays open. Names of headers are in lower case."""

    path: bytes
    headers: dict[bytes, bytes]
    body: bytes


class CompleteRequestReader:
    """Reads complete requests, one in each call. It keeps nothing of other input, so connections can share it."""

    def __init__(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._urls: list[bytes] = []
        self._parts: list[bytes] = []
        self._is_eligible = self._is_complete = False
        self._begun = 0
        self.on_header = self._headers.__setitem__  # the parser calls it without a frame of Python
        self.on_url = self._urls.append
        self.on_body = self._parts.append
        self._parser = HttpRequestParser(self)

    def on_message_begin(self) -> None:
        """Count the requests: of a second one there may be a single letter."""
        self._begun += 1

    def on_headers_complete(self) -> None:
        """Record whether the headers are of a request that can be served here."""
        parser = self._parser  # it forgets both at the end of the request
        self._is_eligible = parser.should_keep_alive() and parser.get_http_version() == "1.1"

    def on_message_complete(self) -> None:
        """Record that the request is complete."""
        self._is_complete = True

    def read(self, data: bytes) -> CompleteRequest | int | None:
        """Return the request in `data`, or the number of bytes that its body lacks; None for anything else."""
        try:
            self._parser.feed_data(data)
            result = self._result(data)
        except (HttpParserError, HttpParserUpgrade):
            result = None
        if not isinstance(result, CompleteRequest):
            self._parser = HttpRequestParser(self)  # the old one may be in the middle of a request
        self._headers.clear()
        self._urls.clear()
        self._parts.clear()
        self._is_eligible = self._is_complete = False
        self._begun = 0
        return result

    def _result(self, data: bytes) -> CompleteRequest | int | None:
        parts = self._parts
        if not self._is_eligible or self._begun != 1:
            return None
        headers = {name.lower(): value for name, value in self._headers.items()}
        # A repeated header, in any case, is left to uvicorn too, so that one place decides which of the two counts.
        if not UNUSUAL.isdisjoint(headers) or len(headers) != data.count(b"\r\n", 0, data.find(b"\r\n\r\n")):
            return None
        if b"host" not in headers or len(headers) > MAX_HEADERS:
            return None
        if not self._is_complete:
            return int(headers.get(b"content-length", b"0")) - sum(map(len, parts))
        return CompleteRequest(self._urls[0], headers, parts[0] if len(parts) == 1 else b"".join(parts))


class _Shared(NamedTuple):
    """What the connections of one server, and so of one worker, share."""

    writes: WriteBatch
    reader: CompleteRequestReader


_shared: WeakKeyDictionary[ServerState, _Shared] = WeakKeyDictionary()


def _shared_by(server: ServerState, loop: asyncio.AbstractEventLoop) -> _Shared:
    if (shared := _shared.get(server)) is None:
        shared = _shared[server] = _Shared(WriteBatch(loop), CompleteRequestReader())
    return shared


class FastPathProtocol(HttpProtocol):
    """An `HttpProtocol` that offers complete requests to the lanes of their paths; to them it is a `LaneClient`."""

    __slots__ = (
        "_accepted",
        "_closes_after",
        "_held",
        "_is_idle",
        "_lanes",
        "_missing",
        "_reader",
        "_request",
        "_socket",
        "_unwritten",
        "_writes",
    )

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Start with nothing received."""
        super().connection_made(transport)
        self._socket = transport  # without the cork: a response is written in one piece
        shared = _shared_by(self.server_state, self.loop)
        self._writes, self._reader = shared.writes, shared.reader
        self._lanes: Lanes = self.app_state.get(LANES, {})
        self._accepted: LaneRequest | None = None
        self._request = self._held = b""  # the incomplete request, and what followed an accepted one
        self._unwritten = b""  # the head of a response, which is written with its first chunk
        self._missing = 0  # bytes of the incomplete request's body
        self._closes_after = self._is_idle = False

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the lane that the client left."""
        if self._accepted is not None:
            self._accepted.end(CutReason.CLIENT_LEFT)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Offer a request to its lane, or feed uvicorn. Bytes that arrive while the lane serves one are held."""
        if self._accepted is not None:
            self._held += data
            if len(self._held) > MAX_HELD_BYTES:
                self.flow.pause_reading()  # from then on nobody notices when the client leaves
            return
        if self._missing > len(data):
            self._request += data
            self._missing -= len(data)
            return
        if self._is_idle or self._missing:
            self._deadlines.clear(self)
            data = self._request + data if self._missing else data
            self._is_idle, self._missing, self._request = False, 0, b""
        if not (data.startswith(_BEGINNINGS) and self._offer(data)):
            super().data_received(data)

    def run_out_of_time(self) -> None:
        """Feed uvicorn a request whose body is late; uvicorn's side has its own deadlines."""
        if self._missing:
            self._leave_to_uvicorn()
        else:
            super().run_out_of_time()

    def shutdown(self) -> None:
        """Close, after the response to an accepted request."""
        if self._accepted is not None:
            self._closes_after = True
            return
        if self._missing:
            self._leave_to_uvicorn()
        self._writes.flush()
        super().shutdown()

    # --- called by lanes

    @property
    def is_full(self) -> bool:
        """Return whether the client has not read what was written."""
        return self.flow.write_paused

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a complete response."""
        self._writes.write(self._socket, self._head(status, headers, b"\r\n" + body))
        self._finish()

    def begin(self, status: int, headers: Headers) -> None:
        """Begin a response in chunks."""
        self._unwritten = self._head(status, headers, b"transfer-encoding: chunked\r\n\r\n")

    def write(self, data: bytes, *, more: bool) -> None:
        """Write a chunk; not `more`: it is the last."""
        chunk = b"%b%x\r\n%b\r\n" % (self._unwritten, len(data), data) if data else self._unwritten
        self._unwritten = b""
        self._writes.write(self._socket, chunk if more else chunk + b"0\r\n\r\n")
        if not more:
            self._finish()

    def hang_up(self) -> None:
        """Close the connection."""
        self._accepted = None
        self._socket.abort()

    async def find_address(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Return the client's IP address; behind a trusted proxy the one that the proxy names in the headers."""
        scope: Any = {"type": "http", "client": self.client, "headers": [*headers.items()]}
        await ProxyHeadersMiddleware(_ignore, self.config.forwarded_allow_ips)(scope, _ignore, _ignore)  # type: ignore[arg-type]
        client = scope["client"] if self.config.proxy_headers else self.client
        return client and client[0]

    # --- called by asyncio

    def resume_writing(self) -> None:
        """Let the request go on: its client has read."""
        super().resume_writing()
        if self._accepted is not None:
            self._accepted.go_on()

    # --- private

    def _head(self, status: int, headers: Headers, rest: bytes) -> bytes:
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        if self._closes_after:
            lines.append(b"connection: close\r\n")
        lines.append(rest)
        return b"".join(lines)

    def _finish(self) -> None:
        """Wait for the next request, or close."""
        self.server_state.total_requests += 1
        self._accepted = None
        if self._closes_after:
            self.loop.call_soon(self._socket.close)
        elif self._held:
            self._feed_held()
        else:
            self._is_idle = True
            self._unread_bytes = UNKNOWN
            self._deadlines.set(self, self.timeout_keep_alive)

    def _offer(self, data: bytes) -> bool:
        """Return whether a lane accepted the request, which it may finish at once, or its body is awaited."""
        if len(data) > MAX_REQUEST_BYTES or not self._is_between_requests:
            return False
        request = self._reader.read(data)
        if request is None:
            return False
        if isinstance(request, int):
            return self._await_body(data, request)
        lane = self._lanes.get(request.path)
        if lane is None:
            return False
        self._deadlines.clear(self)
        self._unset_keepalive_if_required()
        path, headers, body = request
        self._accepted = lane.accept(self, IncomingRequest(path.decode(), headers, body))
        return True

    def _await_body(self, data: bytes, missing: int) -> bool:
        """Wait a moment for the body, unless it is long: many clients send it in a packet of its own."""
        if len(data) + missing > MAX_REQUEST_BYTES:
            return False
        self._request, self._missing = data, missing
        self._unset_keepalive_if_required()
        self._deadlines.set(self, BODY_SECONDS)
        return True

    def _refuse(self, fault: HeadFault) -> None:
        self._writes.flush()  # a response among them comes first
        super()._refuse(fault)

    def _leave_to_uvicorn(self) -> None:
        self._deadlines.clear(self)
        request, self._request, self._missing = self._request, b"", 0
        super().data_received(request)

    @property
    def _is_between_requests(self) -> bool:
        """Return whether uvicorn expects a request's first byte, and the client reads what we write."""
        cycle = self.cycle
        if self._is_leaving or self._idle_bytes or self.flow.write_paused or self._socket.is_closing():
            return False
        if self._is_at_its_first_request:
            return True
        return cycle.response_complete and not cycle.more_body and cycle.scope is self.scope and not self.pipeline

    def _feed_held(self) -> None:
        held, self._held = self._held, b""
        self.flow.resume_reading()
        self.data_received(held)


async def _ignore(*_: object) -> None:
    """Stand for an application that is not called."""
