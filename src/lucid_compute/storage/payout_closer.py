"""Closes months of payouts when they are due, whichever replica comes first."""

from __future__ import annotations

import logging

from sqlalchemy import Date, func, literal_column, select

from lucid_compute.payout_calendar import PayoutsClose, Span, month_due
from lucid_compute.payout_errors import PeriodConflict
from lucid_compute.storage.audit import SYSTEM
from lucid_compute.storage.database import Database
from lucid_compute.storage.payout_store import PayoutStore
from lucid_compute.storage.payout_tables import payout_open, payout_periods
from lucid_compute.storage.rounds import run_periodically

EVERY_SECONDS = 300.0

_log = logging.getLogger(__name__)
_TODAY = literal_column("(now() AT TIME ZONE 'UTC')::date", Date)


class PayoutCloser:
    """Closes every month that has been over for `after_days`, unless `when` says never."""

    def __init__(self, database: Database, store: PayoutStore, *, when: PayoutsClose, after_days: int) -> None:
        """Close in `store`, which works on `database`."""
        self._database = database
        self._store = store
        self._when = when
        self._after_days = after_days

    async def run(self) -> None:
        """Look every five minutes, for as long as this task runs."""
        await run_periodically(self.close_due, every_seconds=EVERY_SECONDS, failed="payouts could not be closed")

    async def close_due(self) -> int:
        """Close what is due, a month at a time, and answer how many; one that another closes meanwhile is not ours."""
        closed = 0
        while self._when is PayoutsClose.MONTHLY and (span := await self._next()) is not None:
            try:
                period, is_new = await self._store.close(SYSTEM, *span)
            except PeriodConflict:
                continue  # closed by hand just now, otherwise than by months: look again
            closed += is_new
            _log.info("payouts from %s until before %s are closed: %s", *span, period.id)
        return closed

    async def _next(self) -> Span | None:
        ends = select(func.max(payout_periods.c.ends_on)).scalar_subquery()
        starts = select(func.min(payout_open.c.day)).scalar_subquery()
        async with self._database.transaction() as connection:
            last_end, first_open, today = (await connection.execute(select(ends, starts, _TODAY))).one()
        return month_due(last_end, first_open, today, after_days=self._after_days)
