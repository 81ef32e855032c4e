"""Closes the months that are due, goes on with what others began, and knows for how long days have been open."""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import date
from typing import NamedTuple

from sqlalchemy import Date, func, literal_column, select

from lucid_compute.accounting.payouts.closing import Closing, find_closing
from lucid_compute.accounting.payouts.revenue import ClosingSpan, PayoutsClose, month_due
from lucid_compute.accounting.payouts.store import PayoutStore
from lucid_compute.accounting.payouts.tables import payout_open, payout_periods
from lucid_compute.errors import DatabaseUnavailable, PeriodConflict
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.periodic import run_periodically
from lucid_compute.registry.domain.identity import SYSTEM

_log = logging.getLogger(__name__)
_NOW_DAY = literal_column("(now() AT TIME ZONE 'UTC')::date", Date)


class _OpenDays(NamedTuple):
    """What is being closed, where the last period ended, and the first day with open lines."""

    closing: Closing | None
    last_end: date | None
    first_open: date | None
    today: date


class PayoutCloser:
    """Closes every month that has been over for `after_days`, unless `when` is never."""

    def __init__(
        self,
        database: Database,
        store: PayoutStore,
        *,
        when: PayoutsClose,
        after_days: int,
        every_seconds: float = 300.0,
    ) -> None:
        self.every_seconds = every_seconds
        self.open_days: int | None = None  # since the first day that is in no period; None before the first look
        self._database = database
        self._store = store
        self._when = when
        self._after_days = after_days

    async def run(self) -> None:
        """Close what is due every five minutes, until this task is cancelled."""
        with suppress(DatabaseUnavailable):
            await self._next()  # so that the metric is there at once
        await run_periodically(self.close_due, every_seconds=self.every_seconds, failed="payouts could not be closed")

    async def close_due(self) -> int:
        """Close what is due, a month at a time. Return how many periods this call closed."""
        closed = 0
        while (span := await self._next()) is not None:
            try:
                _, is_new = await self._store.close(SYSTEM, *span)
            except PeriodConflict:
                continue  # an admin has just closed another span: look again
            except DatabaseUnavailable:
                message = "payouts from %s until before %s are not closed yet: the database did not answer in time"
                _log.warning(message, *span)
                raise
            closed += is_new
        return closed

    async def _next(self) -> ClosingSpan | None:
        """Return what to close: what somebody began to close, else the month that is due."""
        closing, last_end, first_open, today = await self._look()
        oldest = last_end or first_open
        self.open_days = 0 if oldest is None else (today - oldest).days
        if closing is not None:
            return ClosingSpan(closing.starts_on, closing.ends_on)
        if self._when is not PayoutsClose.MONTHLY:
            return None
        return month_due(last_end, first_open, today, after_days=self._after_days)

    async def _look(self) -> _OpenDays:
        ends = select(func.max(payout_periods.c.ends_on)).scalar_subquery()
        starts = select(func.min(payout_open.c.day)).scalar_subquery()
        async with self._database.transaction() as connection:
            closing = await find_closing(connection)
            return _OpenDays(closing, *(await connection.execute(select(ends, starts, _NOW_DAY))).one())
