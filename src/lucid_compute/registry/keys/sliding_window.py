"""Uses of the last minute: all of a limit may be spent at once, and each use comes back a minute later. Pure."""

from __future__ import annotations

from collections import deque

WINDOW_SECONDS = 60.0
SLOT_SECONDS = 0.5  # uses within it come back together, with the last of them: a steady client loses under 1 %


class _Slot:
    """Uses that come back together: when the first and the last of them were, and their number."""

    __slots__ = ("count", "first", "last")

    def __init__(self, at: float, count: int) -> None:
        self.first = self.last = at
        self.count = count


class SlidingWindow:
    """Uses of the last 60 seconds. No 60 seconds contain more than `most`, except for uses known only afterwards.

    What exceeds `most` is a debt: it counts as used as soon as there is room for it again.
    """

    __slots__ = ("_booked", "_debt", "_most", "_slots")

    def __init__(self, most: int) -> None:
        self._most = most
        self._slots: deque[_Slot] = deque()
        self._booked = self._debt = 0

    def add(self, count: int, now: float) -> None:
        """Count uses at `now`, which does not decrease."""
        self.used_at(now)
        room = max(self._most - self._booked, 0)
        self._debt += max(count - room, 0)
        self._book(min(count, room), now)

    def resize(self, most: int, now: float) -> None:
        """Allow `most` uses from now on. What was used counts on."""
        self.used_at(now)
        self._most = most
        room = max(most - self._booked, 0)
        repaid = min(self._debt, room)
        self._debt -= repaid
        self._book(repaid, now)

    def used_at(self, now: float) -> int:
        """Return how many uses count at `now`, debts included."""
        slots = self._slots
        while slots and slots[0].last + WINDOW_SECONDS <= now:
            left = slots.popleft()
            self._booked -= left.count
            repaid = max(min(self._debt, self._most - self._booked), 0)
            self._debt -= repaid
            self._book(repaid, left.last + WINDOW_SECONDS)
        return self._booked + self._debt

    def seconds_until_free(self, count: int, now: float) -> float:
        """Return in how many seconds `count` uses less will count; `count` is from 1 to what is used."""
        self.used_at(now)
        minutes, rest = divmod(count - 1, max(self._booked, 1))
        for slot in self._slots:
            rest -= slot.count
            if rest < 0:
                return slot.last + WINDOW_SECONDS * (1 + minutes) - now
        return WINDOW_SECONDS

    def _book(self, count: int, at: float) -> None:
        if not count:
            return
        self._booked += count
        newest = self._slots[-1] if self._slots else None
        if newest is not None and at - newest.first < SLOT_SECONDS:
            newest.last = at
            newest.count += count
        else:
            self._slots.append(_Slot(at, count))
