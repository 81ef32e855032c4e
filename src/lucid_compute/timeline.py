"""Time in steps, and what changes of state over it add up to. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import NamedTuple

from lucid_compute.records import StateRecord

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
STEPS = {"1m": timedelta(minutes=1), "5m": timedelta(minutes=5), "1h": timedelta(hours=1), "1d": timedelta(days=1)}
AUTO_POINTS = 300
MAX_POINTS = 1500


class Timeline(NamedTuple):
    """Steps of equal length, which begin at whole minutes, hours or days of UTC."""

    since: datetime
    until: datetime
    step: timedelta

    @classmethod
    def around(cls, since: datetime, until: datetime, step: timedelta) -> Timeline:
        """Answer the whole steps that hold the span; none when it is empty."""
        first = EPOCH + (since - EPOCH) // step * step
        if until <= since:
            return cls(first, first, step)
        return cls(first, EPOCH - (EPOCH - until) // step * step, step)

    @property
    def length(self) -> int:
        """How many steps there are."""
        return (self.until - self.since) // self.step

    def starts(self) -> list[datetime]:
        """Answer when each step begins."""
        return [self.since + number * self.step for number in range(self.length)]

    def edges(self) -> list[datetime]:
        """Answer when each step begins, and when the last one ends."""
        return [*self.starts(), self.until]


def auto_step(since: datetime, until: datetime) -> timedelta:
    """Answer the shortest step that makes no more than 300 points."""
    return next((step for step in STEPS.values() if (until - since) <= AUTO_POINTS * step), STEPS["1d"])


class StateShift(NamedTuple):
    """From `at` on, `change` more nodes (or fewer) are in `state`."""

    at: datetime
    state: str
    change: int


def integrate(
    shifts: Iterable[StateShift], edges: Sequence[datetime], outages: Sequence[tuple[datetime, datetime]]
) -> list[StateRecord]:
    """Answer for each span between two edges how long nodes were in each state, time of `outages` left out.

    `edges` rise; `outages` are merged and in order.
    """
    records = [StateRecord() for _ in edges[1:]]
    if not records:
        return records
    ordered = sorted(shifts)
    cuts = set(edges) | {shift.at for shift in ordered if edges[0] < shift.at < edges[-1]}
    cuts |= {bound for outage in outages for bound in outage if edges[0] < bound < edges[-1]}
    instants = sorted(cuts)
    counts: Counter[str] = Counter()
    position, outage = 0, 0
    for start, end in pairwise(instants):
        while position < len(ordered) and ordered[position].at <= start:
            counts[ordered[position].state] += ordered[position].change
            position += 1
        while outage < len(outages) and outages[outage][1] <= start:
            outage += 1
        record = records[bisect_right(edges, start) - 1]
        seconds = (end - start).total_seconds()
        if outage < len(outages) and outages[outage][0] <= start:
            record.outage_seconds += seconds
            continue
        for state, count in counts.items():
            if count:
                record.seconds[state] += count * seconds
    return records
