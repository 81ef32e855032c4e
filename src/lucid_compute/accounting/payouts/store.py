"""Payouts in Postgres: reads what owners have earned, closes and corrects periods, and records the terms."""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import RowMapping, func, insert, select, text

from lucid_compute.accounting.payouts.closing import LOCK_PAYOUTS, Period, PeriodClosing
from lucid_compute.accounting.payouts.corrections import (
    Correction,
    CorrectionLine,
    NewCorrection,
    book,
    read_corrections,
)
from lucid_compute.accounting.payouts.losses import LossReader
from lucid_compute.accounting.payouts.revenue import Role, Terms
from lucid_compute.accounting.payouts.sql import (
    DAILY_OF_DAYS,
    DAILY_OF_PERIOD,
    MODELS_OF,
    OF_DAYS,
    OF_PERIOD,
    PayoutQueries,
)
from lucid_compute.accounting.payouts.tables import payout_periods, payout_terms
from lucid_compute.errors import InvalidRequest, PeriodNotFound
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.long_transactions import LongTransactions, SharedReads
from lucid_compute.postgres.queries import ids_are_uuids, in_order
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.idempotency import Idempotency
from lucid_compute.wire import SortBy, SortOrder

MAX_LINES = 100_000  # of a statement
MAX_SHOWN = 20_000  # of a report
_ROLES = [*Role]
_SORT_COLUMNS = {
    SortBy.CREATED_AT: payout_periods.c.closed_at,
    SortBy.UPDATED_AT: payout_periods.c.closed_at,
    SortBy.NAME: payout_periods.c.starts_on,
}


class Days(NamedTuple):
    """A span of days in UTC; `until` is not included."""

    since: date
    until: date


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
    """Totals by owner and role, without corrections; their lines; and corrections that are booked on these days.

    `lines` is None when there are too many to show.
    """

    totals: list[EarningsLine]
    lines: list[EarningsLine] | None
    corrections: list[CorrectionLine]


class Statement(NamedTuple):
    """Lines day by day, and the corrections that are booked on these days."""

    lines: list[EarningsLine]
    corrections: list[CorrectionLine]


class PayoutStore:
    """Reads payouts and closes periods; `losses` reads what was not earned."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.long_transactions = LongTransactions(database.url)
        self.losses = LossReader(self.long_transactions)
        self._closing = PeriodClosing(self.long_transactions)
        self._reads = SharedReads()

    async def sums(self, since: date, until: date, *, owner: str | None) -> Earnings:
        """Return what was earned with the jobs that started on these days; `owner` None is everyone."""
        days = Days(since, until)
        return await self._sums(OF_DAYS, owner, days, days._asdict())

    async def daily(self, since: date, until: date, *, owner: str | None) -> Statement:
        """Return the same day by day.

        Raises:
            InvalidRequest: there are too many lines.
        """
        days = Days(since, until)
        return await self._daily(DAILY_OF_DAYS, owner, days, days._asdict())

    async def sums_of(self, period: Period, *, owner: str | None) -> Earnings:
        """Return what a closed period holds; this never changes."""
        days = Days(period.starts_on, period.ends_on)
        return await self._sums(OF_PERIOD, owner, days, {"period_id": period.id})

    async def daily_of(self, period: Period, *, owner: str | None) -> Statement:
        """Return the same day by day.

        Raises:
            InvalidRequest: there are too many lines.
        """
        days = Days(period.starts_on, period.ends_on)
        return await self._daily(DAILY_OF_PERIOD, owner, days, {"period_id": period.id})

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
            PeriodConflict: it does not begin where the last one ended, or another one is being closed.
            DatabaseUnavailable: it is not known whether the period was closed; call this again.
        """
        return await self._closing.close(actor, since, until)

    async def correct(self, actor: Actor, new: NewCorrection, idempotency: Idempotency | None = None) -> Correction:
        """Book a correction of a closed period, in the period that is open now.

        Raises:
            PeriodNotFound: there is no such closed period.
            IdempotencyConflict: the key was used with another body.
        """
        async with self._database.transaction() as connection:
            return await book(connection, actor, new, idempotency)

    async def _sums(self, queries: PayoutQueries, owner: str | None, days: Days, span: dict[str, Any]) -> Earnings:
        parties, nodes, corrections = await self._read(queries, MAX_SHOWN, owner, days, span)
        totals = [line for line in parties if line.model_id is None]
        lines = [line for line in parties if line.model_id is not None]
        shown = None if nodes is None else sorted(lines + nodes, key=_order)
        return Earnings(sorted(totals, key=_order), shown, corrections)

    async def _daily(self, queries: PayoutQueries, owner: str | None, days: Days, span: dict[str, Any]) -> Statement:
        parties, nodes, corrections = await self._read(queries, MAX_LINES, owner, days, span)
        if nodes is None or len(corrections) > MAX_LINES:
            message = f"That is more than {MAX_LINES} lines. Name an owner, or take a shorter span."
            raise InvalidRequest.at("query.owner", message)
        return Statement(sorted(parties + nodes, key=_order), corrections)

    async def _read(
        self, queries: PayoutQueries, most: int, owner: str | None, days: Days, span: dict[str, Any]
    ) -> tuple[list[EarningsLine], list[EarningsLine] | None, list[CorrectionLine]]:
        """Return lines by role, providers' lines and corrections, from one snapshot.

        There are no providers' lines (None) if all lines are more than `most`.
        """
        key = (queries, most, owner, days, *span.values())
        return await self._reads.get(key, lambda: self._read_alone(queries, most, owner, days, span))

    async def _read_alone(
        self, queries: PayoutQueries, most: int, owner: str | None, days: Days, span: dict[str, Any]
    ) -> tuple[list[EarningsLine], list[EarningsLine] | None, list[CorrectionLine]]:
        values: dict[str, Any] = {**span, "owner": owner}
        async with self.long_transactions.snapshot() as connection:
            corrections = await read_corrections(connection, *days, owner=owner, most=MAX_LINES + 1)
            values["models"] = [*await connection.scalars(text(MODELS_OF), values)]
            parties = [_line(row) for row in (await connection.execute(text(queries.parties), values)).mappings()]
            count = await connection.scalar(text(queries.size), {**values, "most": most + 1})
            if (count or 0) + sum(line.model_id is not None for line in parties) > most:
                return parties, None, corrections
            nodes = [_line(row) for row in (await connection.execute(text(queries.nodes), values)).mappings()]
            return parties, nodes, corrections


async def record_terms(database: Database, terms: Terms) -> None:
    """Split the prices of jobs that start from now on by `terms`, if these are not the current terms."""
    async with database.transaction() as connection:
        await connection.execute(LOCK_PAYOUTS)
        newest = select(payout_terms).order_by(payout_terms.c.since.desc()).limit(1)
        _, *current = (await connection.execute(newest)).one()
        if Terms(*current) != terms:
            await connection.execute(insert(payout_terms).values(**terms._asdict()))


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
