"""A lane's client behind ASGI: requests that the fast path leaves to uvicorn, and all requests of another ASGI server.

These are requests with large, chunked or compressed bodies, with unusual headers, or below a sub-path.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, MutableMapping
from contextlib import suppress
from typing import Any

from starlette.types import Receive, Scope

from lucid_compute.registry.keys.authentication import KEY_HEADERS, authorization_of
from lucid_compute.server.http_protocol import ABORT
from lucid_compute.web.lanes import CutReason, Headers, IncomingRequest, Lane, LaneRequest, Send

ERROR_SECONDS = 1.0


class AsgiClient:
    """The client of one ASGI request, which `serve` passes on to a lane. It sends what the lane writes."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.server: tuple[str, int | None] | None = scope.get("server")
        self._scope = scope
        self._receive = receive
        self._send = send
        self._messages: deque[dict[str, Any]] = deque()
        self._is_sending = self._is_over = False
        self._written = asyncio.Event()
        self._accepted: LaneRequest | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def serve(self, lane: Lane) -> None:
        """Serve the request."""
        scope = self._scope
        headers = dict(scope["headers"])
        if authorization_of(scope, headers) is None:
            for name in KEY_HEADERS:
                headers.pop(name, None)  # two keys are none
        request = IncomingRequest(
            scope["path"], headers, None, scope["method"], self._receive_body, scope.get("query_string", b"")
        )
        self._accepted = lane.accept(self, request)
        try:
            await self._send_messages()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._accepted is None or task is None:
                raise
            task.uncancel()  # the server cancels what still runs when its grace is over
            self._accepted.end(CutReason.SHUTDOWN)
            with suppress(TimeoutError):
                async with asyncio.timeout(ERROR_SECONDS):
                    await self._send_messages()
        finally:
            self._accepted = None
            if self._watcher is not None:
                self._watcher.cancel()

    # --- called by lanes

    @property
    def is_full(self) -> bool:
        """Return whether the client has not read what was written."""
        return self._is_sending or bool(self._messages)

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a complete response."""
        self.begin(status, headers)
        self.write(body, more=False)

    def begin(self, status: int, headers: Headers) -> None:
        """Begin a response of unknown length."""
        self._put({"type": "http.response.start", "status": status, "headers": headers})

    def write(self, data: bytes, *, more: bool) -> None:
        """Write a part of the response; not `more`: it is the last."""
        self._put({"type": "http.response.body", "body": data, "more_body": more})

    def hang_up(self) -> None:
        """Close the connection where the server can do that; else end without a response."""
        self._messages.clear()
        self._is_over = True
        self._written.set()
        if (abort := self._scope.get("extensions", {}).get(ABORT)) is not None:
            abort()

    async def find_address(self, headers: Mapping[bytes, bytes]) -> str | None:  # noqa: ARG002 - the server has read them
        """Return the client's IP address."""
        client = self._scope.get("client")
        return client and client[0]

    # --- private

    def _put(self, message: dict[str, Any]) -> None:
        self._messages.append(message)
        self._written.set()

    async def _send_messages(self) -> None:
        """Send what the lane writes, until the response is complete or the connection is closed."""
        while not self._is_over:
            if not self._messages:
                self._written.clear()
                await self._written.wait()
                continue
            message = self._messages.popleft()
            self._is_sending = True
            try:
                await self._send(message)
            except OSError:  # how servers other than uvicorn say that the client left
                self._leave()
            except Exception as error:  # noqa: BLE001 - the job has to say so
                if self._accepted is not None:
                    self._accepted.fail(error)
                self.hang_up()
            self._is_sending = False
            self._is_over |= not message.get("more_body", True)
            if self._accepted is not None and not self.is_full and not self._is_over:
                self._accepted.go_on()

    async def _receive_body(self) -> MutableMapping[str, Any]:
        """Return the next part of the body; after the last one, wait for the client to leave."""
        message = await self._receive()
        if message["type"] == "http.request" and not message.get("more_body"):
            self._watcher = asyncio.create_task(self._await_disconnect())
        return message

    async def _await_disconnect(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        if self._accepted is not None and not self._is_over:
            self._accepted.end(CutReason.CLIENT_LEFT)
