"""Format values for a person, and make foreign text safe for a terminal. Unknown is a dash, never 0."""

from __future__ import annotations

from datetime import UTC, datetime

UNKNOWN = "-"
MINUTE, HOUR, DAY = 60, 3600, 86400


def plain(text: object) -> str:
    """Return the text in one line, with control characters written out: a name must not move the cursor."""
    return "".join(mark if mark.isprintable() else _written_out(mark) for mark in str(text))


def or_unknown(value: object) -> str:
    """Return the value, or a dash for None and for an empty text."""
    return UNKNOWN if value is None or value == "" else plain(value)


def span(seconds: float | None) -> str:
    """Return a length of time in a fitting unit: `4 s`, `3 min`, `2.5 h`, `12 d`."""
    if seconds is None:
        return UNKNOWN
    if seconds < MINUTE * 2:
        return f"{seconds:.0f} s"
    if seconds < HOUR * 2:
        return f"{seconds / MINUTE:.0f} min"
    if seconds < DAY * 2:
        return f"{seconds / HOUR:.1f} h"
    return f"{seconds / DAY:.0f} d"


def took(milliseconds: float | None) -> str:
    """Return how long something took: `0.8 ms`, `120 ms`, `9.0 s`, `3 min`."""
    if milliseconds is None:
        return UNKNOWN
    if milliseconds < 10:  # noqa: PLR2004 - a decimal matters below it
        return f"{milliseconds:.1f} ms"
    if milliseconds < 1000:  # noqa: PLR2004 - a second
        return f"{milliseconds:.0f} ms"
    return f"{milliseconds / 1000:.1f} s" if milliseconds < 1000 * MINUTE else span(milliseconds / 1000)


def instant(at: datetime | None) -> str:
    """Return an instant in UTC, to the second."""
    return UNKNOWN if at is None else at.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def share(fraction: float | None) -> str:
    """Return 0.42 as `42 %`."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.0f} %"


def number(value: float | None, unit: str = "") -> str:
    """Return a number without needless decimals, with its unit."""
    if value is None:
        return UNKNOWN
    written = f"{value:,}" if isinstance(value, int) else f"{value:,.1f}".removesuffix(".0")
    return f"{written} {unit}" if unit else written


def yes_or_no(claim: bool) -> str:
    """Return a boolean as a word."""
    return "yes" if claim else "no"


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """Return `1 node`, `2 nodes`."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def listed(words: object) -> str:
    """Return words separated by commas, or a dash."""
    return ", ".join(map(plain, words)) if isinstance(words, list | tuple) and words else UNKNOWN


def _written_out(mark: str) -> str:
    return " " if mark == "\n" else mark.encode("unicode_escape").decode("ascii")
