"""The registry's own outages, and what they take off the age of a heartbeat and off uptime. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import NamedTuple

from lucid_compute.node_state import LIVE_WINDOW

OUTAGE_AFTER = timedelta(seconds=3)
"""A lease that was not renewed for longer than this was an outage."""


class Outage(NamedTuple):
    """A span of time in which no replica could take heartbeats."""

    started_at: datetime
    ended_at: datetime


def merge_outages(outages: Iterable[Outage]) -> tuple[Outage, ...]:
    """Answer the same time without overlaps, oldest first."""
    merged: list[Outage] = []
    for outage in sorted(outages):
        if merged and outage.started_at <= merged[-1].ended_at:
            merged[-1] = Outage(merged[-1].started_at, max(merged[-1].ended_at, outage.ended_at))
        else:
            merged.append(outage)
    return tuple(merged)


def live_since(now: datetime, merged: tuple[Outage, ...], window: timedelta = LIVE_WINDOW) -> datetime:
    """Answer the oldest instant a live node's heartbeat may have: `window` of time before `now` that was not ours."""
    edge, remaining = now, window
    for outage in reversed(merged):
        span = edge - outage.ended_at
        if span >= remaining:
            break
        remaining -= max(span, timedelta(0))
        edge = min(edge, outage.started_at)
    return edge - remaining


def seconds_lost(since: datetime, until: datetime, merged: tuple[Outage, ...]) -> float:
    """Answer how many seconds from `since` to `until` were outages of ours."""
    overlaps = (min(until, outage.ended_at) - max(since, outage.started_at) for outage in merged)
    return sum(max(overlap.total_seconds(), 0.0) for overlap in overlaps)
