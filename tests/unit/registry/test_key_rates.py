"""The limits of keys on one replica: a minute's limit may be spent at once, and no minute exceeds it."""

from __future__ import annotations

import random
from collections import deque

import pytest

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.key_limits import KeyLimits
from lucid_compute.registry.fleet.replicas import ReplicaRecord, Replicas, Snapshot
from lucid_compute.registry.keys.key_rates import REQUESTS, KeyRates, _Meter
from lucid_compute.registry.keys.limit_shares import Grant
from lucid_compute.registry.keys.sliding_window import SLOT_SECONDS, WINDOW_SECONDS, SlidingWindow
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


def limited(requests: int | None = None, tokens: int | None = None, key_id: str = "key") -> Principal:
    """A key with these limits."""
    limits = KeyLimits(requestsPerMinute=requests, tokensPerMinute=tokens)
    return Principal(key_id, "acme", frozenset(), None, limits)


def spend(rates: KeyRates, principal: Principal) -> bool:
    """Return whether one more request is allowed."""
    try:
        assert rates.spend(principal)
    except RateLimited:
        return False
    return True


def with_others(count: int) -> Replicas:
    """So many other live replicas."""
    replicas = Replicas()
    replicas.apply("own", [ReplicaRecord(str(n), NOW, NOW, NOW, Snapshot.parse("3:3:"), {}) for n in range(count)], NOW)
    return replicas


@pytest.mark.parametrize("limit", [1, 2, 30, 300, 6000])
def test_a_limit_may_be_spent_at_once_and_comes_back_after_a_minute(clock: Clock, limit: int) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), limited(limit)
    for _ in range(3):
        assert sum(spend(rates, key) for _ in range(limit + 10)) == limit
        clock.seconds += WINDOW_SECONDS - 0.01
        assert not spend(rates, key)
        clock.seconds += 0.01


@pytest.mark.parametrize("per_second", [1, 5, 10, 80])
def test_a_steady_client_gets_its_limit_and_no_minute_has_more(clock: Clock, per_second: int) -> None:
    """Asked at the limit and far above it, for five minutes: any 60 seconds hold at most 300, each minute 98 %."""
    rates, key = KeyRates(Replicas(), clock=clock), limited(300)
    accepted: deque[float] = deque()
    total = 0
    for _ in range(300 * per_second):
        clock.seconds += 1 / per_second
        if spend(rates, key):
            total += 1
            accepted.append(clock.seconds)
        while accepted[0] <= clock.seconds - WINDOW_SECONDS:
            accepted.popleft()
        assert len(accepted) <= 300
    assert total >= min(per_second * 300, 1500) * 0.98


def test_a_refusal_names_the_limit_what_is_spent_and_seconds_that_are_enough(clock: Clock) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), limited(1500)
    for _ in range(1500):
        clock.seconds += 0.01
        spend(rates, key)
    with pytest.raises(RateLimited) as refused:
        rates.spend(key)
    seconds = refused.value.retry_after_seconds or 0
    assert str(refused.value) == (
        f"This key's limit of 1,500 requests a minute is reached: 1,500 are spent. Retry in {seconds} s."
    )
    assert 45 <= seconds <= 49  # the first ones were 15 s ago
    assert refused.value.details == {"unit": "requests", "limitPerMinute": 1500}
    clock.seconds += seconds
    assert spend(rates, key)


def test_a_key_without_a_limit_has_none(clock: Clock) -> None:
    """As many at once as it likes."""
    rates = KeyRates(Replicas(), clock=clock)
    for _ in range(1000):
        assert rates.spend(Principal("key", "acme", frozenset(), None, None))
        assert rates.spend(limited())
    assert not rates._meters


def test_tokens_may_be_spent_at_once_and_a_request_may_exceed_what_is_left(clock: Clock) -> None:
    """What a request has cost is known when it ended. What was too much is taken from the minutes that follow."""
    rates, key = KeyRates(Replicas(), clock=clock), limited(tokens=1000)
    for _ in range(4):
        assert spend(rates, key)
        rates.charge_tokens(key, 227)
    assert spend(rates, key)  # 92 are left
    rates.charge_tokens(key, 1500)
    assert [(left.unit, left.limit, left.remaining) for left in rates.allowances(key)] == [("tokens", 1000, 0)]
    with pytest.raises(RateLimited, match=r"limit of 1,000 tokens a minute is reached: 2,408 are spent") as refused:
        rates.spend(key)
    assert 120 <= (refused.value.retry_after_seconds or 0) <= 127
    clock.seconds += 119.9
    assert not spend(rates, key)
    clock.seconds += 0.2
    assert spend(rates, key)


def test_tokens_over_minutes_stay_within_the_limit(clock: Clock) -> None:
    """Requests of any size, as many as are allowed, for an hour: on average the limit and no more."""
    rates, key, chance = KeyRates(Replicas(), clock=clock), limited(tokens=6000), random.Random(3)
    used = 0
    for _ in range(36_000):
        clock.seconds += 0.1
        if spend(rates, key):
            cost = chance.choice((1, 50, 500, 20_000))
            rates.charge_tokens(key, cost)
            used += cost
    assert 6000 * 60 * 0.98 <= used <= 6000 * 60 * 1.05 + 20_000


def test_requests_are_counted_only_if_tokens_are_left(clock: Clock) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), limited(requests=10, tokens=10)
    rates.charge_tokens(key, 10)
    assert not spend(rates, key)
    assert [(left.unit, left.remaining) for left in rates.allowances(key)] == [("requests", 10), ("tokens", 0)]
    assert rates.spend(key, minds_tokens=False)


def test_an_allowance_says_what_may_be_used_now_and_when_it_is_full(clock: Clock) -> None:
    """All of what is left may come at once."""
    rates, key = KeyRates(Replicas(), clock=clock), limited(30)
    for _ in range(5):
        clock.seconds += 2
        spend(rates, key)
    ((unit, limit, remaining, reset_seconds),) = rates.allowances(key)
    assert (unit, limit, remaining) == ("requests", 30, 25)
    assert reset_seconds == pytest.approx(60.0)


@pytest.mark.parametrize("others", [1, 2])
def test_without_shares_each_replica_allows_an_equal_part(clock: Clock, others: int) -> None:
    """As while Postgres is away."""
    rates = KeyRates(with_others(others), clock=clock)
    assert sum(spend(rates, limited(300)) for _ in range(400)) == 300 // (1 + others)


def test_a_replica_is_alone_a_minute_after_the_last_other_one(clock: Clock) -> None:
    """What that one spent counts as long."""
    replicas = with_others(1)
    rates, key = KeyRates(replicas, clock=clock), limited(300)
    assert sum(spend(rates, key) for _ in range(400)) == 150
    replicas.apply("own", [], NOW)
    clock.seconds += WINDOW_SECONDS - 1
    assert not spend(rates, key)
    clock.seconds += 1
    assert sum(spend(rates, key) for _ in range(400)) == 300


async def test_keys_that_come_and_go_leave_nothing_behind(clock: Clock) -> None:
    rates = KeyRates(Replicas(), clock=clock)
    for number in range(1000):
        rates.spend(limited(10, 10, key_id=f"key-{number}"))
        rates.charge_tokens(limited(10, 10, key_id=f"key-{number}"), 5)
    await rates.exchange()
    assert len(rates._meters) == 2000
    clock.seconds += WINDOW_SECONDS + 1
    await rates.exchange()
    assert not rates._meters
    assert not rates._due


def test_a_window_holds_few_slots_however_many_uses(clock: Clock) -> None:
    window = SlidingWindow(10**9)
    for _ in range(20_000):
        clock.seconds += 0.01
        window.add(3, clock.seconds)
        assert len(window._slots) <= WINDOW_SECONDS / SLOT_SECONDS + 2
    assert 18_000 <= window.used_at(clock.seconds) <= 18_160


def test_debts_add_up(clock: Clock) -> None:
    """Of requests that ran at the same time: each exceeded what was left."""
    window = SlidingWindow(1000)
    for _ in range(3):
        window.add(1500, clock.seconds)
    assert window.used_at(clock.seconds) == 4500
    for minute, used in enumerate((3500, 2500, 1500, 500, 0), 1):
        assert window.used_at(clock.seconds + WINDOW_SECONDS * minute) == used


def at_once(limit: int | None, key_id: str = "key") -> Principal:
    """A key that may have so many requests at once."""
    return Principal(key_id, "acme", frozenset(), None, KeyLimits(concurrency=limit))


def begin(rates: KeyRates, principal: Principal) -> bool:
    """Return whether one more request may run."""
    try:
        assert rates.begin(principal)
    except RateLimited:
        return False
    return True


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_so_many_requests_may_run_at_once_and_another_when_one_has_ended(clock: Clock, limit: int) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), at_once(limit)
    for _ in range(3):
        assert sum(begin(rates, key) for _ in range(limit + 5)) == limit
        assert begin(rates, at_once(1, "another"))
        rates.end(at_once(1, "another"))
        rates.end(key)
        assert [begin(rates, key), begin(rates, key)] == [True, False]
        for _ in range(limit):
            rates.end(key)
        clock.seconds += 1


def test_a_refusal_says_how_many_requests_run(clock: Clock) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), at_once(2)
    assert begin(rates, key)
    assert begin(rates, key)
    with pytest.raises(RateLimited, match="limit of 2 requests at once is reached: 2 run") as refused:
        rates.begin(key)
    assert (refused.value.retry_after_seconds, refused.value.details) == (1, {"unit": "concurrency", "limit": 2})


def test_a_key_without_a_limit_of_concurrency_is_not_counted(clock: Clock) -> None:
    rates = KeyRates(Replicas(), clock=clock)
    for key in (at_once(None), limited(5), Principal("key", "acme", frozenset(), None, None)):
        assert all(begin(rates, key) for _ in range(100))
        rates.end(key)


def test_more_ends_than_beginnings_free_nothing(clock: Clock) -> None:
    rates, key = KeyRates(Replicas(), clock=clock), at_once(1)
    for _ in range(5):
        rates.end(key)
    assert [begin(rates, key), begin(rates, key)] == [True, False]


def test_what_was_used_counts_when_a_limit_changes(clock: Clock) -> None:
    """Lowered and raised again: at no time may more be used than the limit of now less what was used before."""
    rates = KeyRates(Replicas(), clock=clock)
    assert sum(spend(rates, limited(10)) for _ in range(12)) == 10
    assert not spend(rates, limited(4))
    assert sum(spend(rates, limited(15)) for _ in range(12)) == 5
    assert not spend(rates, limited(15))
    clock.seconds += WINDOW_SECONDS
    assert sum(spend(rates, limited(4)) for _ in range(12)) == 4
    rates.charge_tokens(limited(tokens=100), 250)
    (tokens,) = rates.allowances(limited(tokens=300))
    assert (tokens.limit, tokens.remaining) == (300, 50)


def test_requests_that_run_count_when_their_limit_changes(clock: Clock) -> None:
    """They end with the limit that they began with, which brings back neither that limit nor places."""
    rates, former, new = KeyRates(Replicas(), clock=clock), at_once(3), at_once(2)
    assert all(begin(rates, former) for _ in range(3))
    assert not begin(rates, new)
    rates.end(former)
    assert not begin(rates, new)
    rates.end(former)
    assert [begin(rates, new), begin(rates, new)] == [True, False]
    rates.end(at_once(None))  # began while the key had no limit, so it was not counted
    assert not begin(rates, new)


def test_debts_are_paid_from_a_raised_limit() -> None:
    window = SlidingWindow(10)
    window.add(25, 0.0)
    window.resize(20, 30.0)
    assert window.used_at(59.0) == 25
    assert window.used_at(60.0) == 15
    window.resize(5, 61.0)
    assert window.used_at(61.0) == 15
    assert window.used_at(90.0 + SLOT_SECONDS) == 5
    assert window.used_at(500.0) == 0


def test_without_the_database_each_replica_allows_an_equal_part_at_once(clock: Clock) -> None:
    rates, key = KeyRates(with_others(3), clock=clock), at_once(8)
    assert sum(begin(rates, key) for _ in range(10)) == 2


def test_a_limit_that_was_changed_is_asked_for_again_at_once() -> None:
    """A refusal of the former limit is none, and no share is more than the new one, also of a late grant."""
    meter = _Meter("key", REQUESTS, 100)
    meter.waiting = 1
    asked = meter.ask(0.0)
    meter.apply(asked, Grant(80, 20, None), 0.0)
    meter.waiting = 1
    former = meter.ask(1.0)
    meter.apply(former, Grant(80, 20, None), 1.0)
    meter.refused_until = 9.0
    meter.change_limit(10, 2.0)
    assert (meter.share, meter.refused_until) == (10, 0.0)
    meter.apply(former, Grant(81, 19, None), 2.0)
    assert meter.share == 10
