"""Counts of reasons: exact at every instant, at a cost that does not grow with the nodes. `test_fleet` has the sums."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.reason_counts import HeartbeatAges
from tests.factories import NOW
from tests.small_fleets import SmallFleet
from tests.work import calls_of

MS = st.one_of(st.integers(-200, 200), st.integers(-100_000, 100_000), st.sampled_from([-86_400_000, 86_400_000]))


@given(st.lists(st.tuples(st.integers(0, 9), MS), max_size=40), MS)
def test_ages_are_counted_exactly(beats: list[tuple[int, int]], since_ms: int) -> None:
    """Whatever comes when, out of order, at one instant, or a day off."""
    ages, newest = HeartbeatAges(), dict[int, datetime]()
    for node, ms in beats:
        if node in newest:
            ages.remove(str(node), newest[node])
        newest[node] = NOW + timedelta(milliseconds=ms)
        ages.add(str(node), newest[node])
    since = NOW + timedelta(milliseconds=since_ms)
    assert ages.count_since(since) == sum(at >= since for at in newest.values())
    for node, at in newest.items():
        assert ages.count_since(at) >= 1
        ages.remove(str(node), at)
    assert (ages.count, ages.count_since(NOW - timedelta(days=9))) == (0, 0)
    assert not ages._slots
    assert not ages._seconds


@pytest.mark.parametrize("seconds", [0, 29.5, 31, 5000])
def test_the_work_does_not_grow_with_the_nodes(seconds: float) -> None:
    """Python calls the same functions as often for a thousand nodes as for ten."""
    assert calls_of_a_summary(10, seconds) == calls_of_a_summary(1000, seconds)


def calls_of_a_summary(count: int, seconds: float) -> int:
    """Return how many calls a summary takes over so many nodes of three kinds that sent heartbeats in ten seconds."""
    fleet = SmallFleet()
    for number in range(count):
        serves = [["model"], ["other"], []][number % 3]
        fleet.add_node(f"node-{number:05}", serves=serves, age_seconds=(number % 10) + 0.0004)
    summarise = partial(fleet.fleet.summarise_reasons, fleet.model, fleet.now + timedelta(seconds=seconds))
    summarise()  # what is done once is not counted
    return calls_of(summarise)
