"""Sends the deliveries that one replica has claimed from the outbox, and tests webhooks on request."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial
from typing import NamedTuple
from urllib.parse import urlsplit

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.webhooks.claim_sql import CLAIM_SECONDS
from lucid_compute.webhooks.delivery import Deliverer
from lucid_compute.webhooks.outbox import (
    ROWS_A_STEP,
    WEBHOOKS_A_LOOK,
    Backlog,
    Delivery,
    DeliveryResult,
    Waiting,
    WebhookOutbox,
    with_attempt,
)
from lucid_compute.webhooks.rules import LIMITS, WebhookLimits, retry_seconds
from lucid_compute.webhooks.store import WebhookStore

CLEANING_SECONDS = 60.0
COUNTING_SECONDS = 15.0
MAX_IN_PROGRESS = 64
MAX_CLAIMED = 512
MAX_OF_ONE_WEBHOOK = 8
MAX_FAILING = 32  # so that receivers that hang leave room for the others
_log = logging.getLogger(__name__)


class ClaimedDeliveries:
    """The deliveries that this replica has claimed: those that wait, and a few of each webhook in progress. Pure.

    A delivery can be started for `valid_seconds` after its claim, by the caller's clock.
    """

    def __init__(self, valid_seconds: float) -> None:
        self._valid_seconds = valid_seconds
        self._waiting: dict[str, deque[tuple[float, Delivery]]] = {}
        self._in_progress: Counter[str] = Counter()
        self._failing: set[int] = set()

    @property
    def failing(self) -> int:
        """Return how many deliveries of failing webhooks wait or are in progress."""
        return len(self._failing)

    def __len__(self) -> int:
        """Return how many deliveries wait."""
        return sum(map(len, self._waiting.values()))

    def add(self, claimed: Iterable[Delivery], now: float) -> None:
        """Add deliveries that were claimed at `now` or a little later."""
        for delivery in claimed:
            if delivery.is_failing:
                self._failing.add(delivery.position)
            self._waiting.setdefault(delivery.webhook_id, deque()).append((now, delivery))

    def start(self, now: float) -> Delivery | None:
        """Return the next delivery to send, of each webhook in turn; None when there is none to start now.

        A webhook has a few deliveries in progress at most. A late delivery is not sent: after a long pause of this
        process another replica may have claimed it.
        """
        for webhook_id, waiting in [*self._waiting.items()]:
            if self._in_progress[webhook_id] < MAX_OF_ONE_WEBHOOK and not self._is_late(waiting[0], now):
                del self._waiting[webhook_id]
                _, delivery = waiting.popleft()
                if waiting:
                    self._waiting[webhook_id] = waiting  # behind the other webhooks
                self._in_progress[webhook_id] += 1
                return delivery
        return None

    def finish(self, delivery: Delivery) -> None:
        """Remove a started delivery that has ended."""
        self._failing.discard(delivery.position)
        self._in_progress[delivery.webhook_id] -= 1
        if not self._in_progress[delivery.webhook_id]:
            del self._in_progress[delivery.webhook_id]

    def release(self, webhook_id: str) -> list[Delivery]:
        """Remove and return the waiting deliveries of a webhook. It is failing, so they are retried one at a time."""
        released = [delivery for _, delivery in self._waiting.pop(webhook_id, ())]
        self._failing.difference_update(delivery.position for delivery in released)
        return released

    def release_late(self, now: float) -> list[Delivery]:
        """Remove and return the deliveries that waited too long: their claims would expire while they are sent."""
        late = []
        for webhook_id, waiting in [*self._waiting.items()]:
            while waiting and self._is_late(waiting[0], now):
                late.append(waiting.popleft()[1])
            if not waiting:
                del self._waiting[webhook_id]
        self._failing.difference_update(delivery.position for delivery in late)
        return late

    def _is_late(self, waiting: tuple[float, Delivery], now: float) -> bool:
        return now - waiting[0] > self._valid_seconds


class WebhookSender:
    """Sends due deliveries for one replica, 64 at a time at most. It holds no database connection while it sends."""

    def __init__(
        self, outbox: WebhookOutbox, deliverer: Deliverer, clock: DatabaseClock, limits: WebhookLimits = LIMITS
    ) -> None:
        self._outbox = outbox
        self._deliverer = deliverer
        self._clock = clock
        self._limits = limits
        self.outcomes = {"delivered": 0, "failed": 0}
        self.failed_looks = 0
        self.dropped = 0  # deliveries that were given up because too many waited
        self.backlog: Backlog | None = None  # of all replicas; None before it is counted
        self._claimed = ClaimedDeliveries(CLAIM_SECONDS - 1.5 * limits.attempt_seconds)
        self._in_progress: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._cleaning_due = self._counting_due = 0.0
        self._uncounted: list[str] = []  # webhooks whose waiting deliveries are still to be counted in this turn
        self._counted: list[Waiting] = []
        self._is_failing = False
        self._delivered: list[tuple[Delivery, str]] = []
        self._recording = asyncio.Lock()  # one connection of the pool at most: requests need them more

    @property
    def running(self) -> int:
        """Return how many deliveries are in progress."""
        return len(self._in_progress)

    async def run(self) -> None:
        """Send until this task is cancelled; deliveries that are then in progress are sent again later."""
        try:
            while True:
                claimed = await self._look(self.poll)
                await self._look(self._clean)
                await self._look(self._count)
                await self._pause(is_busy=bool(claimed))
        finally:
            # First: a delivery that ends now would start the next one.
            unstarted = self._claimed.release_late(float("inf"))
            for task in self._in_progress:
                task.cancel()
            await asyncio.gather(*self._in_progress, return_exceptions=True)
            with suppress(DatabaseUnavailable):
                await self._outbox.release(unstarted)

    async def _look(self, step: Callable[[], Awaitable[int]]) -> int:
        """Return what a step returns; 0 if it fails, which is logged and counted."""
        try:
            count = await step()
        except DatabaseUnavailable:
            self.failed_looks += 1
            if not self._is_failing:
                _log.warning("a look at the outbox of webhooks failed: the database did not answer in time")
            self._is_failing = True
            return 0
        except Exception:  # noqa: BLE001 - a fault must end neither the task nor the service; it is logged
            self.failed_looks += 1
            _log.exception("a look at the outbox of webhooks failed")
            return 0
        self._is_failing = False
        return count

    async def poll(self) -> int:
        """Claim as many due deliveries as there is room for, start to send them, and return how many were claimed."""
        self._work.clear()
        now = asyncio.get_running_loop().time()
        if late := self._claimed.release_late(now):
            await self._outbox.release(late)
        if len(self._in_progress) >= MAX_IN_PROGRESS or len(self._claimed) > MAX_CLAIMED // 2:
            return 0
        room, failing_room = MAX_CLAIMED - len(self._claimed), MAX_FAILING - self._claimed.failing
        claimed = await self._outbox.claim(room, failing_room)
        self._claimed.add(claimed, now)
        self._start()
        return len(claimed)

    def _start(self) -> None:
        """Start as many claimed deliveries as there is room for."""
        now = asyncio.get_running_loop().time()
        while len(self._in_progress) < MAX_IN_PROGRESS and (delivery := self._claimed.start(now)) is not None:
            task = asyncio.create_task(self.deliver(delivery), name="webhook delivery")
            self._in_progress.add(task)
            task.add_done_callback(partial(self._finish, delivery))

    async def _clean(self) -> int:
        """Clean when it is due. What fails is tried again when it is due again, so that it does not delay each look."""
        now = asyncio.get_running_loop().time()
        if now >= self._cleaning_due:
            self._cleaning_due = now + CLEANING_SECONDS
            if await self._outbox.clean():
                self._cleaning_due = now
        return 0

    async def _count(self) -> int:
        """Count what waits when it is due, for a few webhooks in each look. Return how many deliveries it gave up."""
        now = asyncio.get_running_loop().time()
        if not self._uncounted:
            if now < self._counting_due:
                return 0
            self._counting_due = now + COUNTING_SECONDS
            self._counted, self._uncounted = [], await self._outbox.waiting_webhooks()
        some = [self._uncounted.pop() for _ in range(min(WEBHOOKS_A_LOOK, len(self._uncounted)))]
        dropped = sum([await self._count_waiting(webhook_id) for webhook_id in some])
        if not self._uncounted:
            self.backlog = await self._outbox.count_backlog(self._counted)
        return dropped

    async def _count_waiting(self, webhook_id: str) -> int:
        """Count what waits for a webhook, and give up the oldest of too many deliveries; return how many."""
        waiting, dropped = await self._outbox.count_waiting(webhook_id, self._limits.max_waiting)
        if dropped:
            message = "webhook %s: over %d deliveries wait, and %d of the oldest are given up"
            _log.warning(message, webhook_id, self._limits.max_waiting, dropped)
            self.dropped += dropped
        if dropped < waiting.deliveries - self._limits.max_waiting or dropped == ROWS_A_STEP:
            self._uncounted.append(webhook_id)  # there are more: go on at the next look
        else:
            self._counted.append(waiting._replace(deliveries=waiting.deliveries - dropped))
        return dropped

    async def deliver(self, delivery: Delivery) -> None:
        """Send one delivery and record the outcome. If the database is unavailable, it is sent again later."""
        result = await self._deliverer.deliver(delivery)
        self.outcomes["delivered" if result.is_delivered else "failed"] += 1
        attempts = json.dumps(with_attempt(delivery.last_attempts, result, self._clock.now()))
        try:
            if result.is_delivered:
                self._delivered.append((delivery, attempts))
                await self._record_delivered()
            else:
                await self._record_failed(delivery, result, attempts)
        except DatabaseUnavailable:
            _log.warning("what came of a webhook's delivery could not be written, so it is sent again")

    async def _record_delivered(self) -> None:
        """Record all deliveries that have succeeded by now, other tasks' too, in one transaction."""
        async with self._recording:
            delivered, self._delivered = self._delivered, []
            if delivered:
                await self._outbox.succeed(delivered)

    async def _record_failed(self, delivery: Delivery, result: DeliveryResult, attempts: str) -> None:
        chance = random.random()  # noqa: S311 - jitter, not a secret
        wait_seconds = retry_seconds(delivery.attempts, chance, first_seconds=self._limits.first_retry_seconds)
        reason = (
            f"Nothing could be delivered for a day; the last attempt came to {result.result}. Mend the receiver, "
            f"then POST /webhooks/{delivery.webhook_id}/test: a test that is delivered enables the webhook again."
        )
        async with self._recording:
            if await self._outbox.fail(delivery, attempts, wait_seconds=wait_seconds, reason=reason):
                _log.warning("webhook %s is disabled: it failed for a day", delivery.webhook_id)
            if waiting := self._claimed.release(delivery.webhook_id):
                await self._outbox.release(waiting)

    async def _pause(self, *, is_busy: bool) -> None:
        """Wait for the next poll: a second, or until a delivery has ended and there may be more."""
        if is_busy or self._in_progress:
            try:
                async with asyncio.timeout(self._limits.poll_seconds):
                    await self._work.wait()
            except TimeoutError:
                return
        else:
            await asyncio.sleep(self._limits.poll_seconds)

    def _finish(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        self._in_progress.discard(task)
        self._claimed.finish(delivery)
        if not task.cancelled():
            self._start()
        self._work.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("a webhook's delivery ended badly, and is sent again", exc_info=task.exception())


class WebhookTester:
    """Tests webhooks: sends an event at once and returns the outcome."""

    def __init__(
        self, store: WebhookStore, deliverer: Deliverer, clock: DatabaseClock, spend: Callable[[str], None]
    ) -> None:
        """`spend` counts a test against its host's rate limit, and raises when the limit is reached."""
        self._store = store
        self._deliverer = deliverer
        self._clock = clock
        self._spend = spend

    async def test(
        self, actor: Actor, webhook_id: str, *, visible_owner: str | None
    ) -> tuple[Delivery, DeliveryResult]:
        """Send a test and return it with its outcome. A delivered test enables a disabled webhook.

        Raises:
            WebhookNotFound: there is no such webhook.
            RateLimited: the host was tested or probed a moment ago.
        """
        test = await self._store.prepare_test(webhook_id, visible_owner=visible_owner)
        self._spend(urlsplit(test.url).hostname or "")
        result = await self._deliverer.deliver(test)
        attempts = json.dumps(with_attempt([], result, self._clock.now()))
        await self._store.record_test(actor, test, attempts, is_delivered=result.is_delivered)
        return test, result


class WebhookParts(NamedTuple):
    """The parts of webhooks in one replica: routes use the store and the tester, the sender runs in the background."""

    store: WebhookStore
    sender: WebhookSender
    tester: WebhookTester


def build_webhooks(
    database: Database,
    policy: EgressPolicy,
    clock: DatabaseClock,
    own_endpoints: set[tuple[str, int]],
    spend: Callable[[str], None],
    *,
    limits: WebhookLimits = LIMITS,
) -> WebhookParts:
    """Build the parts. `spend` counts tests against a host's rate limit. Nothing is sent to `own_endpoints`."""
    store = WebhookStore(database, policy, limits.per_owner)
    deliverer = Deliverer(policy, clock, own_endpoints, limits.attempt_seconds)
    sender = WebhookSender(WebhookOutbox(database), deliverer, clock, limits)
    return WebhookParts(store, sender, WebhookTester(store, deliverer, clock, spend))
