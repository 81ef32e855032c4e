"""The fast path's contract between a server's connections and the lanes, each of which serves some paths."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from enum import StrEnum
from typing import Any, Protocol

PASSED_ON = "lucid.passed_on"  # in scope["extensions"]: the admission that the fast path began and passes on
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
Response = tuple[int, Headers, bytes]  # status, headers and body


class CutReason(StrEnum):
    """Why the service ended a request; the values are in the job ledger."""

    CLIENT_LEFT = "client_left"
    CLIENT_TOO_SLOW = "client_too_slow"
    KEY_REVOKED = "key_revoked"
    BODY_TOO_SLOW = "body_too_slow"
    SHUTDOWN = "shutdown"


class FastPathClient(Protocol):
    """A connection that sent one complete request. One method is called, once, perhaps before `accept` returns."""

    server: tuple[str, int | None] | None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write the response; its length is among the headers."""

    def pass_on(self, begun: object) -> None:
        """Pass the request on to the lane's ASGI entrance, which finds `begun` in the scope."""

    def hang_up(self) -> None:
        """Close without a response."""


class FastPathRequest(Protocol):
    """A request that a lane accepted and has not answered yet."""

    def leave(self) -> None:
        """Handle that the client left."""


class FastPath(Protocol):
    """A lane's entrance for complete requests, which it serves without a task."""

    def accept(
        self, client: FastPathClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> FastPathRequest | None:
        """Accept a request. Return it while it waits; None when it was answered or passed on already."""


FastPaths = Mapping[bytes, FastPath]  # by path
