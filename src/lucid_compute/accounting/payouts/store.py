"""Payouts in Postgres: reads what owners have earned, closes periods, and records the terms of splitting."""

from __future__ import annotations

import logging
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import Date, RowMapping, func, insert, literal_column, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.payouts.losses import LossReader
from lucid_compute.accounting.payouts.revenue import ClosingSpan, PayoutsClose, Role, Terms, month_due
from lucid_compute.accounting.payouts.sql import (
    DAILY_OF_DAYS,
    DAILY_OF_PERIOD,
    LOCK_OPEN,
    MOVE_OPEN,
    OF_DAYS,
    OF_PERIOD,
    PayoutQueries,
)
from lucid_compute.accounting.payouts.tables import payout_open, payout_periods, payout_terms
from lucid_compute.errors import InvalidRequest, PeriodConflict, PeriodNotFound
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.long_transactions import LongTransactions
from lucid_compute.postgres.periodic import run_periodically
from lucid_compute.postgres.queries import ids_are_uuids, in_order
from lucid_compute.registry.domain.identity import SYSTEM, Actor
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.wire import SortBy, SortOrder

PAYOUTS_LOCK = 0x7061796F  # an advisory lock of our own: "payo"
MAX_LINES = 100_000  # of a statement
MAX_SHOWN = 20_000  # of a report
_ROLES = [*Role]
_TODAY = text("SELECT (now() AT TIME ZONE 'UTC')::date")
_SORT_COLUMNS = {
    SortBy.CREATED_AT: payout_periods.c.closed_at,
    SortBy.UPDATED_AT: payout_periods.c.closed_at,
    SortBy.NAME: payout_periods.c.starts_on,
}


class Period(NamedTuple):
    """A closed period: from the day `starts_on` up to the day before `ends_on`."""

    id: str
    starts_on: date
    ends_on: date
    closed_at: datetime
    closed_by: str


class EarningsLine(NamedTuple):
    """What one owner gets in one role for the jobs of one model, a provider also by node; or the total of such lines.

    `day` and `period_id` are None where days are added up; `period_id` is also None while the day is open.
    """

    role: Role
    owner: str | None
    node_id: str | None
    node_name: str | None
    model_id: str | None
    model_name: str
    jobs: int
    tokens_in: int
    tokens_out: int
    gross_usd: Decimal
    amount_usd: Decimal
    day: date | None = None
    period_id: str | None = None


class Earnings(NamedTuple):
    """Totals by owner and role, and their lines; `lines` is None when there are too many to show."""

    totals: list[EarningsLine]
    lines: list[EarningsLine] | None


class PayoutStore:
    """Reads payouts and closes periods; `losses` reads what was not earned."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.long_transactions = LongTransactions(database.url)
        self.losses = LossReader(self.long_transactions)

    async def sums(self, since: date, until: date, *, owner: str | None) -> Earnings:
        """Return what was earned with the jobs that started on these days; `owner` None is everyone."""
        return await self._sums(OF_DAYS, owner, {"since": since, "until": until})

    async def daily(self, since: date, until: date, *, owner: str | None) -> list[EarningsLine]:
        """Return the same day by day.

        Raises:
            InvalidRequest: there are too many lines.
        """
        return await self._daily(DAILY_OF_DAYS, owner, {"since": since, "until": until})

    async def sums_of(self, period: Period, *, owner: str | None) -> Earnings:
        """Return what a closed period holds; this never changes."""
        return await self._sums(OF_PERIOD, owner, {"period_id": period.id})

    async def daily_of(self, period: Period, *, owner: str | None) -> list[EarningsLine]:
        """Return the same day by day.

        Raises:
            InvalidRequest: there are too many lines.
        """
        return await self._daily(DAILY_OF_PERIOD, owner, {"period_id": period.id})

    async def terms(self, since: date, until: date) -> list[tuple[datetime, Terms]]:
        """Return the terms that were valid on these days, newest first, each with its start."""
        newest_first = select(payout_terms).where(payout_terms.c.since < until).order_by(payout_terms.c.since.desc())
        terms = []
        async with self._database.transaction() as connection:
            for at, *bps in await connection.execute(newest_first):
                terms.append((at, Terms(*bps)))
                if at.date() <= since:
                    break
        return terms

    async def period(self, period_id: str) -> Period:
        """Return a closed period.

        Raises:
            PeriodNotFound: there is no such period.
        """
        if ids_are_uuids(period_id):
            async with self._database.transaction() as connection:
                rows = await connection.execute(select(payout_periods).where(payout_periods.c.id == period_id))
                if (row := rows.one_or_none()) is not None:
                    return Period(*row)
        raise PeriodNotFound(period_id)

    async def list_periods(
        self, *, sort_by: SortBy, sort_order: SortOrder, offset: int, limit: int
    ) -> tuple[list[Period], int]:
        """Return a page of the closed periods, and the number of all of them."""
        order = in_order(_SORT_COLUMNS, payout_periods.c.id, sort_by, sort_order)
        async with self._database.transaction() as connection:
            total = await connection.scalar(select(func.count()).select_from(payout_periods))
            rows = await connection.execute(select(payout_periods).order_by(*order).offset(offset).limit(limit))
            return [Period(*row) for row in rows], total or 0

    async def close(self, actor: Actor, since: date, until: date) -> tuple[Period, bool]:
        """Close the period, which is final. Return it, and whether this call closed it.

        Raises:
            InvalidRequest: the period is not over.
            PeriodConflict: it does not begin where the last one ended.
            DatabaseUnavailable: it is not known whether the period was closed; call this again.
        """
        async with self.long_transactions.transaction() as connection:
            await connection.execute(text(f"SELECT pg_advisory_xact_lock({PAYOUTS_LOCK})"))
            if (closed := await _find_same(connection, since, until)) is not None:
                return closed, False
            await _check(connection, since, until)
            return await _close(connection, actor, since, until), True

    async def _sums(self, queries: PayoutQueries, owner: str | None, span: dict[str, Any]) -> Earnings:
        parties, nodes = await self._read(queries, MAX_SHOWN, owner, span)
        totals = [line for line in parties if line.model_id is None]
        lines = [line for line in parties if line.model_id is not None]
        return Earnings(sorted(totals, key=_order), None if nodes is None else sorted(lines + nodes, key=_order))

    async def _daily(self, queries: PayoutQueries, owner: str | None, span: dict[str, Any]) -> list[EarningsLine]:
        parties, nodes = await self._read(queries, MAX_LINES, owner, span)
        if nodes is None:
            message = f"That is more than {MAX_LINES} lines. Name an owner, or take a shorter span."
            raise InvalidRequest.at("query.owner", message)
        return sorted(parties + nodes, key=_order)

    async def _read(
        self, queries: PayoutQueries, most: int, owner: str | None, span: dict[str, Any]
    ) -> tuple[list[EarningsLine], list[EarningsLine] | None]:
        """Return lines by role and providers' lines, from one snapshot; None for these if all are more than `most`."""
        values = {**span, "owner": owner}
        async with self.long_transactions.snapshot() as connection:
            parties = [_line(row) for row in (await connection.execute(text(queries.parties), values)).mappings()]
            count = await connection.scalar(text(queries.size), {**values, "most": most + 1})
            if (count or 0) + sum(line.model_id is not None for line in parties) > most:
                return parties, None
            return parties, [_line(row) for row in (await connection.execute(text(queries.nodes), values)).mappings()]


async def record_terms(database: Database, terms: Terms) -> None:
    """Split the prices of jobs that start from now on by `terms`, if these are not the current terms."""
    async with database.transaction() as connection:
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({PAYOUTS_LOCK})"))
        newest = select(payout_terms).order_by(payout_terms.c.since.desc()).limit(1)
        _, *current = (await connection.execute(newest)).one()
        if Terms(*current) != terms:
            await connection.execute(insert(payout_terms).values(**terms._asdict()))


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


async def _close(connection: AsyncConnection, actor: Actor, since: date, until: date) -> Period:
    values = {"id": str(uuid4()), "starts_on": since, "ends_on": until, "closed_by": actor.owner or "lucid"}
    inserted = await connection.execute(insert(payout_periods).values(**values).returning(payout_periods))
    period = Period(*inserted.one())
    await connection.execute(text(LOCK_OPEN), {"until": until})
    await connection.execute(text(MOVE_OPEN), {"until": until, "period_id": period.id})
    details = {"from": since.isoformat(), "to": until.isoformat()}
    await record_change(connection, actor, Change("payouts.close", "payout_period", period.id, details=details))
    return period


def _order(line: EarningsLine) -> tuple[object, ...]:
    """Return the sort key: by owner with the protocol last, by role, then by day, period, node and model."""
    day = line.day or date.min
    whose = (line.owner is None, line.owner or "", _ROLES.index(line.role))
    return (*whose, day, line.period_id or "", line.node_id or "", line.model_id or "")


def _line(row: RowMapping) -> EarningsLine:
    period_id = row.get("period_id")
    return EarningsLine(
        role=Role(row["role"]),
        **{name: row[name] for name in EarningsLine._fields if name in row and name not in {"role", "period_id"}},
        period_id=None if period_id is None else str(period_id),
    )


_log = logging.getLogger(__name__)
_NOW_DAY = literal_column("(now() AT TIME ZONE 'UTC')::date", Date)


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
        self._database = database
        self._store = store
        self._when = when
        self._after_days = after_days

    async def run(self) -> None:
        """Close what is due every five minutes, until this task is cancelled."""
        await run_periodically(self.close_due, every_seconds=self.every_seconds, failed="payouts could not be closed")

    async def close_due(self) -> int:
        """Close what is due, a month at a time. Return how many periods this call closed."""
        closed = 0
        while self._when is PayoutsClose.MONTHLY and (span := await self._next()) is not None:
            try:
                period, is_new = await self._store.close(SYSTEM, *span)
            except PeriodConflict:
                continue  # an admin has just closed another span: look again
            closed += is_new
            _log.info("payouts from %s until before %s are closed: %s", *span, period.id)
        return closed

    async def _next(self) -> ClosingSpan | None:
        ends = select(func.max(payout_periods.c.ends_on)).scalar_subquery()
        starts = select(func.min(payout_open.c.day)).scalar_subquery()
        async with self._database.transaction() as connection:
            last_end, first_open, today = (await connection.execute(select(ends, starts, _NOW_DAY))).one()
        return month_due(last_end, first_open, today, after_days=self._after_days)
