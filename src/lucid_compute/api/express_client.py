"""What a server's connection and the express lanes know of each other; each lane takes the requests of its paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from lucid_compute.inference.call import Headers
from lucid_compute.inference.exchange import CutReason

HANDED_OVER = "lucid.handed_over"  # in scope["extensions"]: what an express lane began and leaves to the ordinary one


class ExpressClient(Protocol):
    """A connection that sent one whole request and waits for its answer. One of the three is called, once."""

    server: tuple[str, int | None] | None

    def answer(self, status: int, headers: Headers, body: bytes) -> None:
        """Write the answer; its length is among the headers."""

    def go_on(self, begun: object) -> None:
        """Have the ordinary lane answer the same request; it finds `begun` in the scope."""

    def hang_up(self) -> None:
        """Close without an answer."""


class Refusal(NamedTuple):
    """What a request is answered with at once, in place of being taken."""

    status: int
    headers: Headers
    body: bytes


class ExpressRequest(Protocol):
    """A request that was taken."""

    def end(self, reason: CutReason) -> None:
        """End it, because its client left."""


class ExpressLane(Protocol):
    """Takes requests, and answers them later."""

    def take(
        self, client: ExpressClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> ExpressRequest | Refusal | None:
        """Serve a request, which is to be ended if its client leaves; None when it is one for the ordinary lane."""


ExpressLanes = Mapping[bytes, ExpressLane]  # by path
