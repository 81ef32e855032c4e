"""Claimed deliveries: a few of each webhook at a time, and none kept for too long."""

from __future__ import annotations

from lucid_compute.webhooks.outbox import Delivery
from lucid_compute.webhooks.sender import MAX_OF_ONE_WEBHOOK, ClaimedDeliveries
from tests.factories import NOW


def delivery(webhook_id: str, position: int) -> Delivery:
    """Return a claimed delivery."""
    return Delivery(
        position=position, attempts=1, event_id="e", subject_id=str(position), type="node.unhealthy", occurred_at=NOW,
        payload={}, last_attempts=[], webhook_id=webhook_id, url="https://host/", secrets=["s"],
        is_failing=webhook_id == "fails",
    )  # fmt: skip


def started(claimed: ClaimedDeliveries, now: float = 0.0) -> list[tuple[str, int]]:
    """Start all deliveries that can be started; return them."""
    found = []
    while (each := claimed.start(now)) is not None:
        found.append((each.webhook_id, each.position))
    return found


def test_webhooks_take_turns_and_have_eight_deliveries_in_progress() -> None:
    """A webhook with many events does not delay the others."""
    claimed = ClaimedDeliveries(10.0)
    claimed.add([*(delivery("a", position) for position in range(20)), delivery("b", 100)], now=0.0)
    first = started(claimed)
    assert first[:3] == [("a", 0), ("b", 100), ("a", 1)]
    assert first == [("a", 0), ("b", 100), *(("a", position) for position in range(1, MAX_OF_ONE_WEBHOOK))]
    assert len(claimed) == 20 - MAX_OF_ONE_WEBHOOK
    claimed.finish(delivery("a", 3))
    assert started(claimed) == [("a", MAX_OF_ONE_WEBHOOK)]


def test_what_fails_or_is_late_is_released() -> None:
    claimed = ClaimedDeliveries(10.0)
    claimed.add([delivery("a", 1), delivery("b", 2)], now=0.0)
    claimed.add([delivery("a", 3)], now=5.0)
    assert claimed.release_late(10.0) == []
    assert started(claimed, now=20.0) == []
    assert [each.position for each in claimed.release_late(11.0)] == [1, 2]
    assert [each.position for each in claimed.release("a")] == [3]
    assert claimed.release("a") == []
    assert len(claimed) == 0
    assert started(claimed) == []


def test_those_that_fail_are_counted_until_they_are_over() -> None:
    claimed = ClaimedDeliveries(10.0)
    claimed.add([delivery("a", 1), delivery("fails", 2)], now=0.0)
    assert claimed.failing == 1
    started(claimed)
    assert claimed.failing == 1
    claimed.finish(delivery("fails", 2))
    claimed.add([delivery("fails", 3)], now=0.0)
    claimed.release("fails")
    claimed.add([delivery("fails", 4)], now=0.0)
    claimed.release_late(11.0)
    assert claimed.failing == 0
