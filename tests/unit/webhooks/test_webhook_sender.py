"""The sender of webhooks when its service stops."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.webhooks.delivery import Deliverer
from lucid_compute.webhooks.outbox import Delivery, DeliveryResult, WebhookOutbox
from lucid_compute.webhooks.sender import MAX_OF_ONE_WEBHOOK, WebhookSender
from tests.unit.webhooks.test_webhook_hand import delivery


class StopsTheService(WebhookOutbox):
    """An outbox with deliveries of one webhook. Recording the first one stops the sender."""

    def __init__(self) -> None:
        """Hold twice as many deliveries as are sent at a time."""
        super().__init__(Database("postgresql://nowhere"))
        self.due = [delivery("a", position) for position in range(2 * MAX_OF_ONE_WEBHOOK)]
        self.released: list[int] = []
        self.running: asyncio.Task[None] | None = None

    async def claim(self, room: int, failing_room: int) -> list[Delivery]:  # noqa: ARG002 - there are fewer due
        """Return all deliveries, once."""
        claimed, self.due = self.due, []
        return claimed

    async def succeed(self, delivered: Sequence[tuple[Delivery, str]]) -> None:  # noqa: ARG002 - any will do
        """Stop the sender; the delivery has ended before the sender's task runs again."""
        assert self.running is not None
        self.running.cancel()

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Record which were released."""
        self.released += [each.position for each in deliveries]


class DeliversOne(Deliverer):
    """Sends the first delivery at once, and hangs with all others."""

    async def deliver(self, delivery: Delivery) -> DeliveryResult:
        """Return for the first delivery alone."""
        if delivery.position:
            await asyncio.Event().wait()
        return DeliveryResult(is_delivered=True, result="2xx", milliseconds=1.0)


async def test_a_delivery_that_ends_while_the_service_stops_has_no_other_begun() -> None:
    """It would run while the database is closed already, and be sent twice."""
    clock, outbox = DatabaseClock(), StopsTheService()
    sender = WebhookSender(outbox, DeliversOne(EgressPolicy(), clock, set()), clock)
    outbox.running = asyncio.create_task(sender.run())
    with suppress(asyncio.CancelledError):
        await outbox.running
    assert sender.running == 0
    assert outbox.released == list(range(MAX_OF_ONE_WEBHOOK, 2 * MAX_OF_ONE_WEBHOOK))
