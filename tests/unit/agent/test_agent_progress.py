"""A server is wedged when requests run and nothing moves for a minute."""

from __future__ import annotations

import pytest

from lucid_compute.agent.runtimes.reading import ServerReading
from lucid_compute.agent.server_watch import StallDetector

Step = tuple[float, int | None, float | None]


def watched(*steps: Step) -> StallDetector:
    """A watch that saw these: at a second, so many running, so many tokens."""
    watch = StallDetector()
    for at, running, tokens in steps:
        watch.note(ServerReading(running=running, progress=None if tokens is None else (tokens,)), at)
    return watch


@pytest.mark.parametrize(
    ("steps", "now", "is_wedged"),
    [
        ([(0, 1, 5), (60, 1, 5)], 60, True),
        ([(0, 1, 5), (60, 1, 5)], 59.9, False),
        ([(0, 0, 5), (100, 1, 5)], 159, False),  # idle for long, and a request that has just begun
        ([(0, 0, 5), (100, 1, 5)], 160, True),
        ([(0, 1, 5), (59, 1, 6), (118, 1, 6)], 118, False),
        ([(0, 1, 5), (59, 0, 5), (61, 1, 5)], 100, False),
        ([(0, 1, 5), (30, None, None), (60, None, None)], 60, True),  # it stopped telling, as wedged ones may
        ([(0, 1, None), (100, 1, None)], 100, False),  # it never tells: nothing is known
        ([(0, None, 5), (100, None, 5)], 100, False),
        ([(0, 1, 5), (70, 1, 5), (75, 1, 0)], 75, False),  # restarted
    ],
)
def test_only_running_requests_without_progress_make_a_server_wedged(
    steps: list[Step], now: float, is_wedged: bool
) -> None:
    assert watched(*steps).is_wedged(now) is is_wedged
