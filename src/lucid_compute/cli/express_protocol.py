"""One connection: what the express lane takes is served without uvicorn's cycle and task, all else by uvicorn."""

from __future__ import annotations

import asyncio
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from lucid_compute.api.app import EXPRESS
from lucid_compute.api.express_client import HANDED_OVER, ExpressLanes, ExpressRequest, Headers
from lucid_compute.cli.guarded_protocol import UNKNOWN, GuardedProtocol
from lucid_compute.cli.whole_request import WholeRequestReader
from lucid_compute.egress.late_writes import LateWrites

MAX_REQUEST_BYTES = 64 * 1024
MAX_HELD_BYTES = 64 * 1024
BODY_SECONDS = 0.5  # after the headers; a body that takes longer is uvicorn's to wait for
_BEGINNINGS = (b"POST /v1/", b"POST /compute/heartbeat ")  # of what there are lanes for
_late_writes = LateWrites()
_reader = WholeRequestReader()  # each worker's: it reads a request in one call, so connections can share it


class ExpressProtocol(GuardedProtocol):
    """A `GuardedProtocol` whose requests to some paths may be served at once; to that end it is an `ExpressClient`."""

    __slots__ = ("_closes_after", "_held", "_is_resting", "_lanes", "_missing", "_request", "_socket", "_taken")

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        """Begin."""
        super().connection_made(transport)
        self._socket = transport  # without the cork: an answer is written as a whole
        self._lanes: ExpressLanes = self.app_state.get(EXPRESS, {})
        self._taken: ExpressRequest | None = None
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
        """Whether a lane has the request, or its rest is waited for; a lane may respond or pass it on at once."""
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
        """Whether uvicorn expects a request's first byte, and the client reads what it is sent."""
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
