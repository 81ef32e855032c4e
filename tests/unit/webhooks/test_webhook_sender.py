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
    """An outbox with some deliveries of one webhook; the first that is brought stops the sender while it is settled."""

    def __init__(self) -> None:
        """Have twice as many as are sent at a time."""
        super().__init__(Database("postgresql://nowhere"))
        self.due = [delivery("a", position) for position in range(2 * MAX_OF_ONE_WEBHOOK)]
        self.released: list[int] = []
        self.running: asyncio.Task[None] | None = None

    async def claim(self, room: int, failing_room: int) -> list[Delivery]:  # noqa: ARG002 - there are fewer
        """Return all, once."""
        claimed, self.due = self.due, []
        return claimed

    async def succeed(self, brought: Sequence[tuple[Delivery, str]]) -> None:  # noqa: ARG002 - any will do
        """Stop the sender; the delivery has ended before the sender's task runs again."""
        assert self.running is not None
        self.running.cancel()

    async def release(self, deliveries: Sequence[Delivery]) -> None:
        """Note which."""
        self.released += [each.position for each in deliveries]


class BringsOne(Deliverer):
    """Brings the first delivery at once, and no other."""

    async def deliver(self, delivery: Delivery) -> DeliveryResult:
        """Hang, after the first."""
        if delivery.position:
            await asyncio.Event().wait()
        return DeliveryResult(is_delivered=True, result="2xx", milliseconds=1.0)


async def test_a_delivery_that_ends_while_the_service_stops_has_no_other_begun() -> None:
    """It would run on beside a database that is closed, and be sent twice."""
    clock, outbox = DatabaseClock(), StopsTheService()
    sender = WebhookSender(outbox, BringsOne(EgressPolicy(), clock, set()), clock)
    outbox.running = asyncio.create_task(sender.run())
    with suppress(asyncio.CancelledError):
        await outbox.running
    assert sender.running == 0
    assert outbox.released == list(range(MAX_OF_ONE_WEBHOOK, 2 * MAX_OF_ONE_WEBHOOK))
