"""The queue of one worker for requests whose nodes are all at their capacity: bounded, and fair between keys.

Each model has a line. One request of a line at a time has its turn, in which it looks for a node: when a request of the
model ends, and every now and then, because nodes become free in other ways too. Keys take turns, so a key with many
requests delays another's by one at most.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable

SHORTEST_PAUSE = 0.05  # seconds between two turns of a line in which nothing has ended
LONGEST_PAUSE = 0.5  # after turns that found no node, each of which looks at all of them
WAIT_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class QueuePlace:
    """A request's place in the line of its model. `turn` is set while the request may look for a node."""

    __slots__ = ("entered_at", "has_waited", "key_id", "model_id", "turn")

    def __init__(self, model_id: str, key_id: str, entered_at: float) -> None:
        self.model_id = model_id
        self.key_id = key_id
        self.entered_at = entered_at
        self.has_waited = False
        self.turn = asyncio.Event()


class _Line:
    """The requests that wait for a model's nodes, by key. The first key is the next; `entering` has its turn."""

    __slots__ = ("by_key", "entering", "next_at", "pause")

    def __init__(self) -> None:
        self.by_key: OrderedDict[str, deque[QueuePlace]] = OrderedDict()
        self.entering: QueuePlace | None = None
        self.next_at = 0.0
        self.pause = SHORTEST_PAUSE

    def put(self, place: QueuePlace) -> None:
        """Add a request at the end of its key's, or at the front of all one that has had its turn."""
        place.turn.clear()
        waiting = self.by_key.setdefault(place.key_id, deque())
        if place.has_waited:
            waiting.appendleft(place)
            self.by_key.move_to_end(place.key_id, last=False)
        else:
            waiting.append(place)
        place.has_waited = True

    def give_turn(self) -> None:
        """Let the next request look for a node, unless one does."""
        if self.entering is not None or not self.by_key:
            return
        key_id, waiting = next(iter(self.by_key.items()))
        place = self.entering = waiting.popleft()
        if waiting:
            self.by_key.move_to_end(key_id)
        else:
            del self.by_key[key_id]
        place.turn.set()

    def remove(self, place: QueuePlace) -> None:
        """Remove a request, wherever it stands."""
        if self.entering is place:
            self.entering = None
        elif (waiting := self.by_key.get(place.key_id)) is not None and place in waiting:
            waiting.remove(place)
            if not waiting:
                del self.by_key[place.key_id]


class RequestQueue:
    """Requests that wait; `waits` counts those that have left by their wait (`WAIT_BOUNDS`, the last has no bound)."""

    def __init__(self, most: int, longest_seconds: float, monotonic: Callable[[], float] = time.monotonic) -> None:
        """At most `most` requests wait, each for at most `longest_seconds` in all."""
        self._most = most
        self._longest_seconds = longest_seconds
        self._monotonic = monotonic
        self._lines: dict[str, _Line] = {}
        self._pump: asyncio.Task[None] | None = None
        self.depth = 0
        self.waits = [0] * (len(WAIT_BOUNDS) + 1)
        self.waited_seconds = 0.0

    def must_wait(self, model_id: str, place: QueuePlace | None) -> bool:
        """Return whether others wait for the model's nodes, and it is not this request's turn."""
        line = self._lines.get(model_id)
        return line is not None and (place is None or line.entering is not place)

    def enter(self, model_id: str, key_id: str) -> QueuePlace | None:
        """Return a place for a request; None if the queue is full."""
        if self.depth >= self._most:
            return None
        self.depth += 1
        return QueuePlace(model_id, key_id, self._monotonic())

    def waiting(self, model_id: str) -> int:
        """Return how many requests wait for the model's nodes, with the one that has its turn."""
        line = self._lines.get(model_id)
        return 0 if line is None else sum(map(len, line.by_key.values())) + (line.entering is not None)

    async def wait(self, place: QueuePlace) -> bool:
        """Wait for the turn of a request; return False when its time is up. `leave` must be called in the end."""
        now = self._monotonic()
        line = self._lines.setdefault(place.model_id, _Line())
        if line.entering is place:  # it found no node
            line.entering = None
            line.pause = min(line.pause * 2, LONGEST_PAUSE)
        line.put(place)
        line.next_at = now + line.pause
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._give_turns())
        try:
            async with asyncio.timeout(max(place.entered_at + self._longest_seconds - now, 0.0)):
                await place.turn.wait()
        except TimeoutError:
            return False
        return True

    def leave(self, place: QueuePlace) -> None:
        """Remove a request that has a node, or was ended; the next one of its line has its turn at once."""
        self.depth -= 1
        seconds = self._monotonic() - place.entered_at
        self.waits[bisect_left(WAIT_BOUNDS, seconds)] += 1
        self.waited_seconds += seconds
        line = self._lines.get(place.model_id)
        if line is None:
            return
        had_turn = line.entering is place
        line.remove(place)
        if had_turn:
            line.pause = SHORTEST_PAUSE
            line.give_turn()
        if line.entering is None and not line.by_key:
            del self._lines[place.model_id]

    def give_turn(self, model_id: str) -> None:
        """Let the next request for the model look for a node, because one of the model's requests has ended."""
        if (line := self._lines.get(model_id)) is not None:
            line.give_turn()

    async def _give_turns(self) -> None:
        """Give turns while requests wait: nodes become free by heartbeats and through other replicas too."""
        while self._lines:
            await asyncio.sleep(SHORTEST_PAUSE)
            now = self._monotonic()
            for line in [*self._lines.values()]:
                if now >= line.next_at:
                    line.give_turn()
