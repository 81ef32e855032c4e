"""Clients of the lanes in the test's own loop, in place of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx

from lucid_compute.gateway.endpoints import PATHS
from lucid_compute.registry.heartbeat_lane import PATH
from lucid_compute.server.app import LucidApp
from lucid_compute.server.fast_path import MAX_REQUEST_BYTES, UNUSUAL
from lucid_compute.web.lanes import CutReason, Headers, IncomingRequest, Lane
from tests.api import Api

HANGS_UP = httpx.RemoteProtocolError("the service hung up")


class Client:
    """A connection that sent one request; `told` is the status of its response, or "hung up"."""

    server: tuple[str, int | None] | None = ("127.0.0.1", 1)
    is_full = False

    def __init__(self) -> None:
        self.told: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self.headers: Headers = []
        self.parts: asyncio.Queue[bytes | None] = asyncio.Queue()  # of the body; the last is None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Take a complete response."""
        self.begin(status, headers)
        self.write(body, more=False)

    def begin(self, status: int, headers: Headers) -> None:
        """Take the beginning of a response."""
        self.headers = headers
        self.told.set_result(status)

    def write(self, data: bytes, *, more: bool) -> None:
        """Take a part of a response."""
        self.parts.put_nowait(data)
        if not more:
            self.parts.put_nowait(None)

    def hang_up(self) -> None:
        """Close."""
        self.parts.put_nowait(None)
        if not self.told.done():
            self.told.set_result("hung up")

    async def find_address(self, _: Mapping[bytes, bytes]) -> str | None:
        """Return the client's address."""
        return "127.0.0.1"

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the parts of the body."""
        while (part := await self.parts.get()) is not None:
            yield part


Entrance = Callable[[Api], Api]
"""Returns the same replica, spoken to at one of the two entrances of its lanes."""


class FastPath(httpx.AsyncBaseTransport):
    """Sends requests as a worker's connection does: complete ones to a lane, the others by ASGI.

    `responses` counts what was answered in the turn in which it came, or in callbacks; `tasks` what took a task.
    """

    def __init__(self, app: LucidApp) -> None:
        self._app = app
        self.responses = self.tasks = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the response to a request."""
        body = await request.aread()
        headers = {name.lower(): value for name, value in request.headers.raw}
        is_usual = UNUSUAL.isdisjoint(headers) and len(headers) == len(request.headers.raw)
        is_for_a_lane = request.method == "POST" and request.url.path in {*PATHS, PATH}
        if is_for_a_lane and is_usual and len(body) <= MAX_REQUEST_BYTES:
            lane: Lane = self._app.heartbeats if request.url.path == PATH else self._app.inference
            return await self._ask(lane, IncomingRequest(request.url.path, headers, body))
        return await httpx.ASGITransport(self._app, client=("127.0.0.1", 40000)).handle_async_request(request)

    async def _ask(self, lane: Lane, request: IncomingRequest) -> httpx.Response:
        client = Client()
        accepted: Any = lane.accept(client, request)
        if accepted is not None and accepted.is_waiting:
            self.tasks += 1
        else:
            self.responses += 1
        try:
            status = await client.told
        except asyncio.CancelledError:
            accepted.end(CutReason.CLIENT_LEFT)
            raise
        if not isinstance(status, int):
            raise HANGS_UP
        return httpx.Response(status, headers=client.headers, content=client.body())
