"""Which keys were heard of newest, and which not lately: the order of a class's members, and the queue of classes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from datetime import datetime
from heapq import heapify, heappop, heappush
from operator import itemgetter
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
_SLACK = 64  # entries that a queue may hold beside two for each key


class FreshnessOrder(Generic[Key]):
    """A dict from key to instant that knows its newest key.

    Heartbeats come nearly in order, so a touch is two dict operations. One that comes late, from another replica, only
    marks the dict as unsorted; it is sorted when its newest key is discarded. `newest` and `newest_at` are None when
    the dict is empty.
    """

    __slots__ = ("_instants", "_is_sorted", "newest", "newest_at")

    def __init__(self) -> None:
        self._instants: dict[Key, datetime] = {}
        self._is_sorted = True
        self.newest: Key | None = None
        self.newest_at: datetime | None = None

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._instants)

    def __contains__(self, key: Key) -> bool:
        """Return whether the key is present."""
        return key in self._instants

    def __iter__(self) -> Iterator[Key]:
        """Return an iterator over the keys, in no particular order."""
        return iter(self._instants)

    def touch(self, key: Key, at: datetime) -> bool:
        """Set the instant of `key` to `at`; return whether `newest_at` changed."""
        previous = self._instants.pop(key, None)
        self._instants[key] = at
        newest_at = self.newest_at
        if newest_at is None or at >= newest_at:
            self.newest, self.newest_at = key, at
        else:
            self._is_sorted = False
            if previous == newest_at:
                self.newest, self.newest_at = max(self._instants.items(), key=itemgetter(1))
        return self.newest_at != newest_at

    def discard(self, key: Key) -> None:
        """Remove `key`, if present."""
        if self._instants.pop(key, None) == self.newest_at:
            if not self._is_sorted:
                self._instants = dict(sorted(self._instants.items(), key=itemgetter(1)))
                self._is_sorted = True
            self.newest, self.newest_at = next(reversed(self._instants.items()), (None, None))


class ExpiryQueue(Generic[Key]):
    """A dict from key to instant that gives up its oldest keys, at a cost that does not depend on the other keys.

    A touch sets the instant alone. The heap may hold an older instant for the key; it is corrected when it comes up.
    """

    __slots__ = ("_heap", "_instants", "_queued", "_serial")

    def __init__(self) -> None:
        self._instants: dict[Key, datetime] = {}
        self._queued: dict[Key, datetime] = {}  # each key's entry of the heap that counts; never later than its instant
        self._heap: list[tuple[datetime, int, Key]] = []
        self._serial = 0

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._instants)

    def touch(self, key: Key, at: datetime) -> None:
        """Set the instant of `key` to `at`, which may be earlier than before."""
        self._instants[key] = at
        queued = self._queued.get(key)
        if queued is None or at < queued:
            self._push(key, at)
            self._bound()

    def discard(self, key: Key) -> None:
        """Remove `key`, if present."""
        if self._instants.pop(key, None) is not None:
            self._bound()

    def expire_before(self, instant: datetime) -> list[Key]:
        """Remove and return the keys last touched before `instant`."""
        expired = []
        while self._heap and self._heap[0][0] < instant:
            queued, _, key = heappop(self._heap)
            if self._queued.get(key) != queued:
                continue
            del self._queued[key]
            at = self._instants.get(key)
            if at is None:
                continue
            if at < instant:
                del self._instants[key]
                expired.append(key)
            else:
                self._push(key, at)
        return expired

    def _push(self, key: Key, at: datetime) -> None:
        self._serial += 1  # keys of one instant are not compared
        self._queued[key] = at
        heappush(self._heap, (at, self._serial, key))

    def _bound(self) -> None:
        """Leave out entries of keys that are gone, and those that were replaced, if there are many."""
        if len(self._heap) <= 2 * len(self._instants) + _SLACK:
            return
        self._queued = dict(self._instants)
        self._heap = [(at, number, key) for number, (key, at) in enumerate(self._instants.items())]
        self._serial = len(self._heap)
        heapify(self._heap)
