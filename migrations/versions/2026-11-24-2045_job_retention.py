"""Job retention: counts of removed jobs by node, and an index on the jobs of a model."""

from __future__ import annotations

from alembic import op

revision = "job_retention"
down_revision = "records"
branch_labels = None
depends_on = None

# While the index is built jobs can't be written; they wait in their replicas, as when the database is away.
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

CREATE INDEX jobs_newest_of_model_idx ON jobs (model_id, started_at DESC) INCLUDE (node_owner)
"""


def upgrade() -> None:
    """Create the table, empty because no job was removed yet, and the index."""
    for statement in _STATEMENTS.split(";"):
        op.execute(statement)


def downgrade() -> None:
    """Drop both. Totals then include removed jobs, so lists name more jobs than they show."""
    op.execute("DROP INDEX jobs_newest_of_model_idx")
    op.execute("DROP TABLE job_removals")
