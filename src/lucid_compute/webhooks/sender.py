"""The sender: empties the outbox of webhooks, beside those of other replicas, and tests webhooks when asked."""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from urllib.parse import urlsplit

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.storage.audit import Actor
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.webhook_outbox import CLAIM_SECONDS, Backlog, Delivery, Verdict, WebhookOutbox, note_attempt
from lucid_compute.storage.webhook_store import WebhookStore
from lucid_compute.webhook_rules import retry_seconds
from lucid_compute.webhooks.courier import ATTEMPT_SECONDS, Courier
from lucid_compute.webhooks.hand import Hand

LOOK_SECONDS = 1.0
CLEANING_SECONDS = 60.0
COUNTING_SECONDS = 15.0
MAX_UNDER_WAY = 64
MAX_IN_HAND = 512
MAX_FAILING = 32  # so that receivers that hang leave places to the others

_log = logging.getLogger(__name__)


class WebhookSender:
    """Sends what is due, for one replica: 64 deliveries at a time at most, and never with a connection in hand."""

    def __init__(self, outbox: WebhookOutbox, courier: Courier, clock: DatabaseClock) -> None:
        """Have `courier` bring what `outbox` holds."""
        self._outbox = outbox
        self._courier = courier
        self._clock = clock
        self.outcomes = {"delivered": 0, "failed": 0}
        self.backlog: Backlog | None = None  # of all replicas; None before it is counted
        self._hand = Hand(CLAIM_SECONDS - 1.5 * ATTEMPT_SECONDS)
        self._under_way: set[asyncio.Task[None]] = set()
        self._work = asyncio.Event()
        self._cleaning_due = self._counting_due = 0.0
        self._brought: list[tuple[Delivery, str]] = []
        self._settling = asyncio.Lock()  # requests need the database's connections more

    @property
    def running(self) -> int:
        """How many deliveries are under way."""
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
            unbegun = self._hand.lay_down_late(float("inf"))  # first: one that ends just now would have the next begun
            for task in self._under_way:
                task.cancel()
            await asyncio.gather(*self._under_way, return_exceptions=True)
            with suppress(DatabaseUnavailable):
                await self._outbox.lay_down(unbegun)

    async def look(self) -> int:
        """Claim what is due and there is room for, begin to send it, and answer how much that is."""
        self._work.clear()
        now = asyncio.get_running_loop().time()
        if late := self._hand.lay_down_late(now):
            await self._outbox.lay_down(late)
        if len(self._under_way) >= MAX_UNDER_WAY or len(self._hand) > MAX_IN_HAND // 2:
            return 0
        room, failing_room = MAX_IN_HAND - len(self._hand), MAX_FAILING - self._hand.failing
        claimed = await self._outbox.claim(room, failing_room)
        self._hand.add(claimed, now)
        self._begin()
        return len(claimed)

    def _begin(self) -> None:
        """Begin what there is a place for."""
        now = asyncio.get_running_loop().time()
        while len(self._under_way) < MAX_UNDER_WAY and (delivery := self._hand.begin(now)) is not None:
            task = asyncio.create_task(self.deliver(delivery), name="webhook delivery")
            self._under_way.add(task)
            task.add_done_callback(partial(self._end, delivery))

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
        verdict = await self._courier.bring(delivery)
        self.outcomes["delivered" if verdict.is_delivered else "failed"] += 1
        attempts = json.dumps(note_attempt(delivery.last_attempts, verdict, self._clock.now()))
        try:
            if verdict.is_delivered:
                self._brought.append((delivery, attempts))
                await self._settle_brought()
            else:
                await self._settle_failed(delivery, verdict, attempts)
        except DatabaseUnavailable:
            _log.warning("what came of a webhook's delivery could not be written, so it is sent again")

    async def _settle_brought(self) -> None:
        """Write down all that was brought by now, also what others brought, in one transaction."""
        async with self._settling:
            brought, self._brought = self._brought, []
            if brought:
                await self._outbox.succeed(brought)

    async def _settle_failed(self, delivery: Delivery, verdict: Verdict, attempts: str) -> None:
        wait_seconds = retry_seconds(delivery.attempts, random.random())  # noqa: S311 - jitter, not a secret
        reason = (
            f"Nothing could be delivered for a day; the last attempt came to {verdict.result}. Mend the receiver, "
            f"then POST /webhooks/{delivery.webhook_id}/test: a test that is delivered enables the webhook again."
        )
        async with self._settling:
            if await self._outbox.fail(delivery, attempts, wait_seconds=wait_seconds, reason=reason):
                _log.warning("webhook %s is disabled: it failed for a day", delivery.webhook_id)
            if waiting := self._hand.lay_down(delivery.webhook_id):
                await self._outbox.lay_down(waiting)

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

    def _end(self, delivery: Delivery, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        self._hand.end(delivery)
        if not task.cancelled():
            self._begin()
        self._work.set()
        if not task.cancelled() and task.exception() is not None:
            _log.error("a webhook's delivery ended badly, and is sent again", exc_info=task.exception())


class WebhookTester:
    """Tests webhooks: an event is sent at once, and what came of it is answered."""

    def __init__(
        self, store: WebhookStore, courier: Courier, clock: DatabaseClock, spend: Callable[[str], None]
    ) -> None:
        """Have `courier` go; `spend` takes a host's allowance and raises when it has none left."""
        self._store = store
        self._courier = courier
        self._clock = clock
        self._spend = spend

    async def test(self, actor: Actor, webhook_id: str, *, sees: str | None) -> tuple[Delivery, Verdict]:
        """Send a test and answer what came of it; one that is delivered enables a disabled webhook.

        Raises:
            WebhookNotFound: there is none.
            RateLimited: its host was tested or probed only just.
        """
        test = await self._store.prepare_test(webhook_id, sees=sees)
        self._spend(urlsplit(test.url).hostname or "")
        verdict = await self._courier.bring(test)
        attempts = json.dumps(note_attempt([], verdict, self._clock.now()))
        await self._store.record_test(actor, test, attempts, is_delivered=verdict.is_delivered)
        return test, verdict
