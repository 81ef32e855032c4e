"""Outages of the registry, and how they are left out of ages and uptimes."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.replicas import (
    CLOCK_SLACK,
    Outage,
    live_since,
    merge_outages,
    seconds_lost,
    silence_since,
)
from tests.factories import NOW

SPANS = st.lists(st.tuples(st.integers(0, 500), st.integers(0, 120)), max_size=6)


def ago(seconds: float) -> datetime:
    """So many seconds before now."""
    return NOW - timedelta(seconds=seconds)


def outage(started_ago: float, lasted: float) -> Outage:
    """An outage that began so many seconds ago and lasted so long, until now at most."""
    return Outage(ago(started_ago), ago(max(started_ago - lasted, 0)))


@pytest.mark.parametrize(
    ("spans", "expected"),
    [
        ([], 120),
        ([(60, 30)], 150),
        ([(400, 30)], 120),
        ([(130, 20)], 140),
        ([(60, 60)], 180),
        ([(90, 30), (40, 20)], 170),
    ],
)
def test_our_outages_do_not_age_a_heartbeat(spans: list[tuple[int, int]], expected: int) -> None:
    """The 120 seconds of a live node are seconds in which a heartbeat could have been accepted."""
    merged = merge_outages(outage(*span) for span in spans)
    assert live_since(NOW, merged) == ago(expected)


@given(SPANS)
def test_between_the_edge_and_now_lie_the_window_and_our_outages(spans: list[tuple[int, int]]) -> None:
    """However they overlap, they are counted once."""
    merged = merge_outages(outage(*span) for span in spans)
    edge = live_since(NOW, merged)
    heard = (NOW - edge).total_seconds() - seconds_lost(edge, NOW, merged)
    assert heard == pytest.approx(120)


def test_overlapping_outages_count_once() -> None:
    """Two replicas may record the same outage."""
    merged = merge_outages([outage(100, 50), outage(90, 20), outage(90, 60)])
    assert merged == (Outage(ago(100), ago(30)),)
    assert seconds_lost(ago(60), NOW, merged) == 30


@pytest.mark.parametrize("minutes_ago", [1, 5, 59])
def test_an_outage_that_ends_an_hour_ahead_keeps_no_dead_node_alive(minutes_ago: int) -> None:
    """It was recorded by a clock that has stepped back since: the window is 120 s again."""
    ahead = Outage(ago(60 * minutes_ago), NOW + timedelta(hours=1))
    assert live_since(NOW, (ahead,)) == ago(120)
    assert live_since(NOW, merge_outages([outage(60, 30), ahead._replace(started_at=ago(20))])) == ago(150)


def test_an_outage_that_has_just_ended_counts_also_by_a_clock_that_is_a_little_behind() -> None:
    """Replicas read the database's clock at different moments."""
    assert live_since(NOW, (Outage(ago(30), NOW + CLOCK_SLACK),)) == ago(150)


@given(SPANS, st.integers(0, 600))
def test_silence_is_age_without_our_outages(spans: list[tuple[int, int]], age: int) -> None:
    """It is the time in which a heartbeat could have been accepted."""
    merged = merge_outages(outage(*span) for span in spans)
    silence = silence_since(ago(age), NOW, merged)
    assert silence.total_seconds() == pytest.approx(age - seconds_lost(ago(age), NOW, merged))
