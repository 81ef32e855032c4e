"""Rate limits: a burst, then a steady pace; each replica has its share."""

from __future__ import annotations

import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import KeyLimits, Principal
from lucid_compute.registry.fleet.replicas import ReplicaRecord, Replicas, Snapshot
from lucid_compute.registry.keys.rate_limits import PROBE_SECONDS, HeartbeatRate, KeyRates, ProbeRate, Throttle
from tests.factories import NOW


class Clock:
    """A monotonic clock that only the test moves."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    """The clock of the rates."""
    return Clock()


def test_a_node_has_a_burst_of_six_and_then_one_a_second(clock: Clock) -> None:
    """The seventh at once is refused with the seconds to wait; another node is not affected."""
    rate = HeartbeatRate(1.0, clock)
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
    HeartbeatRate(0, clock).spend("a")


@pytest.mark.parametrize("others", [0, 1, 2])
def test_a_keys_limit_holds_over_all_replicas(clock: Clock, others: int) -> None:
    """Asked at twice its limit for a minute, every replica lets its share through and no more than 5 % above."""
    replicas = Replicas()
    lease = [ReplicaRecord(str(n), NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for n in range(others)]
    replicas.apply("own", lease, NOW)
    rate = KeyRates(replicas, clock)
    limited = Principal("key", "acme", frozenset(), None, KeyLimits(requestsPerMinute=300))
    accepted = 0
    for _ in range(600):
        clock.seconds += 0.1
        try:
            rate.spend_request(limited)
        except RateLimited:
            continue
        accepted += 1
    assert 285 <= accepted * (1 + others) <= 315


def test_a_key_without_a_limit_has_none(clock: Clock) -> None:
    """As many at once as it likes."""
    rate = KeyRates(Replicas(), clock)
    for _ in range(1000):
        rate.spend_request(Principal("key", "acme", frozenset(), None, None))


def test_a_key_that_owes_tokens_waits_until_it_owes_none(clock: Clock) -> None:
    """What a request has cost is known when it ended: more than was left, perhaps, and the next one waits for that."""
    rates = KeyRates(Replicas(), clock)
    limited = Principal("key", "acme", frozenset(), None, KeyLimits(tokensPerMinute=6000))
    rates.require_tokens(limited)
    rates.charge_tokens(limited, 1300)  # the allowance is 300, and 100 come back each second
    with pytest.raises(RateLimited) as refused:
        rates.require_tokens(limited)
    assert 10 <= (refused.value.retry_after_seconds or 0) <= 13
    assert refused.value.details == {"unit": "tokens", "limitPerMinute": 6000}
    assert [(left.unit, left.limit, left.remaining) for left in rates.allowances(limited)] == [("tokens", 6000, 0)]
    clock.seconds += 10.1
    rates.require_tokens(limited)


def test_tokens_over_a_minute_stay_within_the_limit(clock: Clock) -> None:
    """A key that asks for 50 tokens ten times a second gets its 6,000 a minute and no more than 5 % above."""
    rates = KeyRates(Replicas(), clock)
    limited = Principal("key", "acme", frozenset(), None, KeyLimits(tokensPerMinute=6000))
    used = 0
    for _ in range(600):
        clock.seconds += 0.1
        try:
            rates.require_tokens(limited)
        except RateLimited:
            continue
        rates.charge_tokens(limited, 50)
        used += 50
    assert 5700 <= used <= 6350


def test_an_allowance_says_what_may_be_used_now_and_when_it_is_full(clock: Clock) -> None:
    """Of 300 requests a minute fifteen may come at once; each takes a fifth of a second to come back."""
    rates = KeyRates(Replicas(), clock)
    limited = Principal("key", "acme", frozenset(), None, KeyLimits(requestsPerMinute=300))
    for _ in range(5):
        rates.spend_request(limited)
    ((unit, limit, remaining, reset_seconds),) = rates.allowances(limited)
    assert (unit, limit, remaining) == ("requests", 300, 10)
    assert reset_seconds == pytest.approx(1.0)


@pytest.mark.parametrize("others", [0, 2])
def test_a_host_is_probed_once_in_ten_seconds_on_average_over_all_replicas(clock: Clock, others: int) -> None:
    """Each of three replicas allows one in thirty seconds; another host is counted separately."""
    replicas = Replicas()
    lease = [ReplicaRecord(str(n), NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for n in range(others)]
    replicas.apply("own", lease, NOW)
    rate = ProbeRate(replicas, clock)
    rate.spend("a")
    rate.spend("b")
    clock.seconds += PROBE_SECONDS * (1 + others) - 1
    with pytest.raises(RateLimited) as refused:
        rate.spend("a")
    assert refused.value.retry_after_seconds == 1
    clock.seconds += 1
    rate.spend("a")


def test_names_with_a_full_allowance_are_forgotten_above_a_number(clock: Clock) -> None:
    throttle = Throttle(clock)
    for number in range(100):
        throttle.wait_seconds(str(number), 10, 1)
    throttle.forget_full(above=99)
    assert throttle.wait_seconds("1", 10, 1) > 0
    clock.seconds += 11
    throttle.forget_full(above=100)
    assert len(throttle._full_at) == 100
    throttle.forget_full(above=99)
    assert not throttle._full_at
