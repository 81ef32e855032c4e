"""Breakers and the retry budget: every transition, at the instants and with the numbers of the reliability page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lucid_compute.gateway.breakers import (
    FAILURES_TO_OPEN,
    MAX_KEYS,
    MAX_OPEN_SECONDS,
    Breaker,
    RetryBudget,
    RetryBudgets,
)
from lucid_compute.gateway.node_stats import TRIAL_SECONDS
from lucid_compute.registry.fleet.fleet import FleetNode
from tests.small_fleets import SmallFleet

NOW = 1000.0


def yes() -> bool:
    """Return whether a breaker may open: it may."""
    return True


def no() -> bool:
    """Return whether a breaker may open: half of the nodes are blocked already."""
    return False


def opened(times: int = 1) -> tuple[Breaker, float]:
    """A breaker that opened so many times in a row, and when it did last."""
    breaker, now = Breaker(), NOW
    for _ in range(FAILURES_TO_OPEN - 1):
        breaker.fail(now, yes, breaker.newest)
    for time in range(times):
        now = breaker.open_until if time else now
        breaker.start(now, TRIAL_SECONDS)
        assert breaker.fail(now, yes, breaker.newest)
    return breaker, now


def test_five_failures_in_a_row_open_it_for_thirty_seconds() -> None:
    """Not four; and it says for how long."""
    breaker = Breaker()
    assert [breaker.fail(NOW, yes, breaker.newest) for _ in range(5)] == [False, False, False, False, True]
    assert breaker.blocked_seconds(NOW) == 30
    assert breaker.blocked_seconds(NOW + 29.5) == 0.5
    assert breaker.blocked_seconds(NOW + 30) == 0


def test_a_success_in_between_starts_the_count_afresh() -> None:
    """Only consecutive failures count."""
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES_TO_OPEN - 1):
            assert not breaker.fail(NOW, yes, breaker.newest)
        breaker.succeed()
    assert breaker.blocked_seconds(NOW) == 0


def test_it_has_been_open_since_it_opened_first() -> None:
    """Trials that fail open it for longer; a success ends that."""
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.fail(NOW, yes, breaker.newest)
    breaker.fail(NOW + 40, yes, breaker.start(NOW + 31, TRIAL_SECONDS))
    assert (breaker.opened_at, breaker.blocked_seconds(NOW + 40)) == (NOW, 60)
    breaker.succeed()
    for _ in range(FAILURES_TO_OPEN):
        breaker.fail(NOW + 500, yes, breaker.newest)
    assert breaker.opened_at == NOW + 500


def test_failures_of_requests_sent_before_it_opened_do_not_prolong_it() -> None:
    """They were under way; the node had no chance since."""
    breaker = Breaker()
    numbers = [breaker.start(NOW, TRIAL_SECONDS) for _ in range(40)]
    opened = [breaker.fail(NOW + 1, yes, number) for number in numbers[:20]]
    assert opened == [False] * 4 + [True] + [False] * 15
    assert breaker.blocked_seconds(NOW + 31) == 0
    breaker.start(NOW + 32, TRIAL_SECONDS)
    assert not any(breaker.fail(NOW + 33, yes, number) for number in numbers[20:])
    assert breaker.blocked_seconds(NOW + 33) == TRIAL_SECONDS - 1


def test_one_request_is_tried_when_its_time_is_over() -> None:
    """While the trial runs no other request is sent; if it takes too long, one more is."""
    breaker, at = opened()
    breaker.start(at + 30, TRIAL_SECONDS)
    assert breaker.blocked_seconds(at + 31) == TRIAL_SECONDS - 1
    assert breaker.blocked_seconds(at + 30 + TRIAL_SECONDS) == 0


def test_a_trial_that_succeeds_closes_it_as_if_it_had_never_opened() -> None:
    """The next opening takes five failures again, and lasts thirty seconds."""
    breaker, at = opened(3)
    breaker.start(at + 120, TRIAL_SECONDS)
    breaker.succeed()
    assert breaker.blocked_seconds(at + 120) == 0
    breaker.start(at + 121, TRIAL_SECONDS)
    assert breaker.blocked_seconds(at + 121) == 0
    assert [breaker.fail(at + 122, yes, breaker.newest) for _ in range(5)] == [False, False, False, False, True]
    assert breaker.blocked_seconds(at + 122) == 30


def test_each_trial_that_fails_doubles_the_time_up_to_ten_minutes() -> None:
    """30, 60, 120, 240, 480 and then 600, also after a week of it."""
    breaker, now = opened()
    seconds = [breaker.blocked_seconds(now)]
    for _ in range(1200):
        now = breaker.open_until
        breaker.start(now, TRIAL_SECONDS)
        assert breaker.fail(now, yes, breaker.newest)
        seconds.append(breaker.blocked_seconds(now))
    assert seconds[:7] == [30, 60, 120, 240, 480, 600, 600]
    assert set(seconds[7:]) == {MAX_OPEN_SECONDS}


def test_a_trial_whose_client_leaves_makes_room_for_the_next() -> None:
    """Nothing was learnt: it is neither closed nor opened again."""
    breaker, at = opened()
    breaker.withdraw(breaker.start(at + 30, TRIAL_SECONDS))
    assert breaker.blocked_seconds(at + 31) == 0
    number = breaker.start(at + 31, TRIAL_SECONDS)
    assert breaker.blocked_seconds(at + 32) > 0
    assert breaker.fail(at + 33, yes, number)
    assert breaker.blocked_seconds(at + 33) == 60


def test_a_trial_is_not_ended_by_the_client_of_another_request() -> None:
    """Neither of one sent before it opened, nor of the trial before, which took too long."""
    breaker = Breaker()
    before = breaker.start(NOW, TRIAL_SECONDS)
    for _ in range(FAILURES_TO_OPEN):
        breaker.fail(NOW, yes, breaker.newest)
    first = breaker.start(NOW + 30, TRIAL_SECONDS)
    breaker.withdraw(before)
    assert breaker.blocked_seconds(NOW + 31) > 0
    second = breaker.start(NOW + 60, TRIAL_SECONDS)
    breaker.withdraw(first)
    assert breaker.blocked_seconds(NOW + 61) > 0
    breaker.withdraw(second)
    assert breaker.blocked_seconds(NOW + 61) == 0


def test_others_are_sent_requests_once_a_trial_is_being_answered() -> None:
    """A stream may take half an hour; requests in the meantime are no trials and block no others."""
    breaker, at = opened()
    breaker.start(at + 30, TRIAL_SECONDS)
    breaker.begin_response()
    assert breaker.blocked_seconds(at + 31) == 0
    for second in range(32, 40):
        breaker.start(at + second, TRIAL_SECONDS)
        assert breaker.blocked_seconds(at + second) == 0
    breaker.succeed()
    assert [breaker.fail(at + 41, yes, breaker.newest) for _ in range(5)] == [False, False, False, False, True]
    assert breaker.blocked_seconds(at + 41) == 30


def test_a_node_that_begins_answers_and_never_ends_one_is_blocked_again_for_twice_as_long() -> None:
    """The failures before are forgotten only after a complete response."""
    breaker, at = opened()
    number = breaker.start(at + 30, TRIAL_SECONDS)
    breaker.begin_response()
    assert breaker.fail(at + 31, yes, number)
    assert breaker.blocked_seconds(at + 31) == 60
    breaker.start(at + 91, TRIAL_SECONDS)
    assert breaker.blocked_seconds(at + 92) > 0
    closed = Breaker()
    for _ in range(FAILURES_TO_OPEN - 1):
        closed.begin_response()
        assert not closed.fail(NOW, yes, closed.newest)
    closed.begin_response()
    assert closed.fail(NOW, yes, closed.newest)


def test_a_client_that_leaves_does_not_open_or_close_anything() -> None:
    """Neither an open breaker nor one that counts failures changes."""
    breaker, at = opened()
    breaker.withdraw(breaker.newest)
    assert breaker.blocked_seconds(at + 1) == 29
    counting = Breaker()
    for _ in range(4):
        counting.fail(NOW, yes, counting.newest)
        counting.withdraw(counting.newest)
    assert counting.fail(NOW, yes, counting.newest)


def test_it_opens_at_the_next_failure_when_it_might_not_before() -> None:
    """Half of the nodes were blocked; one of them has recovered since."""
    breaker = Breaker()
    assert not any(breaker.fail(NOW, no, breaker.newest) for _ in range(20))
    assert breaker.blocked_seconds(NOW) == 0
    assert breaker.fail(NOW + 1, yes, breaker.newest)
    assert breaker.blocked_seconds(NOW + 1) == 30


# --- never more than half of a model's nodes


def fail(fleet: SmallFleet, node: FleetNode, times: int = FAILURES_TO_OPEN) -> bool:
    """Let the node fail so often; whether its breaker is open then."""
    for _ in range(times):
        fleet.fail(node)
    return fleet.stats.blocked_seconds(node.state.id) > 0


@pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_at_most_half_of_a_models_nodes_are_blocked(count: int, most: int) -> None:
    """Of one node none, of two one, of three one."""
    fleet = SmallFleet()
    nodes = fleet.add_nodes(count)
    assert [fail(fleet, node) for node in nodes] == [True] * most + [False] * (count - most)
    assert fleet.stats.open_count() == most


def test_the_half_is_of_each_model_that_the_node_serves() -> None:
    """A node alone with one of its models stays open to it, however many serve the other."""
    fleet = SmallFleet(models=("shared", "rare"))
    nodes = fleet.add_nodes(6, serves=("shared",))
    only = fleet.add_node(serves=("shared", "rare"))
    assert not fail(fleet, only)
    assert [fail(fleet, node) for node in nodes] == [True, True, True, False, False, False]


def test_a_node_that_recovers_makes_room_for_another() -> None:
    """Only those that are blocked right now count."""
    fleet = SmallFleet()
    first, second, _ = fleet.add_nodes(3)
    assert fail(fleet, first)
    assert not fail(fleet, second)
    fleet.stats.record_success(first.state.id)
    assert fail(fleet, second, times=1)
    fleet.stats.record_success(second.state.id)
    assert fail(fleet, first)
    fleet.clock.pass_seconds(31)
    assert fail(fleet, second)


def test_a_trial_counts_as_blocked() -> None:
    """While one of two nodes is on trial, the other one stays open."""
    fleet = SmallFleet()
    first, second = fleet.add_nodes(2)
    fail(fleet, first)
    fleet.clock.pass_seconds(31)
    fleet.stats.record_start(first.state.id)
    assert fleet.stats.blocked_seconds(first.state.id) > 0
    assert not fail(fleet, second)


def test_a_streams_first_chunk_ends_the_trial_for_the_others() -> None:
    """And an operator no longer sees the breaker as open; the trial that breaks off then opens it again."""
    fleet = SmallFleet()
    first, _ = fleet.add_nodes(2)
    fail(fleet, first)
    fleet.clock.pass_seconds(31)
    number = fleet.stats.record_start(first.state.id)
    other = fleet.stats.record_start(first.state.id)
    fleet.stats.record_latency(first.state.id, fleet.criteria(is_stream=True).kind, 20.0)
    assert fleet.stats.blocked_seconds(first.state.id) == 0
    assert fleet.stats.open_count() == 0
    fleet.stats.record_inconclusive(first.state.id, other)
    assert fleet.stats.blocked_seconds(first.state.id) == 0
    assert fleet.stats.record_failure(first, number)
    assert fleet.stats.blocked_seconds(first.state.id) == 60
    assert fleet.stats.open_count() == 1


def test_nodes_that_are_gone_are_forgotten_with_their_breakers() -> None:
    """What an operator sees does not count them."""
    fleet = SmallFleet()
    first, *_ = fleet.add_nodes(2)
    fail(fleet, first)
    fleet.fleet.forget_node(first)
    fleet.stats.forget_ended()
    assert fleet.stats.open_count() == 0
    assert fleet.stats.track(first.state.id) is None
    assert not fleet.fail(first)


async def test_a_busy_node_is_asked_again_after_half_a_minute_whatever_it_says() -> None:
    """It tells clients what the node said; a success in between changes nothing."""
    fleet = SmallFleet()
    node = fleet.add_node()
    fleet.stats.record_full(node.state.id, 3600)
    usage = fleet.dispatcher.usage_of(node, fleet.criteria())
    assert (usage.full_seconds, await fleet.choose(fleet.criteria())) == (3600, None)
    fleet.clock.pass_seconds(29)
    fleet.stats.record_success(node.state.id)
    assert await fleet.choose(fleet.criteria()) is None
    fleet.clock.pass_seconds(1)
    assert await fleet.choose(fleet.criteria()) is node
    assert fleet.dispatcher.usage_of(node, fleet.criteria()).full_seconds == 0


# --- retries


def test_a_key_has_its_own_retries_within_those_of_all() -> None:
    """A hundred keys are too many for ten each; a budget that was dropped for others begins anew."""
    budgets = RetryBudgets()
    assert [sum(budgets.spend(f"key-{key}", NOW) for _ in range(20)) for key in range(12)] == [10] * 10 + [0] * 2
    for key in range(MAX_KEYS * 2):
        budgets.count_request(f"key-{key}", NOW + 61)
    assert len(budgets._by_key) == MAX_KEYS
    assert sum(budgets.spend("key-0", NOW + 61) for _ in range(20)) == 10


def test_ten_retries_are_always_there_within_a_minute() -> None:
    """Also for one request; the eleventh waits until the first are a minute old."""
    budget = RetryBudget()
    budget.count_request(NOW)
    assert sum(budget.spend(NOW) for _ in range(50)) == 10
    assert not budget.spend(NOW + 59)
    assert sum(budget.spend(NOW + 60) for _ in range(50)) == 10


@pytest.mark.parametrize(("requests", "retries"), [(0, 10), (99, 10), (100, 10), (109, 10), (110, 11), (1000, 100)])
def test_beyond_that_a_tenth_of_the_last_minutes_requests_may_be_repeated(requests: int, retries: int) -> None:
    """Never more than a tenth: 109 requests give ten."""
    budget = RetryBudget()
    for number in range(requests):
        budget.count_request(NOW + number * 50 / max(requests, 1))
    assert sum(budget.spend(NOW + 50) for _ in range(500)) == retries


def test_requests_of_more_than_a_minute_ago_earn_nothing() -> None:
    """A burst is forgotten, and with it its retries."""
    budget = RetryBudget()
    for _ in range(1000):
        budget.count_request(NOW)
    assert sum(budget.spend(NOW + 59) for _ in range(500)) == 100
    assert sum(budget.spend(NOW + 61) for _ in range(500)) == 0
    assert sum(budget.spend(NOW + 119) for _ in range(500)) == 10


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 200), st.integers(0, 60)), max_size=30))
def test_no_minute_has_more_retries_than_its_share(steps: list[tuple[float, int, int]]) -> None:
    """Whatever comes when: in any 59 seconds at most ten retries, or a tenth of the requests of the minute before."""
    budget, now = RetryBudget(), NOW
    requests: list[float] = []
    retries: list[float] = []
    for wait, asked, failed in steps:
        now += wait
        for _ in range(asked):
            budget.count_request(now)
            requests.append(now)
        for _ in range(failed):
            if budget.spend(now):
                retries.append(now)
                recent = sum(now - at <= 60 for at in requests)
                assert sum(now - at < 59 for at in retries) <= max(10, recent / 10)
