"""What the gateway asks of traces. Who makes them is not its business: nobody, unless there is a collector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Span(Protocol):
    """A part of a request's way, from when it is made until `end`."""

    @property
    def traceparent(self) -> bytes:
        """The header by which the next one on the way joins in: W3C Trace Context."""

    def child(self, name: str, *, is_outgoing: bool = False) -> Span:
        """Begin a part of this one; `is_outgoing` when another service does it."""

    def note(self, facts: Mapping[str, str | int | float | None]) -> None:
        """Add what became known; None is left out."""

    def end(self, error: str | None = None) -> None:
        """End it, well or with an error in a word; what was ended before stays as it is."""


class Tracer(Protocol):
    """Makes the spans of one replica."""

    def begin(self, name: str, headers: Mapping[bytes, bytes]) -> Span:
        """Begin the span of a request that came with `headers`, in its sender's trace if they name one."""

    async def close(self) -> None:
        """Send what is left, within a moment."""
