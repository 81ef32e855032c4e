"""Job retention: counts of removed jobs by node, and an index on the jobs of a model."""

from __future__ import annotations

from alembic import op

from lucid_compute.postgres.schema import build_index

revision = "job_retention"
down_revision = "records"
branch_labels = None
depends_on = None

# Replicas write a job and its node's totals in one statement, so what is read here is consistent without a lock.
_STATEMENTS = """
CREATE TABLE job_removals (
    node_id UUID NOT NULL,
    node_owner TEXT,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    rejected BIGINT NOT NULL,
    cancelled BIGINT NOT NULL,
    CONSTRAINT job_removals_pkey PRIMARY KEY (node_id)
) WITH (fillfactor = 50);

INSERT INTO job_removals (node_id, node_owner, completed, failed, rejected, cancelled)
SELECT t.node_id, t.node_owner, t.completed - coalesce(j.completed, 0), t.failed - coalesce(j.failed, 0),
    t.rejected - coalesce(j.rejected, 0), t.cancelled - coalesce(j.cancelled, 0)
FROM job_totals t LEFT JOIN (
    SELECT node_id, count(*) FILTER (WHERE outcome = 'completed') AS completed,
        count(*) FILTER (WHERE outcome = 'failed') AS failed, count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
        count(*) FILTER (WHERE outcome = 'cancelled') AS cancelled
    FROM jobs WHERE node_id IS NOT NULL GROUP BY node_id
) j USING (node_id)
WHERE t.completed + t.failed + t.rejected + t.cancelled
    > coalesce(j.completed + j.failed + j.rejected + j.cancelled, 0)
"""


def upgrade() -> None:
    """Create the table and the index. Jobs were removed only by a later version, before a downgrade."""
    build_index("jobs_newest_of_model_idx", "jobs (model_id, started_at DESC) INCLUDE (node_owner)")
    for statement in _STATEMENTS.split(";"):
        op.execute(statement)


def downgrade() -> None:
    """Drop both. Totals then include removed jobs, so lists name more jobs than they show."""
    op.execute("DROP INDEX jobs_newest_of_model_idx")
    op.execute("DROP TABLE job_removals")
