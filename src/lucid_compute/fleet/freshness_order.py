"""Keys in the order of the instants they were last touched, so that the newest and the expired are at the ends."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from datetime import datetime
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class FreshnessOrder(Generic[Key]):
    """A dict from key to instant, kept oldest first.

    Heartbeats come nearly in order, so a touch is two dict operations; one that comes late (another replica took it)
    only marks the order, and the next reader sorts it once.
    """

    __slots__ = ("_instants", "_is_sorted", "_last")

    def __init__(self) -> None:
        """Start empty."""
        self._instants: dict[Key, datetime] = {}
        self._last: datetime | None = None
        self._is_sorted = True

    def __len__(self) -> int:
        """How many keys there are."""
        return len(self._instants)

    def __contains__(self, key: Key) -> bool:
        """Whether the key is in the order."""
        return key in self._instants

    def touch(self, key: Key, at: datetime) -> None:
        """Put `key` at its place for `at`, wherever it was."""
        self._instants.pop(key, None)
        self._instants[key] = at
        if self._last is not None and at < self._last:
            self._is_sorted = False
        else:
            self._last = at

    def discard(self, key: Key) -> None:
        """Take `key` out, if it is there."""
        self._instants.pop(key, None)

    def newest(self) -> tuple[Key, datetime] | None:
        """Answer the key touched last and its instant; None when empty."""
        self._sort()
        return next(reversed(self._instants.items()), None)

    def newest_first(self) -> Iterator[tuple[Key, datetime]]:
        """Yield every key with its instant, the newest first."""
        self._sort()
        return reversed(self._instants.items())

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
        return expired

    def _sort(self) -> None:
        if not self._is_sorted:
            self._instants = dict(sorted(self._instants.items(), key=lambda item: item[1]))
            self._last = next(reversed(self._instants.values()), None)
            self._is_sorted = True
