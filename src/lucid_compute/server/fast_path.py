"""One connection: what the express lane takes is served without uvicorn's cycle and task, all else by uvicorn."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from lucid_compute.egress.write_batching import WriteBatch
from lucid_compute.server.app import EXPRESS
from lucid_compute.server.http_protocol import UNKNOWN, HttpProtocol
from lucid_compute.web.lanes import HANDED_OVER, FastPathRequest, FastPaths, Headers

# A request with one of these is not what it seems: it comes in parts, waits for a word of ours, or changes protocol.
_UNUSUAL = frozenset({b"transfer-encoding", b"expect", b"upgrade"})


class WholeRequest(NamedTuple):
    """A request of HTTP/1.1 after which the connection stays open. Names of headers are in lower case."""

    path: bytes
    headers: dict[bytes, bytes]
    body: bytes


class WholeRequestReader:
    """Reads such requests one after another; what is not one leaves nothing behind."""

    def __init__(self) -> None:
        self._headers: dict[bytes, bytes] = {}
        self._urls: list[bytes] = []
        self._parts: list[bytes] = []
        self._is_fit = self._is_over = False
        self._begun = 0
        self.on_header = self._headers.__setitem__  # as the parser's callback, without a frame for each header
        self.on_url = self._urls.append
        self.on_body = self._parts.append
        self._parser = HttpRequestParser(self)

    def on_message_begin(self) -> None:
        """Count it: of a request behind the first, a letter may be all that has come."""
        self._begun += 1

    def on_headers_complete(self) -> None:
        """Note that the headers are whole, and whether they are of a request that can be served here."""
        parser = self._parser  # it has forgotten both when the request is over
        self._is_fit = parser.should_keep_alive() and parser.get_http_version() == "1.1"

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        self._is_over = True

    def read(self, data: bytes) -> WholeRequest | int | None:
        """Return the request that `data` is, or how many bytes of its body are missing; None for anything else."""
        try:
            self._parser.feed_data(data)
            found = self._found(data)
        except (HttpParserError, HttpParserUpgrade):
            found = None
        if not isinstance(found, WholeRequest):
            self._parser = HttpRequestParser(self)  # it may be in the middle of something
        self._headers.clear()
        self._urls.clear()
        self._parts.clear()
        self._is_fit = self._is_over = False
        self._begun = 0
        return found

    def _found(self, data: bytes) -> WholeRequest | int | None:
        parts = self._parts
        if not self._is_fit or self._begun != 1:
            return None
        headers = {name.lower(): value for name, value in self._headers.items()}
        # Nor is one in which a header stands twice, in whatever case: which of the two counts is said in one place.
        if not _UNUSUAL.isdisjoint(headers) or len(headers) != data.count(b"\r\n", 0, data.find(b"\r\n\r\n")):
            return None
        if not self._is_over:
            return int(headers.get(b"content-length", b"0")) - sum(map(len, parts))
        return WholeRequest(self._urls[0], headers, parts[0] if len(parts) == 1 else b"".join(parts))


MAX_REQUEST_BYTES = 64 * 1024
MAX_HELD_BYTES = 64 * 1024
BODY_SECONDS = 0.5  # after the headers; a body that takes longer is uvicorn's to wait for
_BEGINNINGS = (b"POST /v1/", b"POST /compute/heartbeat ")  # of what there are lanes for
_late_writes = WriteBatch()
_reader = WholeRequestReader()  # each worker's: it reads a request in one call, so connections can share it


class FastPathProtocol(HttpProtocol):
    """A `GuardedProtocol` whose requests to some paths may be served at once; to that end it is an `ExpressClient`."""

    __slots__ = ("_closes_after", "_held", "_is_resting", "_lanes", "_missing", "_request", "_socket", "_taken")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin."""
        super().connection_made(transport)
        self._socket = transport  # without the cork: an answer is written as a whole
        self._lanes: FastPaths = self.app_state.get(EXPRESS, {})
        self._taken: FastPathRequest | None = None
        self._request = self._held = b""  # the request that is served or not whole, and what came after it
        self._missing = 0  # bytes of a request's body, while nobody knows of it yet
        self._closes_after = self._is_resting = False

    def connection_lost(self, exc: Exception | None) -> None:
        """End what is served."""
        if self._taken is not None:
            self._taken.leave()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Serve a request at once, or feed uvicorn; what comes while one is served waits."""
        if self._taken is not None:
            self._held += data
            if len(self._held) > MAX_HELD_BYTES:
                self.flow.pause_reading()  # and from then on it is not noticed when the client leaves
            return
        if self._missing > len(data):
            self._request += data
            self._missing -= len(data)
            return
        if self._is_resting or self._missing:
            self._deadlines.clear(self)
            data = self._request + data if self._missing else data
            self._is_resting, self._missing, self._request = False, 0, b""
        if not (data.startswith(_BEGINNINGS) and self._take(data)):
            super().data_received(data)

    def run_out_of_time(self) -> None:
        """Feed uvicorn a request whose body does not come, which has deadlines of its own for that."""
        if self._missing:
            self._leave_to_uvicorn()
        else:
            super().run_out_of_time()

    def shutdown(self) -> None:
        """Close, after the answer that is awaited."""
        if self._taken is not None:
            self._closes_after = True
            return
        if self._missing:
            self._leave_to_uvicorn()
        _late_writes.flush()
        super().shutdown()

    # --- what the express lane calls

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write an answer."""
        lines = [STATUS_LINE[status]]
        for name, value in (*self.server_state.default_headers, *headers):
            lines += (name, b": ", value, b"\r\n")
        if self._closes_after:
            lines.append(b"connection: close\r\n")
        lines += (b"\r\n", body)
        _late_writes.write(self._socket, b"".join(lines))
        self.server_state.total_requests += 1
        self._taken, self._request = None, b""
        if self._closes_after:
            self.loop.call_soon(self._socket.close)
        elif self._held:
            self._take_held()
        else:
            self._is_resting = True
            self._unread_bytes = UNKNOWN
            self._deadlines.set(self, self.timeout_keep_alive)

    def go_on(self, begun: object) -> None:
        """Feed uvicorn the request; its lane finds in the scope what was begun."""
        self._taken = None
        usual = self._extensions
        self._extensions = {**usual, HANDED_OVER: begun}
        request, self._request = self._request, b""
        super().data_received(request)
        self._extensions = usual
        if self._closes_after:
            super().shutdown()
        if self._held:
            self._take_held()

    def hang_up(self) -> None:
        """Close without an answer."""
        self._taken = None
        self._socket.abort()

    # --- inside

    def _take(self, data: bytes) -> bool:
        """Return whether a lane took the request, or its rest is awaited. A lane may respond or pass it on at once."""
        if len(data) > MAX_REQUEST_BYTES or not self._is_between_requests:
            return False
        request = _reader.read(data)
        if request is None:
            return False
        if isinstance(request, int):
            return self._await_body(data, request)
        lane = self._lanes.get(request.path)
        if lane is None:
            return False
        self._deadlines.clear(self)
        self._unset_keepalive_if_required()
        self._request = data
        self._taken = lane.take(self, *request)
        return True

    def _await_body(self, data: bytes, missing: int) -> bool:
        """Wait a moment for the body, which many clients send in a packet of its own, unless it is a long one."""
        if len(data) + missing > MAX_REQUEST_BYTES:
            return False
        self._request, self._missing = data, missing
        self._unset_keepalive_if_required()
        self._deadlines.set(self, BODY_SECONDS)
        return True

    def _refuse(self, status: HTTPStatus) -> None:
        _late_writes.flush()  # an answer may be among them, which comes first
        super()._refuse(status)

    def _leave_to_uvicorn(self) -> None:
        self._deadlines.clear(self)
        request, self._request, self._missing = self._request, b"", 0
        super().data_received(request)

    @property
    def _is_between_requests(self) -> bool:
        """Return whether uvicorn expects a request's first byte, and the client reads what it is sent."""
        cycle = self.cycle
        if self._is_leaving or self._idle_bytes or self.flow.write_paused or self._socket.is_closing():
            return False
        if self._is_at_its_first_request:
            return True
        return cycle.response_complete and not cycle.more_body and cycle.scope is self.scope and not self.pipeline

    def _take_held(self) -> None:
        held, self._held = self._held, b""
        self.flow.resume_reading()
        self.data_received(held)
