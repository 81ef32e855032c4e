"""Moments of queries, timelines of equal steps, and the time that nodes were in each state within steps. Pure."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from lucid_compute.accounting.measured import StateRollup
from lucid_compute.errors import InvalidRequest
from lucid_compute.wire import Day, Instant

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STEPS = {"1m": timedelta(minutes=1), "5m": timedelta(minutes=5), "1h": timedelta(hours=1), "1d": timedelta(days=1)}
AUTO_POINTS = 300
MAX_POINTS = 1500
MOMENT = "An RFC 3339 instant, a day in UTC, or how long ago: -90m, -1h, -7d, -4w."
_RELATIVE = re.compile(r"-([0-9]{1,6})([mhdw])")
_UNITS = {
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
    "w": timedelta(weeks=1),
}
_INSTANT = TypeAdapter[datetime](Instant)
_DAY = TypeAdapter[date](Day)
_DAY_LENGTH = 10


class Timeline(NamedTuple):
    """Steps of equal length, which begin at whole minutes, hours or days of UTC."""

    since: datetime
    until: datetime
    step: timedelta

    @classmethod
    def around(cls, since: datetime, until: datetime, step: timedelta) -> Timeline:
        """Return the whole steps that cover the span; no steps when it is empty."""
        first = EPOCH + (since - EPOCH) // step * step
        if until <= since:
            return cls(first, first, step)
        return cls(first, EPOCH - (EPOCH - until) // step * step, step)

    @property
    def length(self) -> int:
        """Return how many steps there are."""
        return (self.until - self.since) // self.step

    def starts(self) -> list[datetime]:
        """Return when each step begins."""
        return [self.since + number * self.step for number in range(self.length)]

    def edges(self) -> list[datetime]:
        """Return when each step begins, and when the last one ends."""
        return [*self.starts(), self.until]


def auto_step(since: datetime, until: datetime) -> timedelta:
    """Return the shortest step that makes no more than 300 points."""
    return next((step for step in STEPS.values() if (until - since) <= AUTO_POINTS * step), STEPS["1d"])


class StateSum(NamedTuple):
    """The sum of all nodes' changes of state within one span between two instants.

    At the end of the span, `change` more nodes (or fewer) are in `state` than at its start. Within the span these
    changes add `node_seconds` to the time in that state.
    """

    span: int
    state: str
    change: int
    node_seconds: float


def cut(edges: Sequence[datetime], outages: Iterable[tuple[datetime, datetime]]) -> list[datetime]:
    """Return the instants, in order, that divide time for `integrate`: edges of steps and bounds of outages."""
    bounds = {bound for outage in outages for bound in outage if edges[0] < bound < edges[-1]}
    return sorted({*edges, *bounds})


def integrate(
    sums: Iterable[StateSum], edges: Sequence[datetime], outages: Sequence[tuple[datetime, datetime]]
) -> list[StateRollup]:
    """Return for each step between two edges how long nodes were in each state, without the time of `outages`.

    `edges` are in order; `outages` are merged and in order; `sums` are by the spans between the instants of `cut`.
    """
    rollups = [StateRollup() for _ in edges[1:]]
    by_span: defaultdict[int, list[StateSum]] = defaultdict(list)
    for each in sums:
        by_span[each.span].append(each)
    counts: Counter[str] = Counter()
    outage = 0
    for span, (start, end) in enumerate(pairwise(cut(edges, outages))):
        while outage < len(outages) and outages[outage][1] <= start:
            outage += 1
        rollup, seconds = rollups[bisect_right(edges, start) - 1], (end - start).total_seconds()
        if is_outage := outage < len(outages) and outages[outage][0] <= start:
            rollup.outage_seconds += seconds
        else:
            for state, count in counts.items():
                rollup.seconds[state] += count * seconds
        for _, state, change, node_seconds in by_span[span]:
            counts[state] += change
            if not is_outage:
                rollup.seconds[state] += node_seconds
    return rollups


def read_moment(name: str, moment: str, now: datetime) -> datetime:
    """Return the instant that the query parameter `name` stands for; a day stands for its beginning.

    Raises:
        InvalidRequest: it can't be read, or is before 1970.
    """
    try:
        if found := _RELATIVE.fullmatch(moment):
            instant = now - int(found[1]) * _UNITS[found[2]]
        elif len(moment) == _DAY_LENGTH:
            instant = datetime.combine(_DAY.validate_python(moment), time(), UTC)
        else:
            instant = now if moment == "now" else _INSTANT.validate_python(moment)
    except (OverflowError, ValidationError):
        message = "Send an RFC 3339 instant such as 2026-01-31T12:00:00Z, a day, or how long ago: -90m, -1h, -7d."
        raise InvalidRequest.at(f"query.{name}", message) from None
    if instant < EPOCH:  # asyncpg can't send Python's first years in every time zone
        raise InvalidRequest.at(f"query.{name}", "Send an instant from 1970 on.")
    return instant
