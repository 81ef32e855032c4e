"""The fast path: what a server's connection and the lanes, each of some paths, know of each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

HANDED_OVER = "lucid.handed_over"  # in scope["extensions"]: the admission that the fast path began and passes on
Headers = list[tuple[bytes, bytes]]
Response = tuple[int, Headers, bytes]  # status, headers and body


class ExpressClient(Protocol):
    """A connection that sent one complete request. One of the three is called, once, perhaps before `take` returns."""

    server: tuple[str, int | None] | None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write the response; its length is among the headers."""

    def go_on(self, begun: object) -> None:
        """Pass the request on to the lane's ASGI entrance, which finds `begun` in the scope."""

    def hang_up(self) -> None:
        """Close without a response."""


class ExpressRequest(Protocol):
    """A request that was taken."""

    def leave(self) -> None:
        """Note that its client left."""


class ExpressLane(Protocol):
    """Serves requests that came whole, without a task."""

    def take(
        self, client: ExpressClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> ExpressRequest | None:
        """Take a request. Return it while it waits; None when it was answered or passed on already."""


ExpressLanes = Mapping[bytes, ExpressLane]  # by path
