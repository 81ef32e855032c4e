"""The fast path: what a server's connection and the lanes, each of some paths, know of each other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from enum import StrEnum
from typing import Any, Protocol

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


class CutReason(StrEnum):
    """Why a request was ended from our side; the values stand in the job ledger."""

    CLIENT_LEFT = "client_left"
    CLIENT_TOO_SLOW = "client_too_slow"
    KEY_REVOKED = "key_revoked"
    BODY_TOO_SLOW = "body_too_slow"
    SHUTDOWN = "shutdown"


HANDED_OVER = "lucid.handed_over"  # in scope["extensions"]: the admission that the fast path began and passes on
Response = tuple[int, Headers, bytes]  # status, headers and body


class FastPathClient(Protocol):
    """A connection that sent one complete request. One of the three is called, once, perhaps before `take` returns."""

    server: tuple[str, int | None] | None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write the response; its length is among the headers."""

    def go_on(self, begun: object) -> None:
        """Pass the request on to the lane's ASGI entrance, which finds `begun` in the scope."""

    def hang_up(self) -> None:
        """Close without a response."""


class FastPathRequest(Protocol):
    """A request that was taken."""

    def leave(self) -> None:
        """Note that its client left."""


class FastPath(Protocol):
    """Serves requests that came whole, without a task."""

    def take(
        self, client: FastPathClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> FastPathRequest | None:
        """Take a request. Return it while it waits; None when it was answered or passed on already."""


FastPaths = Mapping[bytes, FastPath]  # by path
