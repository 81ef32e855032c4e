"""Who else serves: the leases of all replicas as Postgres last told, and what this one has in flight itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from typing import NamedTuple

LEASE_SECONDS = 10
LEASE = timedelta(seconds=LEASE_SECONDS)
_MARGIN = timedelta(seconds=1)


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
        """Whether the transaction `xid` is visible in the snapshot."""
        return isinstance(xid, int) and (xid < self.xmin or (xid < self.xmax and xid not in self.in_progress))


class Replica(NamedTuple):
    """One replica's lease: alive at `seen_at`, everything visible in `applied` applied, requests running per node."""

    id: str
    started_at: datetime
    seen_at: datetime
    applied_at: datetime
    applied: Snapshot
    in_flight: Mapping[str, int]


class Replicas:
    """The other replicas' leases, and this one's own requests in flight."""

    def __init__(self) -> None:
        """Start alone."""
        self.own_in_flight: Counter[str] = Counter()
        self._others: tuple[Replica, ...] = ()

    def apply(self, own_id: str, leases: Iterable[Replica], alive_since: datetime) -> None:
        """Hold the leases renewed at `alive_since` or later: a lease's length ago, outages of the registry left out."""
        self._others = tuple(lease for lease in leases if lease.id != own_id and lease.seen_at >= alive_since)

    def count(self) -> int:
        """How many replicas are alive, this one among them."""
        return 1 + len(self._others)

    def in_flight(self, passport_id: str) -> int:
        """Answer how many requests run on the node, over all live replicas."""
        return self.own_in_flight[passport_id] + sum(other.in_flight.get(passport_id, 0) for other in self._others)

    def all_have_applied(self, xid: int | None) -> bool:
        """Whether every other live replica has applied transaction `xid`; this one applies its own and polls."""
        return xid is not None and all(xid in other.applied for other in self._others)

    def all_have_polled_after(self, instant: datetime | None) -> bool:
        """Whether every other live replica has read Postgres a second after `instant` or later."""
        return instant is not None and all(other.applied_at - instant > _MARGIN for other in self._others)
