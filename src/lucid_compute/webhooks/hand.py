"""What a replica has in hand: deliveries that it claimed, of which a few of each webhook are under way. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from lucid_compute.storage.webhook_outbox import Delivery

AT_A_TIME = 8  # of one webhook


class Hand:
    """Deliveries that were claimed at an instant and can be begun until another, both by a clock of the caller's."""

    def __init__(self, good_for_seconds: float) -> None:
        """Have nothing in hand; a claim can be begun for so long."""
        self._good_for_seconds = good_for_seconds
        self._waiting: dict[str, deque[tuple[float, Delivery]]] = {}
        self._under_way: Counter[str] = Counter()
        self._failing: set[int] = set()

    @property
    def failing(self) -> int:
        """How many are in hand or under way of webhooks that fail."""
        return len(self._failing)

    def __len__(self) -> int:
        """Answer how many wait to be begun."""
        return sum(map(len, self._waiting.values()))

    def add(self, claimed: Iterable[Delivery], now: float) -> None:
        """Take in hand what was claimed at `now`, or a little later."""
        for delivery in claimed:
            if delivery.is_failing:
                self._failing.add(delivery.position)
            self._waiting.setdefault(delivery.webhook_id, deque()).append((now, delivery))

    def begin(self, now: float) -> Delivery | None:
        """Answer the next to be brought, of each webhook in turn; None when every one has enough under way or is late.

        A process that was stopped may find that others have claimed what it had in hand.
        """
        for webhook_id, its_own in [*self._waiting.items()]:
            if self._under_way[webhook_id] < AT_A_TIME and not self._is_late(its_own[0], now):
                waiting = self._waiting.pop(webhook_id)
                _, delivery = waiting.popleft()
                if waiting:
                    self._waiting[webhook_id] = waiting  # behind the others
                self._under_way[webhook_id] += 1
                return delivery
        return None

    def end(self, delivery: Delivery) -> None:
        """Note that a delivery which was begun is over."""
        self._failing.discard(delivery.position)
        self._under_way[delivery.webhook_id] -= 1
        if not self._under_way[delivery.webhook_id]:
            del self._under_way[delivery.webhook_id]

    def lay_down(self, webhook_id: str) -> list[Delivery]:
        """Answer what waits of a webhook, and have it in hand no more: it fails, so it is tried by ones."""
        laid_down = [delivery for _, delivery in self._waiting.pop(webhook_id, ())]
        self._failing.difference_update(delivery.position for delivery in laid_down)
        return laid_down

    def lay_down_late(self, now: float) -> list[Delivery]:
        """Answer what could not be begun in time, and have it in hand no more: its claim would end on the way."""
        late = []
        for webhook_id, waiting in [*self._waiting.items()]:
            while waiting and self._is_late(waiting[0], now):
                late.append(waiting.popleft()[1])
            if not waiting:
                del self._waiting[webhook_id]
        self._failing.difference_update(delivery.position for delivery in late)
        return late

    def _is_late(self, waiting: tuple[float, Delivery], now: float) -> bool:
        return now - waiting[0] > self._good_for_seconds
