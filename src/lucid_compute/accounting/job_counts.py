"""Counts jobs exactly, however many there are: from sums where possible, else from the rows of a day or two at most.

`job_totals` has the sums of all time by node and outcome. For spans of time and models, rollups are added: whole days,
then whole hours and minutes that are in no day yet (docs/adr/0012-records.md). Jobs between a bound of the span and the
next whole rollup are counted row by row. Removed rows are older than all others, so nothing before the oldest row is
counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    any_,
    bindparam,
    cast,
    func,
    literal_column,
    select,
    text,
    true,
)
from sqlalchemy.dialects.postgresql import ARRAY, UUID
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.rollup_columns import ALL_NODES, UPSTREAM, owner_scope
from lucid_compute.accounting.rollup_reader import Tier
from lucid_compute.accounting.tables import usage_days
from lucid_compute.accounting.timeline import EPOCH
from lucid_compute.postgres.tables import JOB_IS_FAULT, job_removals, job_totals, jobs

# Literals, as in the partial indexes: else Postgres would not use these.
IS_OPEN: ColumnElement[bool] = literal_column("(outcome IN ('running', 'lost'))", Boolean)
_IS_FAULT: ColumnElement[bool] = literal_column(f"({JOB_IS_FAULT})", Boolean)
UNFINISHED = (Outcome.RUNNING, Outcome.LOST)


@dataclass(frozen=True, slots=True)
class JobFilter:
    """Which jobs to list or count; None sets no condition. `since` is included, `until` is not.

    `owner` is the nodes' owner, `consumer` the owner of the keys that sent the requests.
    """

    owner: str | None = None
    consumer: str | None = None
    node_id: str | None = None
    outcome: Outcome | None = None
    model_ids: Sequence[str] | None = None
    since: datetime | None = None
    until: datetime | None = None

    @property
    def is_summed(self) -> bool:
        """Return whether `job_totals` has the number, so that no rows need to be counted."""
        return (self.consumer, self.model_ids, self.since, self.until) == (None, None, None, None)

    def condition(self) -> ColumnElement[bool]:
        """Return the WHERE clause over `jobs`."""
        conditions: list[ColumnElement[bool]] = [self.scope(jobs.c)]
        if self.consumer is not None:
            conditions.append(jobs.c.consumer == self.consumer)
        if self.outcome is not None:
            conditions.append(jobs.c.outcome == self.outcome.value)
            if self.outcome is not Outcome.COMPLETED:
                conditions.append(_IS_FAULT)
            if self.outcome in UNFINISHED:
                conditions.append(IS_OPEN)
        if self.model_ids is not None:
            # one array: a name that was used again and again stands for any number of models
            conditions.append(jobs.c.model_id == any_(cast(list(self.model_ids), ARRAY(UUID(as_uuid=False)))))
        if self.since is not None:
            conditions.append(jobs.c.started_at >= self.since)
        if self.until is not None:
            conditions.append(jobs.c.started_at < self.until)
        return and_(*conditions)

    def scope(self, columns: Any) -> ColumnElement[bool]:
        """Return the WHERE clause over `jobs` or `job_totals` for the owner and the node."""
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


_USAGE_KEPT = text("""
    SELECT (SELECT min(started_at) FROM jobs), (SELECT min(day)::timestamp AT TIME ZONE 'UTC' FROM usage_days)
""")


class SpanPiece(NamedTuple):
    """A span of time up to `until` that whole rollups of one tier cover; with `tier` None its rows are counted."""

    tier: Tier | None
    since: datetime
    until: datetime


async def count_jobs(connection: AsyncConnection, job_filter: JobFilter) -> int:
    """Return the number of jobs, by one statement, so that a job that is moved meanwhile counts once."""
    if job_filter.is_summed:
        parts = list(_all_time_sums(job_filter))
    elif job_filter.outcome in UNFINISHED:
        parts = [_rows(job_filter)]
    elif job_filter.consumer is not None:
        parts = await _parts_of_consumer(connection, job_filter)
    else:
        oldest, first_day, days_until, hours_until = (await connection.execute(_KEPT)).one()
        if oldest is None:
            return 0
        since, until = max(job_filter.since or oldest, oldest), job_filter.until or _FOREVER
        pieces = split_span(since, until, first_day=first_day, days_until=days_until, hours_until=hours_until)
        parts = [part for piece in pieces for part in _parts_of(piece, job_filter)]
    return int(await connection.scalar(select(reduce(add, parts))) or 0) if parts else 0


async def _parts_of_consumer(connection: AsyncConnection, job_filter: JobFilter) -> list[ScalarSelect[Any]]:
    """Return the counts of a consumer's jobs: whole days from `usage_days`, the rest row by row."""
    if job_filter.owner is not None or job_filter.node_id is not None:
        return [_rows(job_filter)]
    oldest, first_day = (await connection.execute(_USAGE_KEPT)).one()
    if oldest is None:
        return []
    since, until = max(job_filter.since or oldest, oldest), job_filter.until or _FOREVER
    first_day = first_day or _FOREVER
    parts: list[ScalarSelect[Any]] = []
    for piece in split_span(since, until, first_day=first_day, days_until=_FOREVER, hours_until=_FOREVER):
        rows = _rows_between(job_filter, piece)
        if piece.tier is None:
            parts.append(rows.scalar_subquery())
            continue
        if job_filter.outcome is None:
            parts.append(rows.where(IS_OPEN).scalar_subquery())
        days: Any = (
            select(func.coalesce(func.sum(text(_ended(job_filter))), 0))
            .select_from(usage_days)
            .where(
                usage_days.c.consumer == job_filter.consumer,
                usage_days.c.day >= piece.since.date(),
                usage_days.c.day < piece.until.date(),
            )
        )
        if job_filter.model_ids is not None:
            is_one = any_(cast(list(job_filter.model_ids), ARRAY(UUID(as_uuid=False))))
            days = days.where(usage_days.c.model_id == is_one)
        parts.append(days.scalar_subquery())
    return parts


def split_span(
    since: datetime, until: datetime, *, first_day: datetime | None, days_until: datetime, hours_until: datetime
) -> list[SpanPiece]:
    """Split a span into pieces in order: days up to `days_until`, hours up to `hours_until`, then minutes.

    So no rollup is read that may be deleted already; days begin at `first_day`.
    """
    pieces, cursor = [], since
    for tier, first, last in (
        (Tier.DAYS, first_day or days_until, days_until),
        (Tier.HOURS, days_until, hours_until),
        (Tier.MINUTES, hours_until, _FOREVER),
    ):
        begin, end = _ceil(max(first, cursor), tier.length), _floor(min(last, until), tier.length)
        if begin < end:
            if cursor < begin:
                pieces.append(SpanPiece(None, cursor, begin))
            pieces.append(SpanPiece(tier, begin, end))
            cursor = end
    if cursor < until:
        pieces.append(SpanPiece(None, cursor, until))
    return pieces


def _floor(instant: datetime, length: timedelta) -> datetime:
    return EPOCH + (instant - EPOCH) // length * length


def _ceil(instant: datetime, length: timedelta) -> datetime:
    return EPOCH - (EPOCH - instant) // length * length


def _parts_of(piece: SpanPiece, job_filter: JobFilter) -> Iterator[ScalarSelect[Any]]:
    """Yield the counts that add up to a piece: rollups, jobs that are not moved yet, and jobs that have not ended."""
    rows = _rows_between(job_filter, piece)
    if piece.tier is None:
        yield rows.scalar_subquery()
        return
    if job_filter.outcome is None:
        yield rows.where(IS_OPEN).scalar_subquery()
    values: dict[str, Any] = {"owner": job_filter.owner, "node": job_filter.node_id, "models": job_filter.model_ids}
    values |= {"since": piece.since, "until": piece.until}
    for statement in (_rollups_sql(piece.tier, job_filter), _open_sql(job_filter)):
        used: list[BindParameter[Any]] = [
            bindparam(name, value, unique=True) for name, value in values.items() if f":{name} " in statement
        ]
        yield text(statement).bindparams(*used).columns(n=BigInteger).scalar_subquery()


def _rollups_sql(tier: Tier, job_filter: JobFilter) -> str:
    """Return the statement that counts by rollups; each is looked up by its key, as in `rollup_reader`."""
    table = f"job_{tier.value}"
    if job_filter.node_id is not None:
        scope = "CAST(:node AS uuid)"
    else:
        scope = f"'{ALL_NODES}'::uuid" if job_filter.owner is None else owner_scope("CAST(:owner AS text)")
    if job_filter.model_ids is not None:
        model = "AND model_id = ANY(CAST(:models AS uuid[]))"
    else:
        model = "" if job_filter.node_id is not None else f"AND model_id = '{UPSTREAM}'"
    last = f"(SELECT max(bucket) FROM {table} WHERE bucket < CAST(:until AS timestamptz))"
    return f"""
        SELECT coalesce(sum(r.n), 0)::int8 AS n
        FROM generate_series(CAST(:since AS timestamptz), {last}, interval '1 {tier.value}') AS at, LATERAL (
            SELECT {_ended(job_filter)} AS n FROM {table} WHERE bucket = at AND scope_id = {scope} {model} OFFSET 0
        ) r
    """


def _open_sql(job_filter: JobFilter) -> str:
    """Return the statement that counts the jobs that are not moved to rollups yet."""
    conditions = ["bucket >= CAST(:since AS timestamptz)", "bucket < CAST(:until AS timestamptz)"]
    if job_filter.node_id is not None:
        conditions.append("node_id = CAST(:node AS uuid)")
    if job_filter.owner is not None:
        conditions.append(f"node_owner = CAST(:owner AS text) AND node_id <> '{UPSTREAM}'")
    if job_filter.model_ids is not None:
        conditions.append("model_id = ANY(CAST(:models AS uuid[]))")
    return f"SELECT coalesce(sum({_ended(job_filter)}), 0)::int8 AS n FROM job_open WHERE {' AND '.join(conditions)}"


def _ended(job_filter: JobFilter) -> str:
    return " + ".join(outcome.value for outcome in _SUMMED if job_filter.outcome in {None, outcome})


def _rows_between(job_filter: JobFilter, piece: SpanPiece) -> Select[int]:
    span = replace(job_filter, since=piece.since, until=piece.until)
    return select(func.count()).select_from(jobs).where(span.condition())


def _rows(job_filter: JobFilter) -> ScalarSelect[Any]:
    return select(func.count()).select_from(jobs).where(job_filter.condition()).scalar_subquery()


def _all_time_sums(job_filter: JobFilter) -> Iterator[ScalarSelect[Any]]:
    """Yield the sums of nodes' ended jobs, minus the removed ones, and the numbers of jobs that are in no sum.

    Jobs that run, are lost, or ran on no node are in no sum.
    """
    is_everyones = job_filter.owner is None and job_filter.node_id is None
    rows = select(func.count()).select_from(jobs).where(job_filter.condition())
    names = [outcome.value for outcome in _SUMMED if job_filter.outcome in {None, outcome}]
    for sign, sums in ((1, job_totals), (-1, job_removals)) if names else ():
        total = func.coalesce(func.sum(reduce(add, [sums.c[name] for name in names])), 0)
        yield select(sign * total).where(job_filter.scope(sums.c)).scalar_subquery()
    if len(names) != 1:
        yield rows.where(IS_OPEN, jobs.c.node_id.is_not(None)).scalar_subquery()
    if is_everyones:
        yield rows.where(jobs.c.node_id.is_(None)).scalar_subquery()
