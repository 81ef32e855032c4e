"""What a replica has in hand of webhooks: a few of each at a time, and nothing for too long."""

from __future__ import annotations

from lucid_compute.storage.webhook_outbox import Delivery
from lucid_compute.webhooks.hand import AT_A_TIME, Hand
from tests.factories import NOW


def delivery(webhook_id: str, position: int) -> Delivery:
    """A delivery that was claimed."""
    return Delivery(
        position=position, attempts=1, event_id="e", subject_id=str(position), type="node.unhealthy", occurred_at=NOW,
        payload={}, last_attempts=[], webhook_id=webhook_id, url="https://host/", secrets=["s"],
        is_failing=webhook_id == "fails",
    )  # fmt: skip


def begun(hand: Hand, now: float = 0.0) -> list[tuple[str, int]]:
    """All that can be begun."""
    found = []
    while (each := hand.begin(now)) is not None:
        found.append((each.webhook_id, each.position))
    return found


def test_webhooks_take_turns_and_have_eight_under_way() -> None:
    """One that has much to be told keeps none of the others waiting."""
    hand = Hand(10.0)
    hand.add([*(delivery("a", position) for position in range(20)), delivery("b", 100)], now=0.0)
    taken = begun(hand)
    assert taken[:3] == [("a", 0), ("b", 100), ("a", 1)]
    assert taken == [("a", 0), ("b", 100), *(("a", position) for position in range(1, AT_A_TIME))]
    assert len(hand) == 20 - AT_A_TIME
    hand.end(delivery("a", 3))
    assert begun(hand) == [("a", AT_A_TIME)]


def test_what_fails_or_is_late_is_laid_down() -> None:
    hand = Hand(10.0)
    hand.add([delivery("a", 1), delivery("b", 2)], now=0.0)
    hand.add([delivery("a", 3)], now=5.0)
    assert hand.lay_down_late(10.0) == []
    assert begun(hand, now=20.0) == []
    assert [each.position for each in hand.lay_down_late(11.0)] == [1, 2]
    assert [each.position for each in hand.lay_down("a")] == [3]
    assert hand.lay_down("a") == []
    assert len(hand) == 0
    assert begun(hand) == []


def test_those_that_fail_are_counted_until_they_are_over() -> None:
    hand = Hand(10.0)
    hand.add([delivery("a", 1), delivery("fails", 2)], now=0.0)
    assert hand.failing == 1
    begun(hand)
    assert hand.failing == 1
    hand.end(delivery("fails", 2))
    hand.add([delivery("fails", 3)], now=0.0)
    hand.lay_down("fails")
    hand.add([delivery("fails", 4)], now=0.0)
    hand.lay_down_late(11.0)
    assert hand.failing == 0
