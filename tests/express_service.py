"""A server with the fast path's protocol and short deadlines, before a lane that responds when the test says so."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import uvicorn

from lucid_compute.server.app import LANES
from lucid_compute.server.fast_path import FastPathProtocol
from lucid_compute.server.http_protocol import ConnectionLimits
from lucid_compute.web.lanes import CutReason, IncomingRequest
from tests.lucid_serve import eventually
from tests.raw_client import PATIENCE_SECONDS

SECONDS = 1.0  # of each deadline
LARGE = 16_000_000  # as long as an answer may be, and far more than sockets hold
WAITS, AT_ONCE, LONG, FULL = "/v1/waits", "/v1/at-once", "/v1/long", "/v1/full"


def post(path: str, body: bytes = b"{}") -> bytes:
    """Return a request's bytes."""
    return b"POST %b HTTP/1.1\r\nHost: lucid\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)


class HastyProtocol(FastPathProtocol):
    """The protocol with short deadlines."""

    limits = ConnectionLimits(SECONDS, SECONDS, SECONDS, sweep_seconds=0.05)


class Accepted:
    """A request that the lane has accepted, in place of an exchange."""

    def __init__(self, lane: Lane, client: FastPathProtocol) -> None:
        self._lane, self._client = lane, client

    def end(self, _: CutReason) -> None:
        """End as an exchange does whose client left."""
        self._lane.accepted.remove(self)
        self._lane.left += 1
        self._client.hang_up()

    def go_on(self) -> None:
        """Do nothing: the response is one part."""

    def answer(self, body: bytes) -> None:
        """Respond to it."""
        self._lane.accepted.remove(self)
        self._client.answer(200, [(b"content-length", b"%d" % len(body))], body)


class Lane:
    """Accepts requests to two paths: it responds to one with its own body, to the other when the test says so."""

    def __init__(self) -> None:
        self.accepted: list[Accepted] = []
        self.left = 0

    def accept(self, client: FastPathProtocol, request: IncomingRequest) -> Accepted | None:
        """Accept a request, or refuse one to a third path."""
        if request.path == FULL:
            client.answer(503, [(b"content-length", b"4")], b"full")
            return None
        accepted = Accepted(self, client)
        self.accepted.append(accepted)
        if request.path == AT_ONCE:
            asyncio.get_running_loop().call_soon(accepted.answer, request.body or b"")
        return accepted

    def answer_all(self, body: bytes) -> None:
        """Respond to all that wait, in one turn of the loop."""
        for accepted in [*self.accepted]:
            accepted.answer(body)


class Service:
    """A server in a thread, on uvloop as in a worker; its application answers with what it was sent."""

    def __init__(self) -> None:
        self.lane = Lane()
        self.faults: list[dict[str, Any]] = []  # what went wrong in callbacks
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._started = threading.Event()
        config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            loop="uvloop",
            http=HastyProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE_SECONDS)

    async def is_alone(self) -> bool:
        """Return whether no connection is left."""
        await asyncio.sleep(0.5)  # it may not have come yet
        return not self._server.server_state.connections

    async def takes(self, count: int) -> None:
        """Return once so many requests wait in the lane."""

        async def does() -> bool:
            return len(self.lane.accepted) == count

        await eventually(does)

    @property
    def kept_bytes(self) -> int:
        """Return how much of requests the open connections keep, of which there is at least one."""
        connections: list[Any] = [*self._server.server_state.connections]
        assert connections
        return sum(len(connection._request) + len(connection._held) for connection in connections)

    def answer_all(self, body: bytes = b"waited") -> None:
        """Respond to all that wait, in one turn of the loop."""
        self._loop.call_soon_threadsafe(self.lane.answer_all, body)

    def answer_and_shut_down(self) -> None:
        """Respond to all that wait, and shut down every connection in the same turn."""

        def both() -> None:
            self.lane.answer_all(b"waited")
            for connection in [*self._server.server_state.connections]:
                connection.shutdown()

        self._loop.call_soon_threadsafe(both)

    def stop(self) -> None:
        """End it, and whatever is open."""
        self._server.should_exit = True
        self._thread.join(PATIENCE_SECONDS)
        self._listener.close()
        assert not self._thread.is_alive()
        assert not self.faults

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] in {LONG, WAITS}:
            body = b"x" * LARGE
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.faults.append(context))
        scope["state"][LANES] = {path.encode(): self.lane for path in (WAITS, AT_ONCE, FULL)}
        await receive()
        await send({"type": "lifespan.startup.complete"})
        self._started.set()
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
