"""A client of an express lane in the test's own loop, in place of a connection."""

from __future__ import annotations

import asyncio

from lucid_compute.inference.call import Headers
from lucid_compute.inference.express import HandedOver


class Client:
    """A connection of the express lane; `told` is what became of its request."""

    server: tuple[str, int | None] | None = ("127.0.0.1", 1)

    def __init__(self) -> None:
        """Wait."""
        self.told: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    def answer(self, status: int, headers: Headers, body: bytes) -> None:  # noqa: ARG002 - as the real one's
        """Take an answer."""
        self.told.set_result(status)

    def go_on(self, begun: object) -> None:
        """Drop what was begun."""
        assert isinstance(begun, HandedOver)
        self.told.set_result("handed over" if begun.failed is None else "failed")

    def hang_up(self) -> None:
        """Close."""
        self.told.set_result("hung up")
