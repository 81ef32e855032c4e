"""A connection for requests whose answer is a status: its body is of no interest, and never kept."""

from __future__ import annotations

from lucid_compute.egress.http_connection import HttpConnection


class StatusConnection(HttpConnection):
    """A connection whose answer is whole with its head; what comes behind it is dropped, and it is used once."""

    __slots__ = ()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Look at none: how the body is written does not matter."""

    def on_headers_complete(self) -> None:
        """End the answer here, unless another head follows."""
        super().on_headers_complete()
        self.is_whole = self.has_head

    def on_body(self, part: bytes) -> None:
        """Drop it."""

    def _refuse(self, message: str) -> None:
        if not self.has_head:
            super()._refuse(message)
