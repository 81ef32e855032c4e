"""Counts jobs exactly, however many there are: by sums where they tell, else by the rows of a few hours at most.

Life-long sums (`job_totals`) know of nodes and outcomes. Of spans of time and of models the records know: whole days,
then whole hours and minutes of what is not added up yet (docs/adr/0012-records.md). What lies between a bound and the
next whole record is counted row by row. Rows that are removed are older than all that stay: nothing before
the oldest row is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import reduce
from operator import add
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    BindParameter,
    Boolean,
    ColumnElement,
    ScalarSelect,
    Select,
    and_,
    bindparam,
    func,
    literal_column,
    select,
    text,
    true,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.rollup_columns import ALL_NODES, UPSTREAM, owner_scope
from lucid_compute.accounting.rollup_reader import Tier
from lucid_compute.accounting.timeline import EPOCH
from lucid_compute.postgres.tables import JOB_IS_FAULT, job_removals, job_totals, jobs

# Literals, as in the indexes that hold only such rows.
IS_OPEN: ColumnElement[bool] = literal_column("(outcome IN ('running', 'lost'))", Boolean)
_IS_FAULT: ColumnElement[bool] = literal_column(f"({JOB_IS_FAULT})", Boolean)
UNFINISHED = (Outcome.RUNNING, Outcome.LOST)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """What is looked for; None looks for anything. From `since` on, before `until`; models by ids, perhaps none."""

    owner: str | None = None
    node_id: str | None = None
    outcome: Outcome | None = None
    model_ids: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_summed(self) -> bool:
        """Return whether the sums tell how many there are, without counting rows."""
        return (self.model_ids, self.since, self.until) == (None, None, None)

    def condition(self) -> ColumnElement[bool]:
        """Return the WHERE clause over `jobs`."""
        conditions: list[ColumnElement[bool]] = [self.scope(jobs.c)]
        if self.outcome is not None:
            conditions.append(jobs.c.outcome == self.outcome.value)
            if self.outcome is not Outcome.COMPLETED:
                conditions.append(_IS_FAULT)
            if self.outcome in UNFINISHED:
                conditions.append(IS_OPEN)
        if self.model_ids is not None:
            conditions.append(jobs.c.model_id.in_(self.model_ids))
        if self.since is not None:
            conditions.append(jobs.c.started_at >= self.since)
        if self.until is not None:
            conditions.append(jobs.c.started_at < self.until)
        return and_(*conditions)

    def scope(self, columns: Any) -> ColumnElement[bool]:
        """Return the WHERE clause over `jobs` or `job_totals` that says whose they are."""
        conditions: list[ColumnElement[bool]] = [true()]
        if self.owner is not None:
            conditions.append(columns.node_owner == self.owner)
        if self.node_id is not None:
            conditions.append(columns.node_id == self.node_id)
        return and_(*conditions)


_SUMMED = (Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED)
_FOREVER = datetime(9999, 1, 1, tzinfo=UTC)
_KEPT = text("""
    SELECT (SELECT min(started_at) FROM jobs), (SELECT min(bucket) FROM job_days), days_until, hours_until
    FROM record_marks
""")


class Piece(NamedTuple):
    """A span of time, without `until`, that records of one length tell whole; `tier` None: that rows tell."""

    tier: Tier | None
    since: datetime
    until: datetime


async def count_jobs(connection: AsyncConnection, wanted: JobFilter) -> int:
    """Return how many there are, in one statement: a job that is moved meanwhile counts once."""
    if wanted.is_summed:
        parts = list(_life_long_sums(wanted))
    elif wanted.outcome in UNFINISHED:
        parts = [_rows(wanted)]
    else:
        oldest, first_day, days_until, hours_until = (await connection.execute(_KEPT)).one()
        if oldest is None:
            return 0
        since, until = max(wanted.since or oldest, oldest), wanted.until or _FOREVER
        pieces = split_span(since, until, first_day=first_day, days_until=days_until, hours_until=hours_until)
        parts = [part for piece in pieces for part in _parts_of(piece, wanted)]
    return int(await connection.scalar(select(reduce(add, parts))) or 0) if parts else 0


def split_span(
    since: datetime, until: datetime, *, first_day: datetime | None, days_until: datetime, hours_until: datetime
) -> list[Piece]:
    """Return a span as pieces in order: days are read up to `days_until`, hours up to `hours_until`, then minutes.

    So nothing is read that may be kept no longer, but for days before `first_day`.
    """
    found, cursor = [], since
    for tier, first, last in (
        (Tier.DAYS, first_day or days_until, days_until),
        (Tier.HOURS, days_until, hours_until),
        (Tier.MINUTES, hours_until, _FOREVER),
    ):
        begin, end = _ceil(max(first, cursor), tier.length), _floor(min(last, until), tier.length)
        if begin < end:
            if cursor < begin:
                found.append(Piece(None, cursor, begin))
            found.append(Piece(tier, begin, end))
            cursor = end
    if cursor < until:
        found.append(Piece(None, cursor, until))
    return found


def _floor(instant: datetime, length: timedelta) -> datetime:
    return EPOCH + (instant - EPOCH) // length * length


def _ceil(instant: datetime, length: timedelta) -> datetime:
    return EPOCH - (EPOCH - instant) // length * length


def _parts_of(piece: Piece, wanted: JobFilter) -> Iterator[ScalarSelect[Any]]:
    """Yield the counts that a piece is made of: its records, what is not moved yet, and what is in no record."""
    rows = _rows_between(wanted, piece)
    if piece.tier is None:
        yield rows.scalar_subquery()
        return
    if wanted.outcome is None:
        yield rows.where(IS_OPEN).scalar_subquery()
    values: dict[str, Any] = {"owner": wanted.owner, "node": wanted.node_id, "models": wanted.model_ids}
    values |= {"since": piece.since, "until": piece.until}
    for statement in (_records_sql(piece.tier, wanted), _open_sql(wanted)):
        used: list[BindParameter[Any]] = [
            bindparam(name, value, unique=True) for name, value in values.items() if f":{name} " in statement
        ]
        yield text(statement).bindparams(*used).columns(n=BigInteger).scalar_subquery()


def _records_sql(tier: Tier, wanted: JobFilter) -> str:
    """Return the statement that counts by records; each is looked up by its key, as `record_read_sql` does."""
    table = f"job_{tier.value}"
    if wanted.node_id is not None:
        scope = "CAST(:node AS uuid)"
    else:
        scope = f"'{ALL_NODES}'::uuid" if wanted.owner is None else owner_scope("CAST(:owner AS text)")
    if wanted.model_ids is not None:
        model = "AND model_id = ANY(CAST(:models AS uuid[]))"
    else:
        model = "" if wanted.node_id is not None else f"AND model_id = '{UPSTREAM}'"
    last = f"(SELECT max(bucket) FROM {table} WHERE bucket < CAST(:until AS timestamptz))"
    return f"""
        SELECT coalesce(sum(r.n), 0)::int8 AS n
        FROM generate_series(CAST(:since AS timestamptz), {last}, interval '1 {tier.value}') AS at, LATERAL (
            SELECT {_ended(wanted)} AS n FROM {table} WHERE bucket = at AND scope_id = {scope} {model} OFFSET 0
        ) r
    """


def _open_sql(wanted: JobFilter) -> str:
    """Return the statement that counts what the ledger has added since records were moved."""
    conditions = ["bucket >= CAST(:since AS timestamptz)", "bucket < CAST(:until AS timestamptz)"]
    if wanted.node_id is not None:
        conditions.append("node_id = CAST(:node AS uuid)")
    if wanted.owner is not None:
        conditions.append(f"node_owner = CAST(:owner AS text) AND node_id <> '{UPSTREAM}'")
    if wanted.model_ids is not None:
        conditions.append("model_id = ANY(CAST(:models AS uuid[]))")
    return f"SELECT coalesce(sum({_ended(wanted)}), 0)::int8 AS n FROM job_open WHERE {' AND '.join(conditions)}"


def _ended(wanted: JobFilter) -> str:
    return " + ".join(outcome.value for outcome in _SUMMED if wanted.outcome in {None, outcome})


def _rows_between(wanted: JobFilter, piece: Piece) -> Select[int]:
    span = JobFilter(wanted.owner, wanted.node_id, wanted.outcome, wanted.model_ids, piece.since, piece.until)
    return select(func.count()).select_from(jobs).where(span.condition())


def _rows(wanted: JobFilter) -> ScalarSelect[Any]:
    return select(func.count()).select_from(jobs).where(wanted.condition()).scalar_subquery()


def _life_long_sums(wanted: JobFilter) -> Iterator[ScalarSelect[Any]]:
    """Yield the sums of nodes' jobs that ended, less what was removed, and the numbers of those that are in no sum.

    Those run or are lost, or were on no node.
    """
    is_everyones = wanted.owner is None and wanted.node_id is None
    rows = select(func.count()).select_from(jobs).where(wanted.condition())
    names = [outcome.value for outcome in _SUMMED if wanted.outcome in {None, outcome}]
    for sign, sums in ((1, job_totals), (-1, job_removals)) if names else ():
        total = func.coalesce(func.sum(reduce(add, [sums.c[name] for name in names])), 0)
        yield select(sign * total).where(wanted.scope(sums.c)).scalar_subquery()
    if len(names) != 1:
        yield rows.where(IS_OPEN, jobs.c.node_id.is_not(None)).scalar_subquery()
    if is_everyones:
        yield rows.where(jobs.c.node_id.is_(None)).scalar_subquery()
