"""The sender: empties the outbox of webhooks, beside those of other replicas, and tests webhooks when asked."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.webhooks.delivery import ATTEMPT_SECONDS, Deliverer
from lucid_compute.webhooks.outbox import CLAIM_SECONDS, Backlog, Delivery, DeliveryResult, WebhookOutbox, note_attempt
from lucid_compute.webhooks.rules import retry_seconds
from lucid_compute.webhooks.store import WebhookStore

LOOK_SECONDS = 1.0
CLEANING_SECONDS = 60.0
COUNTING_SECONDS = 15.0
MAX_UNDER_WAY = 64
MAX_CLAIMED = 512
MAX_OF_ONE_WEBHOOK = 8
MAX_FAILING = 32  # so that receivers that hang leave places to the others
_log = logging.getLogger(__name__)


class ClaimedDeliveries:
    """The deliveries that this replica has claimed and that wait; a few of each webhook are under way. Pure.

    A claim made at an instant of the caller's clock can be started for `good_for_seconds`.
    """

    def __init__(self, good_for_seconds: float) -> None:
        self._good_for_seconds = good_for_seconds
        self._waiting: dict[str, deque[tuple[float, Delivery]]] = {}
        self._under_way: Counter[str] = Counter()
        self._failing: set[int] = set()

    @property
    def failing(self) -> int:
        """Return how many wait or are under way of webhooks that fail."""
        return len(self._failing)

    def __len__(self) -> int:
        """Return how many wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, claimed: Iterable[Delivery], now: float) -> None:
        """Add what was claimed at `now` or a little later."""
        for delivery in claimed:
            if delivery.is_failing:
                self._failing.add(delivery.position)
            self._waiting.setdefault(delivery.webhook_id, deque()).append((now, delivery))

    def start(self, now: float) -> Delivery | None:
        """Return the next to be sent, of each webhook in turn; None when every one has enough under way or is late.

        A late one is not sent: after a long pause of this process other replicas may have claimed it.
        """
        for webhook_id, its_own in [*self._waiting.items()]:
            if self._under_way[webhook_id] < MAX_OF_ONE_WEBHOOK and not self._is_late(its_own[0], now):
                waiting = self._waiting.pop(webhook_id)
                _, delivery = waiting.popleft()
                if waiting:
                    self._waiting[webhook_id] = waiting  # behind the others
                self._under_way[webhook_id] += 1
                return delivery
        return None

    def finish(self, delivery: Delivery) -> None:
        """Note that a delivery which was started is over."""
        self._failing.discard(delivery.position)
        self._under_way[delivery.webhook_id] -= 1
        if not self._under_way[delivery.webhook_id]:
            del self._under_way[delivery.webhook_id]

    def release(self, webhook_id: str) -> list[Delivery]:
        """Return and release what waits of a webhook. It is failing, so its deliveries are retried one at a time."""
        released = [delivery for _, delivery in self._waiting.pop(webhook_id, ())]
        self._failing.difference_update(delivery.position for delivery in released)
        return released

    def release_late(self, now: float) -> list[Delivery]:
        """Return and release what was not started in time: its claim would end while it is sent."""
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


class WebhookSender:
    """Sends what is due, for one replica: 64 deliveries at a time at most, and never while it holds a connection."""

    def __init__(self, outbox: WebhookOutbox, deliverer: Deliverer, clock: DatabaseClock) -> None:
        self._outbox = outbox
        self._deliverer = deliverer
        self._clock = clock
        self.outcomes = {"delivered": 0, "failed": 0}
        self.backlog: Backlog | None = None  # of all replicas; None before it is counted
        self._claimed = ClaimedDeliveries(CLAIM_SECONDS - 1.5 * ATTEMPT_SECONDS)
        self._under_way: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._cleaning_due = self._counting_due = 0.0
        self._delivered: list[tuple[Delivery, str]] = []
        self._settling = asyncio.Lock()  # requests need the database's connections more

    @property
    def running(self) -> int:
        """Return how many deliveries are under way."""
        return len(self._under_way)

    async def run(self) -> None:
        """Send for as long as this task runs; what is under way at its end is sent again later."""
        try:
            while True:
                try:
                    found = await self.look()
                    await self._clean_and_count()
                except DatabaseUnavailable:
                    found = 0
                except Exception:  # noqa: BLE001 - a fault must end neither the task nor the service; it is logged
                    _log.exception("a look at the outbox of webhooks failed")
                    found = 0
                await self._pause(is_busy=bool(found))
        finally:
            # First: a delivery that ends just now would start the next one.
            unstarted = self._claimed.release_late(float("inf"))
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            with suppress(DatabaseUnavailable):
                await self._outbox.release(unstarted)

    async def look(self) -> int:
        """Claim what is due and there is room for, start to send it, and return how many deliveries that is."""
        self._work.clear()
        now = asyncio.get_running_loop().time()
        if late := self._claimed.release_late(now):
            await self._outbox.release(late)
        if len(self._under_way) >= MAX_UNDER_WAY or len(self._claimed) > MAX_CLAIMED // 2:
            return 0
        room, failing_room = MAX_CLAIMED - len(self._claimed), MAX_FAILING - self._claimed.failing
        claimed = await self._outbox.claim(room, failing_room)
        self._claimed.add(claimed, now)
        self._start()
        return len(claimed)

    def _start(self) -> None:
        """Start as many deliveries as there is room for."""
        now = asyncio.get_running_loop().time()
        while len(self._under_way) < MAX_UNDER_WAY and (delivery := self._claimed.start(now)) is not None:
            task = asyncio.create_task(self.deliver(delivery), name="webhook delivery")
            self._under_way.add(task)
            task.add_done_callback(partial(self._finish, delivery))

    async def _clean_and_count(self) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._cleaning_due:
            await self._outbox.clean()
            self._cleaning_due = now + CLEANING_SECONDS
        if now >= self._counting_due:
            self.backlog = await self._outbox.count_backlog()
            self._counting_due = now + COUNTING_SECONDS

    async def deliver(self, delivery: Delivery) -> None:
        """Send one delivery and settle it; when the database is away it is sent again."""
        verdict = await self._deliverer.deliver(delivery)
        self.outcomes["delivered" if verdict.is_delivered else "failed"] += 1
        attempts = json.dumps(note_attempt(delivery.last_attempts, verdict, self._clock.now()))
        try:
            if verdict.is_delivered:
                self._delivered.append((delivery, attempts))
                await self._settle_delivered()
            else:
                await self._settle_failed(delivery, verdict, attempts)
        except DatabaseUnavailable:
            _log.warning("what came of a webhook's delivery could not be written, so it is sent again")

    async def _settle_delivered(self) -> None:
        """Record all deliveries that have succeeded by now, those of other tasks too, in one transaction."""
        async with self._settling:
            delivered, self._delivered = self._delivered, []
            if delivered:
                await self._outbox.succeed(delivered)

    async def _settle_failed(self, delivery: Delivery, verdict: DeliveryResult, attempts: str) -> None:
        wait_seconds = retry_seconds(delivery.attempts, random.random())  # noqa: S311 - jitter, not a secret
        reason = (
            f"Nothing could be delivered for a day; the last attempt came to {verdict.result}. Mend the receiver, "
            f"then POST /webhooks/{delivery.webhook_id}/test: a test that is delivered enables the webhook again."
        )
        async with self._settling:
            if await self._outbox.fail(delivery, attempts, wait_seconds=wait_seconds, reason=reason):
                _log.warning("webhook %s is disabled: it failed for a day", delivery.webhook_id)
            if waiting := self._claimed.release(delivery.webhook_id):
                await self._outbox.release(waiting)

    async def _pause(self, *, is_busy: bool) -> None:
        """Wait for the next look: until a delivery has ended while there is more, for a second at most."""
        if is_busy or self._under_way:
            try:
                async with asyncio.timeout(LOOK_SECONDS):
                    await self._work.wait()
            except TimeoutError:
                return
        else:
            await asyncio.sleep(LOOK_SECONDS)

    def _finish(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._claimed.finish(delivery)
        if not task.cancelled():
            self._start()
        self._work.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("a webhook's delivery ended badly, and is sent again", exc_info=task.exception())


class WebhookTester:
    """Tests webhooks: an event is sent at once, and what came of it is answered."""

    def __init__(
        self, store: WebhookStore, deliverer: Deliverer, clock: DatabaseClock, spend: Callable[[str], None]
    ) -> None:
        """`spend` takes from a host's allowance and raises when nothing is left of it."""
        self._store = store
        self._deliverer = deliverer
        self._clock = clock
        self._spend = spend

    async def test(
        self, actor: Actor, webhook_id: str, *, visible_owner: str | None
    ) -> tuple[Delivery, DeliveryResult]:
        """Send a test and answer what came of it; one that is delivered enables a disabled webhook.

        Raises:
            WebhookNotFound: there is none.
            RateLimited: its host was tested or probed only just.
        """
        test = await self._store.prepare_test(webhook_id, visible_owner=visible_owner)
        self._spend(urlsplit(test.url).hostname or "")
        verdict = await self._deliverer.deliver(test)
        attempts = json.dumps(note_attempt([], verdict, self._clock.now()))
        await self._store.record_test(actor, test, attempts, is_delivered=verdict.is_delivered)
        return test, verdict


class WebhookParts(NamedTuple):
    """The store that routes write to, the sender that empties the outbox, and the tester."""

    store: WebhookStore
    sender: WebhookSender
    tester: WebhookTester


def build_webhooks(
    database: Database,
    policy: EgressPolicy,
    clock: DatabaseClock,
    own_endpoints: set[tuple[str, int]],
    spend: Callable[[str], None],
) -> WebhookParts:
    """Put them together; `spend` takes a host's allowance of tests, and nothing goes to `own_endpoints`."""
    store, deliverer = WebhookStore(database, policy), Deliverer(policy, clock, own_endpoints)
    sender = WebhookSender(WebhookOutbox(database), deliverer, clock)
    return WebhookParts(store, sender, WebhookTester(store, deliverer, clock, spend))
