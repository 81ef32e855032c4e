"""Refused: requests that no node was asked for, by the hour, cause, who asked and model."""

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
    """Keep them from now on."""
    op.execute(_UP)


def downgrade() -> None:
    """Forget them."""
    op.execute("DROP TABLE refusals")
