"""Months of payouts are due when they have been over for some days, one after the other and without a gap."""

from __future__ import annotations

from datetime import date

import pytest

from lucid_compute.accounting.payouts.revenue import ClosingSpan, month_due

NOVEMBER, DECEMBER, JANUARY = date(2026, 11, 1), date(2026, 12, 1), date(2027, 1, 1)


@pytest.mark.parametrize(
    ("last_end", "first_open", "today", "expected"),
    [
        (None, None, JANUARY, None),
        (None, date(2026, 11, 17), date(2026, 12, 4), ClosingSpan(NOVEMBER, DECEMBER)),
        (None, date(2026, 11, 30), date(2026, 12, 3), None),
        (DECEMBER, date(2026, 11, 30), date(2026, 12, 31), None),  # what came late is December's
        (DECEMBER, None, date(2027, 1, 4), ClosingSpan(DECEMBER, JANUARY)),  # nothing was earned, and there is no gap
        (date(2026, 12, 15), None, date(2027, 1, 4), ClosingSpan(date(2026, 12, 15), JANUARY)),
        (NOVEMBER, None, date(2027, 6, 1), ClosingSpan(NOVEMBER, DECEMBER)),
        (date(2028, 1, 31), None, date(2028, 2, 4), ClosingSpan(date(2028, 1, 31), date(2028, 2, 1))),
        (date(2028, 2, 29), None, date(2028, 3, 4), ClosingSpan(date(2028, 2, 29), date(2028, 3, 1))),
    ],
)
def test_a_month_is_due_three_days_after_its_end(
    last_end: date | None, first_open: date | None, today: date, expected: ClosingSpan | None
) -> None:
    assert month_due(last_end, first_open, today, after_days=3) == expected
