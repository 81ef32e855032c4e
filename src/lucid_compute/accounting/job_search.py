"""Reads the job ledger: pages of jobs with exact totals, however many there are, and what nodes have done of late."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, collate, or_, select, text

from lucid_compute.accounting.job_counts import JobFilter, count_jobs
from lucid_compute.accounting.ledger_sql import STATISTICS
from lucid_compute.accounting.shapes import JobView
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import ids_are_uuids, in_order
from lucid_compute.postgres.tables import jobs, passports
from lucid_compute.registry.domain.node_state import JobStatistics
from lucid_compute.registry.domain.passports import PassportType
from lucid_compute.wire import SortBy, SortOrder, write_money

STATISTICS_TIMEOUT_SECONDS = 1.0
ASK_AGAIN_SECONDS = 2.0
MAX_KNOWN = 20_000
# A job is named by its model; what changes of it is when it ends.
_SORT_COLUMNS = {
    SortBy.CREATED_AT: jobs.c.started_at,
    SortBy.UPDATED_AT: jobs.c.started_at,
    SortBy.NAME: collate(jobs.c.model_name, "C"),
}
_UNKNOWN = JobStatistics(None, None, None)


class JobSearch:
    """Reads jobs and their sums."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._known: dict[str, JobStatistics] = {}
        self._ask_again_at = 0.0

    async def list_page(
        self,
        wanted: JobFilter,
        *,
        sort_by: SortBy,
        sort_order: SortOrder,
        offset: int,
        limit: int,
        shows_consumer: bool,
    ) -> tuple[list[JobView], int]:
        """Return a page of the jobs that are looked for, and how many there are in all."""
        async with self._database.transaction() as connection:
            total = await count_jobs(connection, wanted)
            shown = min(limit, total - offset)
            if shown <= 0:  # a look past the end would read all of them
                return [], total
            is_late = offset > total // 2  # what stands before a page is read: from the end it is less
            page = select(jobs).where(wanted.condition()).order_by(*_order(sort_by, sort_order, is_reversed=is_late))
            first = total - offset - shown if is_late else offset
            rows = [*(await connection.execute(page.offset(first).limit(shown))).mappings()]
            return [_view(row, shows_consumer=shows_consumer) for row in (rows[::-1] if is_late else rows)], total

    async def find_model_ids(self, named: str) -> list[str]:
        """Return the ids of the models that have this id or this name, also of those that ended; none is none."""
        has_name = passports.c.name == named
        is_it = or_(has_name, passports.c.id == named) if ids_are_uuids(named) else has_name
        ids = select(passports.c.id).where(passports.c.type == PassportType.MODEL.value, is_it)
        async with self._database.transaction() as connection:
            return [*await connection.scalars(ids)]

    async def statistics(self, node_ids: Sequence[str]) -> dict[str, JobStatistics]:
        """Return what each of the nodes has done, in one query; nothing at all is 0 jobs and else unknown.

        Raises:
            DatabaseUnavailable: as named.
        """
        async with self._database.transaction() as connection:
            rows = await connection.execute(text(STATISTICS), {"ids": list(node_ids)})
            return {row["id"]: _read_statistics(row) for row in rows.mappings()}

    async def last_statistics(self, node_ids: Sequence[str]) -> dict[str, JobStatistics]:
        """Return the same, and while the database is away what was last known of each node; never wait long."""
        if node_ids and time.monotonic() >= self._ask_again_at:
            try:
                async with asyncio.timeout(STATISTICS_TIMEOUT_SECONDS):
                    found = await self.statistics(node_ids)
            except (DatabaseUnavailable, TimeoutError):
                self._ask_again_at = time.monotonic() + ASK_AGAIN_SECONDS
            else:
                self._remember(found)
                return found
        return {node_id: self._known.get(node_id, _UNKNOWN) for node_id in node_ids}

    def _remember(self, found: dict[str, JobStatistics]) -> None:
        for node_id, statistics in found.items():
            self._known.pop(node_id, None)
            self._known[node_id] = statistics  # the ones last read stand last
        for node_id in list(self._known)[: max(len(self._known) - MAX_KNOWN, 0)]:
            del self._known[node_id]


def _order(sort_by: SortBy, sort_order: SortOrder, *, is_reversed: bool) -> tuple[Any, ...]:
    """Return an ORDER BY that is total, or the very opposite one."""
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


def _view(row: RowMapping, *, shows_consumer: bool) -> JobView:
    price = row["price_usd"]
    return JobView(
        **{name: row[name] for name in _SHOWN_AS_THEY_ARE},
        passport_id=row["node_id"],
        owner=row["node_owner"],
        model=row["model_name"],
        stream=row["is_stream"],
        tokens_counted=row["are_tokens_counted"],
        price_usd=None if price is None else write_money(price),
        created_at=row["started_at"],
        consumer=row["consumer"] if shows_consumer else None,
        key_id=row["key_id"] if shows_consumer else None,
    )
