"""Closes periods in steps: however many lines there are, no step takes long, and any replica goes on with the next one.

A row of `payout_closings` says which period is being closed. Its lines are moved in batches. Nobody sees the period
before its row of `payout_periods` is written, in the last step. Whoever is killed leaves the rest to the next one.
"""

from __future__ import annotations

import logging
from datetime import date, datetime
from typing import NamedTuple
from uuid import uuid4

from sqlalchemy import func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.payouts.sql import END_CLOSING, FIRST_OPEN_DAY, LOCK_REST, MOVE_REST, MOVE_SOME
from lucid_compute.accounting.payouts.tables import payout_closings, payout_open, payout_periods
from lucid_compute.errors import InvalidRequest, PeriodConflict
from lucid_compute.postgres.long_transactions import LongTransactions
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.keys.audit import Change, record_change

PAYOUTS_LOCK = 0x7061796F  # an advisory lock of our own: "payo"
LOCK_PAYOUTS = text(f"SELECT pg_advisory_xact_lock({PAYOUTS_LOCK})")
LINES_A_STEP = 10_000  # a fifth of a second, or seconds on a machine that is busy
_TODAY = text("SELECT (now() AT TIME ZONE 'UTC')::date")
_log = logging.getLogger(__name__)


class Period(NamedTuple):
    """A closed period: from the day `starts_on` up to the day before `ends_on`."""

    id: str
    starts_on: date
    ends_on: date
    closed_at: datetime
    closed_by: str


class Closing(NamedTuple):
    """A period that is being closed."""

    period_id: str
    starts_on: date
    ends_on: date
    closed_by: str


class PeriodClosing:
    """Closes periods, one at a time for all replicas."""

    def __init__(self, transactions: LongTransactions, *, lines_a_step: int = LINES_A_STEP) -> None:
        self._transactions = transactions
        self._lines_a_step = lines_a_step

    async def close(self, actor: Actor, since: date, until: date) -> tuple[Period, bool]:
        """Close the period, which is final, or go on with it. Return it, and whether this call closed it.

        Raises:
            InvalidRequest: the period is not over.
            PeriodConflict: it does not begin where the last one ended, or another one is being closed.
            DatabaseUnavailable: it is not known whether the period was closed; call this again.
        """
        begun = await self._begin(actor, since, until)
        if isinstance(begun, Period):
            return begun, False
        day, moved = await self._move_some(begun, date.min)
        lines = moved
        while day is not None:
            day, moved = await self._move_some(begun, day)
            lines += moved
        period, is_new = await self._end(begun)
        if is_new:
            _log.info(
                "payouts from %s until before %s are closed: %s, %d lines in steps", since, until, period.id, lines
            )
        return period, is_new

    async def _begin(self, actor: Actor, since: date, until: date) -> Period | Closing:
        """Return the period if it is closed already; else note that it is being closed, and by whom."""
        async with self._transactions.transaction() as connection:
            await connection.execute(LOCK_PAYOUTS)
            if (closed := await _find_same(connection, since, until)) is not None:
                return closed
            if (closing := await find_closing(connection)) is not None:
                if (closing.starts_on, closing.ends_on) == (since, until):
                    return closing
                message = (
                    f"The days from {closing.starts_on} until {closing.ends_on} are being closed. Close these first."
                )
                raise PeriodConflict(message, closing.starts_on)
            await _check(connection, since, until)
            closing = Closing(str(uuid4()), since, until, actor.owner or "lucid")
            await connection.execute(insert(payout_closings).values(**closing._asdict()))
            details = {"from": since.isoformat(), "to": until.isoformat()}
            change = Change("payouts.close", "payout_period", closing.period_id, details=details)
            await record_change(connection, actor, change)
        _log.info("payouts from %s until before %s are being closed: %s", since, until, closing.period_id)
        return closing

    async def _move_some(self, closing: Closing, since: date) -> tuple[date | None, int]:
        """Move some lines of the first day from `since` on. Return where to go on (None: at the end), and how many."""
        span = {"since": since, "until": closing.ends_on}
        async with self._transactions.transaction() as connection:
            await connection.execute(LOCK_PAYOUTS)
            if await find_closing(connection) != closing:
                return None, 0  # another replica has ended it
            day = await connection.scalar(text(FIRST_OPEN_DAY), span)
            if day is None:
                return None, 0
            some = {"day": day, "period_id": closing.period_id, "most": self._lines_a_step}
            moved = (await connection.execute(text(MOVE_SOME), some)).rowcount
        return (day if moved == self._lines_a_step else date.fromordinal(day.toordinal() + 1)), moved

    async def _end(self, closing: Closing) -> tuple[Period, bool]:
        """Move what is left, and make the period visible with all of its lines."""
        async with self._transactions.transaction() as connection:
            await connection.execute(LOCK_PAYOUTS)
            if (closed := await _find_same(connection, closing.starts_on, closing.ends_on)) is not None:
                return closed, False
            rest = {"until": closing.ends_on, "period_id": closing.period_id}
            await connection.execute(text(LOCK_REST), rest)
            await connection.execute(text(MOVE_REST), rest)
            values = closing._asdict()
            values["id"] = values.pop("period_id")
            inserted = await connection.execute(insert(payout_periods).values(**values).returning(payout_periods))
            await connection.execute(text(END_CLOSING))
            return Period(*inserted.one()), True


async def find_closing(connection: AsyncConnection) -> Closing | None:
    """Return the period that is being closed; None if there is none."""
    columns = (payout_closings.c[name] for name in Closing._fields)
    row = (await connection.execute(select(*columns))).one_or_none()
    return None if row is None else Closing(*row)


async def _find_same(connection: AsyncConnection, since: date, until: date) -> Period | None:
    is_same = (payout_periods.c.starts_on == since, payout_periods.c.ends_on == until)
    row = (await connection.execute(select(payout_periods).where(*is_same))).one_or_none()
    return None if row is None else Period(*row)


async def _check(connection: AsyncConnection, since: date, until: date) -> None:
    today = await connection.scalar(_TODAY)
    if today is None or until > today:
        raise InvalidRequest.at("to", f"A period is closed when it is over: send {today} or a day before it.")
    last = await connection.scalar(select(func.max(payout_periods.c.ends_on)))
    first_open = await connection.scalar(select(func.min(payout_open.c.day)))
    if last is not None and since != last:
        raise PeriodConflict(f"The last period ends on {last}; the next one begins there.", last)
    if last is None and first_open is not None and first_open < since:
        raise PeriodConflict(f"Jobs were billed on {first_open}; the first period has to hold them.", first_open)
