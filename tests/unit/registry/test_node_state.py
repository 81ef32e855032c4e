"""One clock, two questions: a node's status by the age of its newest heartbeat. The bounds are inclusive."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest

from lucid_compute.registry.domain.node_state import FRESH_SECONDS, LIVE_SECONDS, NodeState, NodeStatus, Receipt
from lucid_compute.registry.matching_engine import is_healthy
from tests.factories import NOW, heartbeat, node

LIVE_SINCE = NOW - timedelta(seconds=LIVE_SECONDS)
A_MOMENT = timedelta(microseconds=1)


def heard(at: datetime, status: str = "healthy", *, draining_since: datetime | None = None) -> NodeState:
    """A node whose newest heartbeat came at `at`."""
    state = node()
    receipt = Receipt(heartbeat(state.id, status=status), at, at, 1)
    return state._replace(last_heartbeat=receipt, draining_since=draining_since)


@pytest.mark.parametrize(
    ("status", "is_drained", "live"),
    [
        ("healthy", False, NodeStatus.HEALTHY),
        ("unhealthy", False, NodeStatus.UNHEALTHY),
        ("draining", False, NodeStatus.DRAINING),
        ("healthy", True, NodeStatus.DRAINING),
    ],
)
def test_a_node_is_live_at_exactly_120_s_and_silent_a_moment_later(
    status: str, is_drained: bool, live: NodeStatus
) -> None:
    since = NOW if is_drained else None
    last, late = (heard(at, status, draining_since=since) for at in (LIVE_SINCE, LIVE_SINCE - A_MOMENT))
    assert (last.status(LIVE_SINCE), late.status(LIVE_SINCE)) == (live, NodeStatus.UNHEALTHY)
    assert (last.is_live(LIVE_SINCE), late.is_live(LIVE_SINCE)) == (True, False)
    assert (last.has_stopped(LIVE_SINCE), late.has_stopped(LIVE_SINCE)) == (False, status == "draining")


def test_a_node_is_fresh_at_exactly_30_s_and_stale_a_moment_later() -> None:
    edge = NOW - timedelta(seconds=FRESH_SECONDS)
    assert (heard(edge).is_fresh(NOW), heard(edge - A_MOMENT).is_fresh(NOW)) == (True, False)
    assert (is_healthy(heard(edge), NOW), is_healthy(heard(edge - A_MOMENT), NOW)) == (True, False)


@pytest.mark.parametrize("draining_since", [None, NOW])
def test_a_node_that_was_never_heard_is_unhealthy_and_has_not_stopped(draining_since: datetime | None) -> None:
    state = node()._replace(last_heartbeat=None, draining_since=draining_since)
    assert (state.status(LIVE_SINCE), state.has_stopped(LIVE_SINCE)) == (NodeStatus.UNHEALTHY, False)
