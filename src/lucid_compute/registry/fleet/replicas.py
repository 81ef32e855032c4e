"""Who else serves: the leases of all replicas as Postgres last told, and what this one has in flight itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

from lucid_compute.registry.domain.node_state import LIVE_WINDOW

LEASE_SECONDS = 10
LEASE = timedelta(seconds=LEASE_SECONDS)


class Snapshot(NamedTuple):
    """A Postgres snapshot: which transactions had committed when it was taken (`pg_snapshot`, xmin:xmax:xip)."""

    xmin: int
    xmax: int
    in_progress: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Snapshot:
        """Read Postgres's text form, `10:20:10,14`."""
        xmin, xmax, in_progress = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in in_progress.split(",") if xid))

    def __contains__(self, xid: object) -> bool:
        """Return whether the transaction `xid` is visible in the snapshot."""
        return isinstance(xid, int) and (xid < self.xmin or (xid < self.xmax and xid not in self.in_progress))

    def covers(self, other: Snapshot) -> bool:
        """Return whether every transaction that is visible in `other` is visible in this one too."""
        return self.xmax >= other.xmax and all(
            xid >= other.xmax or xid in other.in_progress for xid in self.in_progress
        )


class ReplicaRecord(NamedTuple):
    """One replica's lease: alive at `seen_at`, everything visible in `applied` applied, requests running per node.

    The requests were counted after that: one that is in no count was decided by what `applied` shows.
    """

    id: str
    started_at: datetime
    seen_at: datetime
    applied_at: datetime
    applied: Snapshot
    in_flight: Mapping[str, int]


class Sight:
    """What had committed when this replica saw something: in the snapshot of its read number `due` at the latest."""

    __slots__ = ("due", "snapshot")

    def __init__(self, due: int) -> None:
        self.due = due
        self.snapshot: Snapshot | None = None


class Replicas:
    """The other replicas' leases, and this one's own requests in flight."""

    def __init__(self) -> None:
        self.own_in_flight: dict[str, int] = {}
        self.has_changed = asyncio.Event()
        self._changed: dict[str, None] = {}
        self._told: dict[str, int] = {}
        self._others: tuple[ReplicaRecord, ...] = ()
        self._news: dict[str, dict[str, tuple[datetime, int]]] = {}
        self._elsewhere: dict[str, int] = {}
        self._applied: Snapshot | None = None
        self._reads = 0

    # --- this replica's own requests

    def begin(self, passport_id: str) -> None:
        """Count one more request on the node; in the turn of the loop that chose it, so that no drain slips between."""
        self.own_in_flight[passport_id] = self.own_in_flight.get(passport_id, 0) + 1
        if self._others:
            self._changed[passport_id] = None
            self.has_changed.set()

    def end(self, passport_id: str) -> None:
        """Count one request less; a node without any is not counted at all."""
        left = self.own_in_flight.get(passport_id, 0) - 1
        if left > 0:
            self.own_in_flight[passport_id] = left
        else:
            self.own_in_flight.pop(passport_id, None)
        if self._others:
            self._changed[passport_id] = None
            self.has_changed.set()

    def tell_all(self) -> dict[str, int]:
        """Return what runs on each node, for this replica's lease."""
        self._told = {passport_id: count for passport_id, count in self.own_in_flight.items() if count}
        return dict(self._told)

    def take_news(self, limit: int, is_wanted: Callable[[str], bool]) -> dict[str, int]:
        """Return the counts of `limit` wanted nodes at most that changed since they were told, the longest first."""
        news: dict[str, int] = {}
        while self._changed and len(news) < limit:
            passport_id = next(iter(self._changed))
            del self._changed[passport_id]
            count = self.own_in_flight.get(passport_id, 0)
            if count != self._told.get(passport_id, 0) and is_wanted(passport_id):
                news[passport_id] = self._told[passport_id] = count
        if not self._changed:
            self.has_changed.clear()
        return news

    # --- what the others tell

    def apply(self, own_id: str, leases: Iterable[ReplicaRecord], alive_since: datetime) -> None:
        """Hold the leases renewed at `alive_since` or later: a lease's length ago, outages of the registry left out."""
        self._others = tuple(lease for lease in leases if lease.id != own_id and lease.seen_at >= alive_since)
        former, self._news, self._elsewhere = self._news, {}, {}
        for lease in self._others:
            news = {node: told for node, told in former.get(lease.id, {}).items() if told[0] > lease.seen_at}
            self._news[lease.id] = news
            for passport_id, count in {**lease.in_flight, **{node: told[1] for node, told in news.items()}}.items():
                self._add_elsewhere(passport_id, count)

    def apply_news(self, replica_id: str, at: datetime, counts: Mapping[str, int]) -> None:
        """Hold what a live replica told between two leases; the next one, renewed after `at`, is newer."""
        lease = next((other for other in self._others if other.id == replica_id), None)
        if lease is None:
            return
        news = self._news[replica_id]
        for passport_id, count in counts.items():
            told_at, former = news.get(passport_id, (lease.seen_at, lease.in_flight.get(passport_id, 0)))
            if at > told_at:
                news[passport_id] = (at, count)
                self._add_elsewhere(passport_id, count - former)

    def note_read(self, snapshot: Snapshot) -> None:
        """Note that this replica has applied everything visible in `snapshot`."""
        self._applied = snapshot
        self._reads += 1

    # --- what follows

    def others(self) -> tuple[ReplicaRecord, ...]:
        """Return the leases of the other live replicas."""
        return self._others

    def count(self) -> int:
        """Return how many replicas are alive, this one among them."""
        return 1 + len(self._others)

    def in_flight(self, passport_id: str) -> int:
        """Return how many requests run on the node, over all live replicas."""
        return self.own_in_flight.get(passport_id, 0) + self._elsewhere.get(passport_id, 0)

    def are_idle_on(self, passport_id: str) -> bool:
        """Return whether no live replica counts a request on the node, neither in its lease nor in its news.

        Only a lease says what was counted after what was applied: news that come late never stand in for it.
        """
        return not self.in_flight(passport_id) and not any(other.in_flight.get(passport_id) for other in self._others)

    def all_have_applied(self, xid: int | None) -> bool:
        """Return whether every other live replica has applied transaction `xid`; this one applies its own and polls."""
        return xid is not None and all(xid in other.applied for other in self._others)

    def sight(self) -> Sight:
        """Mark what this replica has just seen; the read that runs may have begun before, and the next one not."""
        return Sight(self._reads + 2)

    def all_have_seen(self, sight: Sight | None) -> bool:
        """Return whether every other live replica has applied what this one had seen at `sight`."""
        if sight is None:
            return False
        if not self._others:
            return True
        if sight.snapshot is None and self._reads >= sight.due:
            sight.snapshot = self._applied
        seen = sight.snapshot
        return seen is not None and all(other.applied.covers(seen) for other in self._others)

    def _add_elsewhere(self, passport_id: str, count: int) -> None:
        if total := self._elsewhere.get(passport_id, 0) + count:
            self._elsewhere[passport_id] = total
        else:
            self._elsewhere.pop(passport_id, None)


OUTAGE_AFTER = timedelta(seconds=3)
"""A lease that was not renewed for longer than this was an outage."""


class Outage(NamedTuple):
    """A span of time in which no replica could take heartbeats."""

    started_at: datetime
    ended_at: datetime


def merge_outages(outages: Iterable[Outage]) -> tuple[Outage, ...]:
    """Return the same time without overlaps, oldest first."""
    merged: list[Outage] = []
    for outage in sorted(outages):
        if merged and outage.started_at <= merged[-1].ended_at:
            merged[-1] = Outage(merged[-1].started_at, max(merged[-1].ended_at, outage.ended_at))
        else:
            merged.append(outage)
    return tuple(merged)


def live_since(now: datetime, merged: tuple[Outage, ...], window: timedelta = LIVE_WINDOW) -> datetime:
    """Return the oldest instant a live node's heartbeat may have: `window` of time before `now` that was not ours."""
    edge, remaining = now, window
    for outage in reversed(merged):
        span = edge - outage.ended_at
        if span >= remaining:
            break
        remaining -= max(span, timedelta(0))
        edge = min(edge, outage.started_at)
    return edge - remaining


def seconds_lost(since: datetime, until: datetime, merged: tuple[Outage, ...]) -> float:
    """Return how many seconds from `since` to `until` were outages of ours."""
    overlaps = (min(until, outage.ended_at) - max(since, outage.started_at) for outage in merged)
    return sum(max(overlap.total_seconds(), 0.0) for overlap in overlaps)
