"""Reads the job ledger: pages of jobs with exact totals, and statistics of nodes for the last hour."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import RowMapping, collate, or_, select, text

from lucid_compute.accounting.job_counts import JobFilter, count_jobs
from lucid_compute.accounting.shapes import JobView
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import ids_are_uuids, in_order
from lucid_compute.postgres.tables import jobs, passports
from lucid_compute.registry.domain.node_state import JobStatistics
from lucid_compute.registry.domain.passports import PassportType
from lucid_compute.wire import SortBy, SortOrder, write_money

STATISTICS_TIMEOUT_SECONDS = 1.0
PAUSE_AFTER_FAILURE_SECONDS = 2.0
MAX_CACHED = 20_000
LEAST_CACHED = 1000
# Sorting by name sorts by the model.
_SORT_COLUMNS = {
    SortBy.CREATED_AT: jobs.c.started_at,
    SortBy.UPDATED_AT: jobs.c.started_at,
    SortBy.NAME: collate(jobs.c.model_name, "C"),
}
_UNKNOWN = JobStatistics(None, None, None)

# Statistics of each node of :ids, in one query for a page of a list. The last hour is 60 whole minutes and the current
# one. Each minute is looked up by its key (OFFSET prevents another plan): rollups are stored by time, not by node.
_STATISTICS = """
SELECT n.id::text, coalesce(t.completed, 0) AS jobs_completed, h.completed, h.failed, h.latency_us
FROM unnest(CAST(:ids AS uuid[])) AS n (id)
LEFT JOIN job_totals t ON t.node_id = n.id
LEFT JOIN LATERAL (
    SELECT sum(completed)::int8 AS completed, sum(failed)::int8 AS failed, sum(latency_us)::int8 AS latency_us
    FROM (
        SELECT completed, failed, latency_us FROM job_open
        WHERE node_id = n.id AND bucket >= date_trunc('minute', now()) - interval '1 hour'
        UNION ALL
        SELECT m.* FROM generate_series(0, 60) AS ago, LATERAL (
            SELECT completed, failed, latency_us FROM job_minutes
            WHERE bucket = date_trunc('minute', now()) - ago * interval '1 minute' AND scope_id = n.id OFFSET 0
        ) m
    ) minutes
) h ON true
"""


class JobSearch:
    """Reads jobs and their sums. Statistics are cached for the time that the database is unavailable."""

    def __init__(self, database: Database, *, is_known: Callable[[str], bool] = lambda _: True) -> None:
        """`is_known` says whether a node's statistics may still be asked for, so that others are not kept."""
        self._database = database
        self._is_known = is_known
        self._cached: dict[str, JobStatistics] = {}
        self._forget_above = LEAST_CACHED
        self._query_again_at = 0.0

    async def list_page(
        self,
        job_filter: JobFilter,
        *,
        sort_by: SortBy,
        sort_order: SortOrder,
        offset: int,
        limit: int,
        viewer: str | None,
    ) -> tuple[list[JobView], int]:
        """Return a page of the jobs that the filter selects, and the number of all of them.

        `viewer` is the owner who sees them; None, an admin, sees who the other side is as well.
        """
        async with self._database.transaction() as connection:
            total = await count_jobs(connection, job_filter)
            shown = min(limit, total - offset)
            if shown <= 0:  # a query past the end would read all rows
                return [], total
            is_late = offset > total // 2  # Postgres reads all rows before a page: from the end these are fewer
            page = (
                select(jobs).where(job_filter.condition()).order_by(*_order(sort_by, sort_order, is_reversed=is_late))
            )
            first = total - offset - shown if is_late else offset
            rows = [*(await connection.execute(page.offset(first).limit(shown))).mappings()]
            return [_view(row, viewer) for row in (rows[::-1] if is_late else rows)], total

    async def find_model_ids(self, named: str) -> list[str]:
        """Return the ids of the models with this id or name, deleted ones too; an empty list if there are none."""
        has_name = passports.c.name == named
        is_it = or_(has_name, passports.c.id == named) if ids_are_uuids(named) else has_name
        ids = select(passports.c.id).where(passports.c.type == PassportType.MODEL.value, is_it)
        async with self._database.transaction() as connection:
            return [*await connection.scalars(ids)]

    async def statistics(self, node_ids: Sequence[str]) -> dict[str, JobStatistics]:
        """Return the statistics of each of the nodes, in one query. A node without jobs has 0 jobs and no averages.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            rows = await connection.execute(text(_STATISTICS), {"ids": list(node_ids)})
            return {row["id"]: _read_statistics(row) for row in rows.mappings()}

    async def last_statistics(self, node_ids: Sequence[str]) -> dict[str, JobStatistics]:
        """Return the same, or the cached values while the database is unavailable. This takes a second at most."""
        if node_ids and time.monotonic() >= self._query_again_at:
            try:
                async with asyncio.timeout(STATISTICS_TIMEOUT_SECONDS):
                    statistics = await self.statistics(node_ids)
            except (DatabaseUnavailable, TimeoutError):
                self._query_again_at = time.monotonic() + PAUSE_AFTER_FAILURE_SECONDS
            else:
                self._cache(statistics)
                return statistics
        return {node_id: self._cached.get(node_id, _UNKNOWN) for node_id in node_ids}

    def _cache(self, found: dict[str, JobStatistics]) -> None:
        for node_id, statistics in found.items():
            self._cached.pop(node_id, None)
            self._cached[node_id] = statistics  # at the end: the oldest are dropped first
        if len(self._cached) > self._forget_above:
            known = [entry for entry in self._cached.items() if self._is_known(entry[0])]
            self._cached = dict(known[-MAX_CACHED:])
            self._forget_above = min(LEAST_CACHED + 2 * len(self._cached), MAX_CACHED)


def _order(sort_by: SortBy, sort_order: SortOrder, *, is_reversed: bool) -> tuple[Any, ...]:
    """Return a total ORDER BY, or exactly the opposite one."""
    if not is_reversed:
        return *in_order(_SORT_COLUMNS, jobs.c.id, sort_by, sort_order), jobs.c.attempt
    other = SortOrder.ASCENDING if sort_order is SortOrder.DESCENDING else SortOrder.DESCENDING
    return *in_order(_SORT_COLUMNS, jobs.c.id.desc(), sort_by, other), jobs.c.attempt.desc()


def _read_statistics(row: RowMapping) -> JobStatistics:
    completed, failed = row["completed"] or 0, row["failed"] or 0
    return JobStatistics(
        jobs_completed=row["jobs_completed"],
        avg_latency_ms=round((row["latency_us"] or 0) / completed / 1000, 3) if completed else None,
        error_rate=failed / (completed + failed) if completed + failed else None,
    )


_SHOWN_AS_THEY_ARE = [
    name for name in JobView.model_fields if name in jobs.c and name not in {"consumer", "key_id", "price_usd"}
]


def _view(row: RowMapping, viewer: str | None) -> JobView:
    price, is_sender = row["price_usd"], viewer is None or row["consumer"] == viewer
    return JobView(
        **{name: row[name] for name in _SHOWN_AS_THEY_ARE},
        passport_id=row["node_id"],
        owner=row["node_owner"] if viewer is None or row["node_owner"] == viewer else None,
        model=row["model_name"],
        stream=row["is_stream"],
        tokens_counted=row["are_tokens_counted"],
        price_usd=None if price is None else write_money(price),
        created_at=row["started_at"],
        consumer=row["consumer"] if is_sender else None,
        key_id=row["key_id"] if is_sender else None,
    )
