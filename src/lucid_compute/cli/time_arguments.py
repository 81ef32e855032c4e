"""Times on the command line: an RFC 3339 instant, or a distance: 30s, 90m, 12h, 7d, 4w."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import typer

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_SPAN = re.compile(r"(\d{1,9})([smhdw])")


def read_past(text: str) -> datetime:
    """Return the instant, or the one this long ago."""
    return _read(text, -1)


def read_future(text: str) -> datetime:
    """Return the instant, or the one this far ahead."""
    return _read(text, 1)


def _read(text: str, direction: int) -> datetime:
    try:
        if (found := _SPAN.fullmatch(text)) is not None:
            seconds = int(found[1]) * _SECONDS[found[2]]
            return datetime.now(UTC) + direction * timedelta(seconds=seconds)
        at = datetime.fromisoformat(text)
    except (ValueError, OverflowError):
        raise typer.BadParameter("Say an instant such as 2026-01-31T12:00:00Z, or a time such as 90m or 7d.") from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)
