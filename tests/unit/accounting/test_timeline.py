"""Timelines: whole steps that cover a span, and the time in each state within each step."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.accounting.timeline import STEPS, StateSum, Timeline, auto_step, cut, integrate
from lucid_compute.registry.fleet.replicas import Outage, merge_outages
from tests.factories import NOW

SECOND = timedelta(seconds=1)
INSTANTS = st.integers(0, 300).map(lambda seconds: NOW + seconds * SECOND)
SPANS = st.tuples(INSTANTS, INSTANTS).map(sorted)


@st.composite
def nodes(draw: st.DrawFn) -> list[tuple[datetime, datetime | None, str]]:
    """The spans of some nodes' states, each node's one after the other."""
    found = []
    for _ in range(draw(st.integers(0, 4))):
        since = sorted(draw(st.sets(INSTANTS, max_size=5)))
        states = draw(st.lists(st.sampled_from(["healthy", "unhealthy", "draining"]), min_size=5, max_size=5))
        found += [(start, end, state) for start, end, state in zip(since, [*since[1:], None], states, strict=False)]
    return found


def summed(changes: list[tuple[datetime, str, int]], cuts: list[datetime]) -> list[StateSum]:
    """Each change in its span; what was before the first one is taken for its beginning, as Postgres is told to."""
    found = []
    for at, state, change in changes:
        if at < cuts[-1]:
            span = max(bisect_right(cuts, at) - 1, 0)
            found.append(StateSum(span, state, change, change * (cuts[span + 1] - max(at, cuts[0])) / SECOND))
    return found


@given(nodes(), st.sets(INSTANTS, min_size=2, max_size=8), st.lists(SPANS, max_size=3))
def test_states_add_up_to_what_counting_second_by_second_finds(
    spans: list[tuple[datetime, datetime | None, str]], edges: set[datetime], away: list[list[datetime]]
) -> None:
    bounds = sorted(edges)
    outages = merge_outages(Outage(*span) for span in away if span[0] < span[1])
    changes = [(start, state, 1) for start, _, state in spans]
    changes += [(end, state, -1) for _, end, state in spans if end is not None]
    found = integrate(summed(changes, cut(bounds, outages)), bounds, outages)
    for start, end, record in zip(bounds, bounds[1:], found, strict=False):
        counted: Counter[str] = Counter()
        lost = 0
        for number in range(round((end - start) / SECOND)):
            at = start + number * SECOND
            if any(outage.started_at <= at < outage.ended_at for outage in outages):
                lost += 1
            else:
                counted.update(s for since, until, s in spans if since <= at and (until is None or at < until))
        assert {state: seconds for state, seconds in record.seconds.items() if seconds} == counted
        assert record.outage_seconds == lost


@pytest.mark.parametrize(
    ("since", "until", "step", "first", "length"),
    [
        ("12:00:00", "13:00:00", "1m", "12:00:00", 60),
        ("12:00:30", "12:01:30", "1m", "12:00:00", 2),
        ("12:07:00", "12:08:00", "5m", "12:05:00", 1),
        ("12:59:00", "13:01:00", "1h", "12:00:00", 2),
        ("12:00:00", "12:00:00", "1m", "12:00:00", 0),
        ("12:00:00", "11:00:00", "1m", "12:00:00", 0),
    ],
)
def test_a_timeline_is_the_whole_steps_that_hold_a_span(
    since: str, until: str, step: str, first: str, length: int
) -> None:
    def at(time: str) -> datetime:
        return datetime.fromisoformat(f"2026-01-31T{time}").replace(tzinfo=UTC)

    timeline = Timeline.around(at(since), at(until), STEPS[step])
    assert (timeline.since, timeline.length) == (at(first), length)
    assert timeline.edges() == [*timeline.starts(), timeline.until]


@pytest.mark.parametrize(
    ("hours", "step"), [(1, "1m"), (5, "1m"), (6, "5m"), (25, "5m"), (26, "1h"), (24 * 12, "1h"), (24 * 30, "1d")]
)
def test_a_step_is_chosen_that_makes_few_points(hours: int, step: str) -> None:
    assert auto_step(NOW, NOW + timedelta(hours=hours)) == STEPS[step]
