"""Corrections of closed periods: signed amounts of today that name the period which they put right.

A closed period never changes. So a correction is dated with the day on which it is made, or with the first open day if
that is later; it belongs to the period that holds this day, as its other lines do. It is written once.
"""

from __future__ import annotations

from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import uuid4

from sqlalchemy import RowMapping, insert, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.payouts.closing import LOCK_PAYOUTS
from lucid_compute.accounting.payouts.revenue import Role
from lucid_compute.accounting.payouts.tables import payout_corrections, payout_periods
from lucid_compute.errors import IdempotencyConflict, PeriodNotFound
from lucid_compute.postgres.queries import ids_are_uuids
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.idempotency import Idempotency
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.wire import write_money

# Whatever a clock did, the day is in no period that is closed or being closed.
_DAY = text("""
    SELECT greatest((clock_timestamp() AT TIME ZONE 'UTC')::date,
        (SELECT max(ends_on) FROM payout_periods), (SELECT max(ends_on) FROM payout_closings))
""")
_OF_DAYS = text("""
    SELECT c.*, p.id AS held_by FROM payout_corrections c
    LEFT JOIN payout_periods p ON p.starts_on <= c.day AND c.day < p.ends_on
    WHERE c.day >= :since AND c.day < :until AND (CAST(:owner AS text) IS NULL OR c.owner = :owner)
    ORDER BY c.day, c.created_at, c.id, c.line LIMIT :most
""")


class CorrectedAmount(NamedTuple):
    """What one owner gets in addition, or less, in one role; `owner` is None for the protocol."""

    role: Role
    owner: str | None
    amount_usd: Decimal


class NewCorrection(NamedTuple):
    """A correction to book: of a closed period, with its amounts, and why."""

    period_id: str
    reason: str
    amounts: list[CorrectedAmount]


class Correction(NamedTuple):
    """The amounts of a correction, the closed period that it corrects and why; `day` is when it is booked."""

    id: str
    period_id: str
    day: date
    reason: str
    created_at: datetime
    created_by: str
    amounts: list[CorrectedAmount]


class CorrectionLine(NamedTuple):
    """One amount of a correction in a report. `held_by` is the closed period that holds it; None while it is open."""

    id: str
    period_id: str
    held_by: str | None
    day: date
    role: Role
    owner: str | None
    amount_usd: Decimal
    reason: str
    created_at: datetime


async def book(
    connection: AsyncConnection, actor: Actor, new: NewCorrection, idempotency: Idempotency | None
) -> Correction:
    """Book a correction of a closed period. With the same idempotency key it is booked once, whenever it is repeated.

    Raises:
        PeriodNotFound: there is no such closed period.
        IdempotencyConflict: the key was used with another body.
    """
    await connection.execute(LOCK_PAYOUTS)
    if idempotency and (booked := await _find_booked(connection, actor, idempotency)) is not None:
        return booked
    await _require_closed(connection, new.period_id)
    shared = {
        "id": str(uuid4()),
        "period_id": new.period_id,
        "day": await connection.scalar(_DAY),
        "reason": new.reason,
        "created_by": actor.owner or "lucid",
        "idempotency_key": idempotency and idempotency.key,
        "body_hash": idempotency and idempotency.body_hash,
    }
    rows = [{**shared, "line": number, **each._asdict()} for number, each in enumerate(new.amounts)]
    await connection.execute(insert(payout_corrections).values(rows))
    lines = [{**each._asdict(), "amount_usd": write_money(each.amount_usd)} for each in new.amounts]
    details = {"periodId": new.period_id, "day": str(shared["day"]), "reason": new.reason}
    change = Change("payouts.correct", "payout_correction", str(shared["id"]), after=lines, details=details)
    await record_change(connection, actor, change)
    return await _read(connection, str(shared["id"]))


async def read_corrections(
    connection: AsyncConnection, since: date, until: date, *, owner: str | None, most: int
) -> list[CorrectionLine]:
    """Return the corrections that were booked on these days, of one owner or (None) of all; `most` of them at most."""
    values = {"since": since, "until": until, "owner": owner, "most": most}
    rows = (await connection.execute(_OF_DAYS, values)).mappings()
    return [_line(row) for row in rows]


def _line(row: RowMapping) -> CorrectionLine:
    fields: dict[str, Any] = {name: row[name] for name in CorrectionLine._fields}
    fields |= {name: fields[name] and str(fields[name]) for name in ("id", "period_id", "held_by")}
    return CorrectionLine(**{**fields, "role": Role(row["role"])})


async def _find_booked(connection: AsyncConnection, actor: Actor, idempotency: Idempotency) -> Correction | None:
    columns = (payout_corrections.c.id, payout_corrections.c.body_hash)
    is_its = (
        payout_corrections.c.created_by == (actor.owner or "lucid"),
        payout_corrections.c.idempotency_key == idempotency.key,
        payout_corrections.c.line == 0,
    )
    row = (await connection.execute(select(*columns).where(*is_its))).one_or_none()
    if row is None:
        return None
    if row.body_hash != idempotency.body_hash:
        raise IdempotencyConflict(idempotency.key)
    return await _read(connection, row.id)


async def _require_closed(connection: AsyncConnection, period_id: str) -> None:
    where = payout_periods.c.id == period_id
    if not ids_are_uuids(period_id) or not await connection.scalar(
        select(select(payout_periods).where(where).exists())
    ):
        raise PeriodNotFound(period_id)


async def _read(connection: AsyncConnection, correction_id: str) -> Correction:
    lines = (
        select(payout_corrections).where(payout_corrections.c.id == correction_id).order_by(payout_corrections.c.line)
    )
    rows = (await connection.execute(lines)).mappings().all()
    first = rows[0]
    amounts = [CorrectedAmount(Role(row["role"]), row["owner"], row["amount_usd"]) for row in rows]
    return Correction(**{name: first[name] for name in Correction._fields if name != "amounts"}, amounts=amounts)
