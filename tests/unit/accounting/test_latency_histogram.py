"""Histograms of durations: percentiles from buckets are within 5 % of those of the durations themselves."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.accounting.measured import BUCKETS, FIRST_MS, estimate_ms, percentile_ms
from tests.ledger import bucket_of

DURATIONS = st.floats(FIRST_MS, 30 * 60 * 1000)


@given(st.lists(DURATIONS, min_size=1, max_size=400), st.sampled_from([0.5, 0.95, 0.99, 1.0]))
def test_a_percentile_is_within_five_per_cent_of_the_true_one(durations: list[float], share: float) -> None:
    true = sorted(durations)[math.ceil(share * len(durations)) - 1]
    found = percentile_ms(Counter(map(bucket_of, durations)), share)
    assert found is not None
    assert abs(found - true) <= 0.05 * true


@given(DURATIONS)
def test_merging_histograms_is_adding_their_counts(duration: float) -> None:
    bucket = bucket_of(duration)
    assert percentile_ms(Counter({bucket: 2}), 0.5) == percentile_ms(Counter({bucket: 1}), 0.5) == estimate_ms(bucket)


def test_what_is_too_short_or_too_long_is_at_the_ends() -> None:
    assert bucket_of(0) == bucket_of(FIRST_MS) == 0
    assert bucket_of(1e300) == BUCKETS - 1
    assert estimate_ms(0) == FIRST_MS


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_nothing_has_no_percentile(share: float) -> None:
    assert percentile_ms({}, share) is None
