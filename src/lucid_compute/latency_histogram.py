"""Histograms of durations: buckets that grow by a tenth, so that any percentile is within 5 % of the true one. Pure.

The estimate for a bucket lies so that neither of its ends is farther away than GROWTH - 1 over GROWTH + 1, 4.8 %.
Durations up to a tenth of a millisecond share the first bucket, those from two months on the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

FIRST_MS = 0.1
GROWTH = 1.1
BUCKETS = 256


def estimate_ms(bucket: int) -> float:
    """Answer the duration that stands for a bucket."""
    return FIRST_MS * GROWTH**bucket * 2 / (1 + GROWTH) if bucket else FIRST_MS


def percentile_ms(counts: Mapping[int, int], share: float) -> float | None:
    """Answer the duration that `share` (0 to 1) of all are not above, by nearest rank; None without any."""
    total = sum(counts.values())
    if not total:
        return None
    rank = max(math.ceil(share * total), 1)
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return estimate_ms(bucket)
    return None
