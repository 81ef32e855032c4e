"""Counts of reasons: exact at every instant, at a cost that does not grow with the nodes. `test_fleet` has the sums."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.reason_counts import AgeGroup, HeartbeatAges
from tests.factories import NOW
from tests.small_fleets import SmallFleet
from tests.work import calls_of

MS = st.one_of(st.integers(-200, 200), st.integers(-100_000, 100_000), st.sampled_from([-86_400_000, 86_400_000]))


@given(st.lists(st.tuples(st.integers(0, 9), MS), max_size=40), MS)
def test_ages_are_counted_exactly(beats: list[tuple[int, int]], since_ms: int) -> None:
    """Whatever comes when, out of order, at one instant, or a day off."""
    ages, newest, groups = HeartbeatAges(), dict[int, datetime](), dict[int, AgeGroup]()
    for node, ms in beats:
        newest[node] = NOW + timedelta(milliseconds=ms)
        groups[node] = ages.move(groups.get(node), newest[node])
    since = NOW + timedelta(milliseconds=since_ms)
    assert ages.count_since(since) == sum(at >= since for at in newest.values())
    for node, at in newest.items():
        assert ages.count_since(at) >= 1
        ages.leave(groups[node])
    assert (ages.count, ages.count_since(NOW - timedelta(days=9))) == (0, 0)
    assert not ages._seconds


def test_the_work_of_a_heartbeat_and_of_a_count_does_not_grow_with_the_nodes_of_a_group() -> None:
    """Nodes of one group commit share its instant, and the next one finds them together."""
    assert calls_of_a_commit(10) == calls_of_a_commit(1000)


def calls_of_a_commit(count: int) -> tuple[int, int]:
    """Return how many calls one more heartbeat takes, and a count, after a commit of so many nodes at one instant."""
    ages = HeartbeatAges()
    groups = [ages.move(None, NOW) for _ in range(count)]
    later = NOW + timedelta(milliseconds=3)
    moved = ages.move(groups[0], later)
    return calls_of(lambda: ages.move(groups[1], later)), calls_of(lambda: ages.count_since(moved.at))


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
