"""Clients of the fast path in the test's own loop, in place of a connection."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx

from lucid_compute.gateway.lane import ENDPOINTS, InferenceAdmission
from lucid_compute.registry.heartbeat_lane import PATH
from lucid_compute.server.app import LucidApp
from lucid_compute.server.fast_path import MAX_REQUEST_BYTES, UNUSUAL
from lucid_compute.web.lanes import PASSED_ON
from tests.api import Api


class Client:
    """A connection that sent one request to the fast path; `told` is what became of it."""

    server: tuple[str, int | None] | None = ("127.0.0.1", 1)

    def __init__(self) -> None:
        self.told: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def answer(self, *response: Any) -> None:
        """Take a response, of which only the status is kept."""
        self.told.set_result(response[0])

    def pass_on(self, begun: object) -> None:
        """Drop what was begun."""
        assert isinstance(begun, InferenceAdmission)
        if begun.ending is None:
            self.told.set_result("passed on")
        else:
            self.told.set_result("handed over" if begun.ending.failed is None else "failed")

    def hang_up(self) -> None:
        """Close."""
        self.told.set_result("hung up")


Entrance = Callable[[Api], Api]
"""Returns the same replica, spoken to at one of the two entrances of its lanes."""


class _Connection(Client):
    """A connection that keeps a whole response, or what is to be passed on."""

    def answer(self, *response: Any) -> None:
        self.told.set_result(response)

    def pass_on(self, begun: object) -> None:
        self.told.set_result(begun)


class FastPath(httpx.AsyncBaseTransport):
    """Sends requests as a worker's connection does: to a lane's fast path first, and by ASGI what that passes on.

    `responses` counts what the fast path answered, `passed_on` what it did not.
    """

    def __init__(self, app: LucidApp) -> None:
        self._app = app
        self.responses = self.passed_on = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Return the response to a request."""
        extensions: dict[str, object] = {}
        lane = self._app._inference if request.url.path in ENDPOINTS else self._app._heartbeats
        body = await request.aread()
        is_for_a_lane = request.url.path in {*ENDPOINTS, PATH}
        headers = {name.lower(): value for name, value in request.headers.raw}
        is_usual = UNUSUAL.isdisjoint(headers) and len(headers) == len(request.headers.raw)
        if request.method == "POST" and is_for_a_lane and is_usual and len(body) <= MAX_REQUEST_BYTES:
            assert lane is not None
            client = _Connection()
            lane.accept(client, request.url.raw_path, headers, body)
            told: Any = await client.told
            if isinstance(told, tuple):
                self.responses += 1
                status, sent, body = told
                return httpx.Response(status, headers=sent, content=body)
            self.passed_on += 1
            extensions = {PASSED_ON: told}

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await self._app({**scope, "extensions": extensions}, receive, send)

        return await httpx.ASGITransport(app, client=("127.0.0.1", 40000)).handle_async_request(request)
