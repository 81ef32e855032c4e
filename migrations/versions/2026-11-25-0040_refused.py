"""Refused: requests refused before a node was asked, by hour, cause, owner and model."""

from __future__ import annotations

from alembic import op

revision = "refused"
down_revision = "hooks"
branch_labels = None
depends_on = None

_UP = """
CREATE TABLE refusals (
    hour timestamptz NOT NULL,
    consumer TEXT NOT NULL,
    model_id UUID NOT NULL,
    cause TEXT NOT NULL,
    requests BIGINT NOT NULL,
    CONSTRAINT refusals_pkey PRIMARY KEY (hour, consumer, model_id, cause)
) WITH (fillfactor = 50)
"""


def upgrade() -> None:
    """Create the table."""
    op.execute(_UP)


def downgrade() -> None:
    """Drop the table."""
    op.execute("DROP TABLE refusals")
