"""Deletes old jobs and refusals in small batches. The sums of jobs stay.

Each batch is a short transaction that skips locked rows, so that no request waits for it. One replica deletes at a
time, for half of the time at most, so that the database has room for other work. The statement that deletes jobs also
counts them by node in `job_removals`: so the totals of lists stay exact.
"""

from __future__ import annotations

import asyncio
import time

from sqlalchemy import TextClause, text

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.periodic import run_periodically

EVERY_SECONDS = 60.0
BATCH = 2000  # rows: about 30 ms
RETENTION_LOCK = 0x6A6F6273  # an advisory lock of our own: "jobs"

# Jobs whose payouts are not closed stay, and so do all later jobs: until a period is closed, every cent of it must be
# traceable to jobs. While a period is being closed all stay.
#
# Jobs that run or are lost are in no sum, so they are not counted. No job runs for as long as a day.
_REMOVE = text("""
    WITH gone AS (
        DELETE FROM jobs WHERE (id, attempt) IN (
            SELECT id, attempt FROM jobs WHERE started_at < least(
                now() - make_interval(days => :days), (SELECT min(day) FROM payout_open)::timestamp AT TIME ZONE 'UTC'
            ) AND NOT EXISTS (SELECT FROM payout_closings)
            ORDER BY started_at LIMIT :batch FOR UPDATE SKIP LOCKED
        )
        RETURNING node_id, node_owner, outcome
    ), noted AS (
        INSERT INTO job_removals AS held (node_id, node_owner, completed, failed, rejected, cancelled)
        SELECT node_id, min(node_owner),
            count(*) FILTER (WHERE outcome = 'completed'), count(*) FILTER (WHERE outcome = 'failed'),
            count(*) FILTER (WHERE outcome = 'rejected'), count(*) FILTER (WHERE outcome = 'cancelled')
        FROM gone WHERE node_id IS NOT NULL GROUP BY node_id ORDER BY node_id
        ON CONFLICT (node_id) DO UPDATE SET
            completed = held.completed + excluded.completed, failed = held.failed + excluded.failed,
            rejected = held.rejected + excluded.rejected, cancelled = held.cancelled + excluded.cancelled
    )
    SELECT count(*) FROM gone
""")

# Hours of refused requests are kept as long as jobs.
_REMOVE_REFUSALS = text("""
    WITH gone AS (
        DELETE FROM refusals WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM refusals WHERE hour < now() - make_interval(days => :days) ORDER BY hour LIMIT :batch
        ))
        RETURNING 1
    )
    SELECT count(*) FROM gone
""")


class JobRetention:
    """Removes refusals, and jobs whose payouts are closed, when they are older than `days`; 0 removes nothing."""

    def __init__(self, database: Database, *, days: int) -> None:
        self._database = database
        self._days = days

    async def run(self) -> None:
        """Remove old rows once a minute, until this task is cancelled."""
        await run_periodically(self.remove_all, every_seconds=EVERY_SECONDS, failed="old jobs could not be removed")

    async def remove_all(self, batch: int = BATCH) -> int:
        """Remove everything that is too old and return the number of jobs: 0 while another replica removes them."""
        await self._remove(_REMOVE_REFUSALS, batch)
        return await self._remove(_REMOVE, batch)

    async def _remove(self, statement: TextClause, batch: int) -> int:
        removed = 0
        while self._days:
            began = time.monotonic()
            count = await self._remove_some(statement, batch)
            removed += count
            if count < batch:
                return removed
            await asyncio.sleep(time.monotonic() - began)
        return removed

    async def _remove_some(self, statement: TextClause, batch: int) -> int:
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({RETENTION_LOCK})")):
                return 0
            return int(await connection.scalar(statement, {"days": self._days, "batch": batch}) or 0)
