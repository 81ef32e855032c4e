"""The contract between a server's connections and the lanes, each of which serves some paths without ASGI.

A lane works in callbacks. A task runs only while something is awaited (`Steps`). See docs/adr/0013-express-lane.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from enum import StrEnum
from typing import Any, NamedTuple, Protocol

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Headers = list[tuple[bytes, bytes]]
Response = tuple[int, Headers, bytes]  # status, headers and body


class CutReason(StrEnum):
    """Why the service ended a request; the values are in the job ledger."""

    CLIENT_LEFT = "client_left"
    CLIENT_TOO_SLOW = "client_too_slow"
    KEY_REVOKED = "key_revoked"
    BODY_TOO_SLOW = "body_too_slow"
    SHUTDOWN = "shutdown"


class LaneClient(Protocol):
    """The client of one request. It is sent one response: by `answer`, or by `begin` and then `write` up to the last.

    After that, or after `hang_up`, no method is called. `server` is the address that the client connected to.
    """

    @property
    def server(self) -> tuple[str, int | None] | None:
        """The address of this service that the client connected to."""

    @property
    def is_full(self) -> bool:
        """Return whether the client has not read what was written. The request's `go_on` is called when it has."""

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write a complete response; its length is among the headers."""

    def begin(self, status: int, headers: Headers) -> None:
        """Begin a response of unknown length."""

    def write(self, data: bytes, *, more: bool) -> None:
        """Write a part of the response that has begun; not `more`: it is the last."""

    def hang_up(self) -> None:
        """Close the connection, with an incomplete response or without one."""

    async def find_address(self, headers: Mapping[bytes, bytes]) -> str | None:
        """Return the client's IP address; behind a trusted proxy the one that the proxy names in the headers."""


class IncomingRequest(NamedTuple):
    """A request for a lane. Names of headers are in lower case. A `body` of None is read by `receive`, as ASGI does.

    `query` follows the path's question mark.
    """

    path: str
    headers: dict[bytes, bytes]
    body: bytes | None
    method: str = "POST"
    receive: Receive | None = None
    query: bytes = b""


class LaneRequest(Protocol):
    """A request that a lane accepted and has not answered completely."""

    def end(self, reason: CutReason) -> None:
        """End it before its response is complete, because the client left or the service stops."""

    def fail(self, error: Exception) -> None:
        """End it because this service failed."""

    def go_on(self) -> None:
        """Continue: the client has read what was written."""


class Lane(Protocol):
    """Serves the requests of some paths."""

    def accept(self, client: LaneClient, request: IncomingRequest) -> LaneRequest | None:
        """Accept a request. Return it while it waits; None when it was answered already."""


Lanes = Mapping[bytes, Lane]  # by path
Wait = Callable[[], Awaitable[None]]
"""What must be awaited before the next step."""


class Steps:
    """Work in steps, each of which returns what must be awaited before the next one."""

    _task: asyncio.Task[None] | None = None

    def step(self) -> Wait | None:
        """Do what can be done at once; return what must be awaited before the next step, None to wait for a callback.

        Raises:
            Exception: the work failed.
        """
        raise NotImplementedError

    def fail(self, error: Exception) -> None:
        """End the work, because a step failed or what it awaited."""
        raise NotImplementedError

    @property
    def is_waiting(self) -> bool:
        """Return whether something is awaited."""
        return self._task is not None

    def advance(self) -> None:
        """Do the next step, and further ones in a task if something must be awaited."""
        try:
            wait = self.step()
        except Exception as error:  # noqa: BLE001 - `fail` makes a response of any error
            self.fail(error)
        else:
            if wait is not None:
                self._task = asyncio.create_task(self._continue(wait))

    def stop_waiting(self) -> None:
        """Cancel what is awaited."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _continue(self, wait: Wait | None) -> None:
        try:
            while wait is not None:
                await wait()
                wait = self.step()
            self._task = None  # a cycle, which only garbage collection would free
        except Exception as error:  # noqa: BLE001 - as above
            self._task = None
            self.fail(error)
