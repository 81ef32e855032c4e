"""Keys in the order of the instants they were last touched, so that the newest and the expired are at the ends."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from datetime import datetime
from operator import itemgetter
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class FreshnessOrder(Generic[Key]):
    """A dict from key to instant, kept oldest first.

    Heartbeats come nearly in order, so a touch is two dict operations; one that comes late (another replica took it)
    only marks the order, and the next reader sorts it once. `newest` and `newest_at`, None when empty, are known
    without sorting.
    """

    __slots__ = ("_instants", "_is_sorted", "newest", "newest_at")

    def __init__(self) -> None:
        """Start empty."""
        self._instants: dict[Key, datetime] = {}
        self._is_sorted = True
        self.newest: Key | None = None
        self.newest_at: datetime | None = None

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._instants)

    def __contains__(self, key: Key) -> bool:
        """Whether the key is in the order."""
        return key in self._instants

    def __iter__(self) -> Iterator[Key]:
        """Answer every key, in no order that may be relied on."""
        return iter(self._instants)

    def touch(self, key: Key, at: datetime) -> bool:
        """Put `key` at its place for `at`, wherever it was; answer whether that moved `newest_at`."""
        former = self._instants.pop(key, None)
        self._instants[key] = at
        newest_at = self.newest_at
        if newest_at is None or at >= newest_at:
            self.newest, self.newest_at = key, at
        else:
            self._is_sorted = False
            if former == newest_at:
                self.newest, self.newest_at = max(self._instants.items(), key=itemgetter(1))
        return self.newest_at != newest_at

    def discard(self, key: Key) -> None:
        """Take `key` out, if it is there."""
        if self._instants.pop(key, None) == self.newest_at:
            self._sort()
            self.newest, self.newest_at = next(reversed(self._instants.items()), (None, None))

    def expire_before(self, instant: datetime) -> list[Key]:
        """Take out and answer the keys last touched before `instant`."""
        self._sort()
        expired = []
        for key, at in self._instants.items():
            if at >= instant:
                break
            expired.append(key)
        for key in expired:
            del self._instants[key]
        if not self._instants:
            self.newest = self.newest_at = None
        return expired

    def _sort(self) -> None:
        if not self._is_sorted:
            self._instants = dict(sorted(self._instants.items(), key=itemgetter(1)))
            self._is_sorted = True
