"""The live replicas: their leases as last read from Postgres, requests in flight per node, and outages of them all."""

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
    """One replica's lease: alive at `seen_at`, with all changes visible in `applied`, and its requests per node.

    The requests were counted after `applied`. So a request that is in no count was decided with those changes known.
    """

    id: str
    started_at: datetime
    seen_at: datetime
    applied_at: datetime
    applied: Snapshot
    in_flight: Mapping[str, int]


class Checkpoint:
    """What had committed when this replica received something: at the latest the snapshot of its read number `due`."""

    __slots__ = ("due", "snapshot")

    def __init__(self, due: int) -> None:
        self.due = due
        self.snapshot: Snapshot | None = None


class Replicas:
    """The other replicas' leases and published counts, and this replica's own requests in flight."""

    def __init__(self) -> None:
        self.own_in_flight: dict[str, int] = {}
        self.has_changed = asyncio.Event()
        self._changed: dict[str, None] = {}
        self._published: dict[str, int] = {}
        self._others: tuple[ReplicaRecord, ...] = ()
        self._updates: dict[str, dict[str, tuple[datetime, int]]] = {}
        self._elsewhere: dict[str, int] = {}
        self._applied: Snapshot | None = None
        self._reads = 0

    # --- this replica's own requests

    def begin(self, passport_id: str) -> None:
        """Count a request that begins on the node, in the loop turn that chose it, so that no drain comes between."""
        self.own_in_flight[passport_id] = self.own_in_flight.get(passport_id, 0) + 1
        if self._others:
            self._changed[passport_id] = None
            self.has_changed.set()

    def end(self, passport_id: str) -> None:
        """Count a request that has ended on the node; a node without requests is left out."""
        left = self.own_in_flight.get(passport_id, 0) - 1
        if left > 0:
            self.own_in_flight[passport_id] = left
        else:
            self.own_in_flight.pop(passport_id, None)
        if self._others:
            self._changed[passport_id] = None
            self.has_changed.set()

    def counts_for_lease(self) -> dict[str, int]:
        """Return the requests in flight per node, to be published in this replica's lease."""
        self._published = {passport_id: count for passport_id, count in self.own_in_flight.items() if count}
        return dict(self._published)

    def pop_changed_counts(self, limit: int, is_relevant: Callable[[str], bool]) -> dict[str, int]:
        """Return up to `limit` counts of relevant nodes that changed since they were published, oldest change first."""
        counts: dict[str, int] = {}
        while self._changed and len(counts) < limit:
            passport_id = next(iter(self._changed))
            del self._changed[passport_id]
            count = self.own_in_flight.get(passport_id, 0)
            if count != self._published.get(passport_id, 0) and is_relevant(passport_id):
                counts[passport_id] = self._published[passport_id] = count
        if not self._changed:
            self.has_changed.clear()
        return counts

    # --- what other replicas publish

    def apply(self, own_id: str, leases: Iterable[ReplicaRecord], alive_since: datetime) -> None:
        """Replace the leases by those renewed since `alive_since`: a lease's length ago, outages not counted."""
        self._others = tuple(lease for lease in leases if lease.id != own_id and lease.seen_at >= alive_since)
        previous, self._updates, self._elsewhere = self._updates, {}, {}
        for lease in self._others:
            updates = {node: update for node, update in previous.get(lease.id, {}).items() if update[0] > lease.seen_at}
            self._updates[lease.id] = updates
            newest = {**lease.in_flight, **{node: count for node, (_, count) in updates.items()}}
            for passport_id, count in newest.items():
                self._add_elsewhere(passport_id, count)

    def apply_counts(self, replica_id: str, at: datetime, counts: Mapping[str, int]) -> None:
        """Apply counts that a live replica published between two leases; a lease renewed after `at` replaces them."""
        lease = next((other for other in self._others if other.id == replica_id), None)
        if lease is None:
            return
        updates = self._updates[replica_id]
        for passport_id, count in counts.items():
            counted_at, previous = updates.get(passport_id, (lease.seen_at, lease.in_flight.get(passport_id, 0)))
            if at > counted_at:
                updates[passport_id] = (at, count)
                self._add_elsewhere(passport_id, count - previous)

    def record_read(self, snapshot: Snapshot) -> None:
        """Record that this replica has applied everything visible in `snapshot`."""
        self._applied = snapshot
        self._reads += 1

    # --- queries

    def others(self) -> tuple[ReplicaRecord, ...]:
        """Return the leases of the other live replicas."""
        return self._others

    def count(self) -> int:
        """Return the number of live replicas, including this one."""
        return 1 + len(self._others)

    def in_flight(self, passport_id: str) -> int:
        """Return the number of requests in flight on the node, over all live replicas."""
        return self.own_in_flight.get(passport_id, 0) + self._elsewhere.get(passport_id, 0)

    def are_idle_on(self, passport_id: str) -> bool:
        """Return whether no live replica counts a request on the node, in its lease or in a later update.

        Only a lease says that its counts are newer than what the replica had applied; an update may be late. So an
        update never overrides a count in a lease.
        """
        return not self.in_flight(passport_id) and not any(other.in_flight.get(passport_id) for other in self._others)

    def all_have_applied(self, xid: int | None) -> bool:
        """Return whether every other live replica has applied transaction `xid`. This one applies its own at once."""
        return xid is not None and all(xid in other.applied for other in self._others)

    def checkpoint(self) -> Checkpoint:
        """Return a mark of what had committed by now. A read under way may have begun earlier, the next one has not."""
        return Checkpoint(self._reads + 2)

    def all_have_reached(self, checkpoint: Checkpoint | None) -> bool:
        """Return whether every other live replica has applied what had committed at `checkpoint`."""
        if checkpoint is None:
            return False
        if not self._others:
            return True
        if checkpoint.snapshot is None and self._reads >= checkpoint.due:
            checkpoint.snapshot = self._applied
        snapshot = checkpoint.snapshot
        return snapshot is not None and all(other.applied.covers(snapshot) for other in self._others)

    def _add_elsewhere(self, passport_id: str, count: int) -> None:
        if total := self._elsewhere.get(passport_id, 0) + count:
            self._elsewhere[passport_id] = total
        else:
            self._elsewhere.pop(passport_id, None)


OUTAGE_AFTER = timedelta(seconds=3)
"""When no lease was renewed for longer than this, it was an outage."""


CLOCK_SLACK = timedelta(seconds=5)
"""How far ahead of now an instant may lie because clocks are read at different moments. Further ahead, one stepped."""


class Outage(NamedTuple):
    """A span of time in which no replica could accept heartbeats."""

    started_at: datetime
    ended_at: datetime


def merge_outages(outages: Iterable[Outage]) -> tuple[Outage, ...]:
    """Return the outages with overlapping ones merged, oldest first."""
    merged: list[Outage] = []
    for outage in sorted(outages):
        if merged and outage.started_at <= merged[-1].ended_at:
            merged[-1] = Outage(merged[-1].started_at, max(merged[-1].ended_at, outage.ended_at))
        else:
            merged.append(outage)
    return tuple(merged)


def live_since(now: datetime, merged: tuple[Outage, ...], window: timedelta = LIVE_WINDOW) -> datetime:
    """Return the oldest instant of a live node's heartbeat: `window` before `now`, with outages not counted.

    An outage that ends well after `now` is not believed: the clock stepped back since it was recorded.
    """
    edge, remaining = now, window
    for outage in reversed(merged):
        if outage.ended_at > now + CLOCK_SLACK:
            continue
        span = edge - outage.ended_at
        if span >= remaining:
            break
        remaining -= max(span, timedelta(0))
        edge = min(edge, outage.started_at)
    return edge - remaining


def silence_since(received_at: datetime, now: datetime, merged: tuple[Outage, ...]) -> timedelta:
    """Return how long a node has been silent since `received_at`, with outages not counted."""
    silence = now - received_at
    for outage in reversed(merged):
        if outage.ended_at <= received_at:
            break
        silence -= max(min(now, outage.ended_at) - max(received_at, outage.started_at), timedelta(0))
    return silence


def seconds_lost(since: datetime, until: datetime, merged: tuple[Outage, ...]) -> float:
    """Return how many seconds from `since` to `until` were outages."""
    overlaps = (min(until, outage.ended_at) - max(since, outage.started_at) for outage in merged)
    return sum(max(overlap.total_seconds(), 0.0) for overlap in overlaps)
