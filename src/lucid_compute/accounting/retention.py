"""Deletes old jobs and refusals in small batches that skip locked rows. The sums of jobs stay.

The statement that deletes jobs also counts them by node in `job_removals`: so the totals of lists stay exact.
"""

from __future__ import annotations

from sqlalchemy import text

from lucid_compute.postgres.batch_deletion import BATCH, BatchDeletion
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.periodic import run_periodically

EVERY_SECONDS = 60.0

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
        self._jobs = BatchDeletion(database, "jobs", _REMOVE)
        self._refusals = BatchDeletion(database, "refusals", _REMOVE_REFUSALS)
        self._days = days

    async def run(self) -> None:
        """Remove old rows once a minute, until this task is cancelled."""
        await run_periodically(self.remove_all, every_seconds=EVERY_SECONDS, failed="old jobs could not be removed")

    async def remove_all(self, batch: int = BATCH) -> int:
        """Remove everything that is too old and return the number of jobs: 0 while another replica removes them."""
        if not self._days:
            return 0
        await self._refusals.run(batch, days=self._days)
        return await self._jobs.run(batch, days=self._days)
