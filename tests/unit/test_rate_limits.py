"""Rates: a burst, then a steady pace, and each replica its share."""

from __future__ import annotations

import pytest

from lucid_compute.api import rate_limits
from lucid_compute.api.rate_limits import HeartbeatRate, RequestRate
from lucid_compute.errors import RateLimited
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.fleet.replicas import Replica, Replicas, Snapshot
from lucid_compute.wire.keys import KeyLimits
from tests.factories import NOW


class Clock:
    """A monotonic clock that stands still until it is told to move on."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock that the rates read."""
    clock = Clock()
    monkeypatch.setattr(rate_limits, "time", clock)
    return clock


def test_a_node_has_a_burst_of_six_and_then_one_a_second(clock: Clock) -> None:
    """The seventh at once is refused with the seconds to wait; another node is not touched by it."""
    rate = HeartbeatRate(1.0)
    for _ in range(6):
        rate.spend("a")
    with pytest.raises(RateLimited) as refused:
        rate.spend("a")
    assert refused.value.retry_after_seconds == 1
    rate.spend("b")
    clock.seconds += 1.0
    rate.spend("a")
    with pytest.raises(RateLimited):
        rate.spend("a")
    HeartbeatRate(0).spend("a")


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_keys_limit_holds_over_all_replicas(clock: Clock, others: int) -> None:
    """Asked at twice its limit for a minute, every replica lets its share through and no more than 5 % above."""
    replicas = Replicas()
    lease = [Replica(str(n), NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for n in range(others)]
    replicas.apply("own", lease, NOW)
    rate = RequestRate(replicas)
    limited = Principal("key", "acme", frozenset(), None, KeyLimits(requestsPerMinute=300))
    accepted = 0
    for _ in range(600):
        clock.seconds += 0.1
        try:
            rate.spend(limited)
        except RateLimited:
            continue
        accepted += 1
    assert 285 <= accepted * (1 + others) <= 315


def test_a_key_without_a_limit_has_none(clock: Clock) -> None:
    """As many at once as it likes."""
    rate = RequestRate(Replicas())
    for _ in range(1000):
        rate.spend(Principal("key", "acme", frozenset(), None, None))
