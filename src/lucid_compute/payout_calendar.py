"""Which months of payouts are due to be closed, by the days of UTC. Pure."""

from __future__ import annotations

from datetime import date, timedelta
from enum import StrEnum
from typing import NamedTuple


class PayoutsClose(StrEnum):
    """When periods are closed without being asked for."""

    MONTHLY = "monthly"
    NEVER = "never"


class Span(NamedTuple):
    """Whole days: from `since` on, until before `until`."""

    since: date
    until: date


def month_due(last_end: date | None, first_open: date | None, today: date, *, after_days: int) -> Span | None:
    """Answer the next span to close, which ends with a month that is over for `after_days`; None when none is due.

    It begins where the last period ended (`last_end`), the first one with the month of the first open line.
    """
    if last_end is None and first_open is None:
        return None
    since = last_end or (first_open or today).replace(day=1)
    until = (since.replace(day=1) + timedelta(days=32)).replace(day=1)
    return Span(since, until) if until + timedelta(days=after_days) <= today else None
