"""The one back-off that every retry uses."""

from __future__ import annotations

import pytest

from lucid_compute.wire import backoff_seconds


def test_the_pause_doubles_up_to_its_longest() -> None:
    pauses = [backoff_seconds(failures, first_seconds=5.0, longest_seconds=60.0) for failures in range(7)]
    assert pauses == [5.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0]


def test_jitter_scales_the_pause_also_at_its_longest() -> None:
    assert backoff_seconds(2, first_seconds=2.0, longest_seconds=20.0, jitter=0.5) == 2.0
    assert backoff_seconds(99, first_seconds=2.0, longest_seconds=20.0, jitter=1.5) == 30.0


@pytest.mark.parametrize("failures", [10**3, 10**9])
def test_any_number_of_failures_has_a_pause(failures: int) -> None:
    assert backoff_seconds(failures, first_seconds=0.2, longest_seconds=20.0) == 20.0
    assert backoff_seconds(failures, first_seconds=0.2) > 10**9
