"""Closings: webhooks are claimed one by one, and periods are closed in steps and corrected."""

from __future__ import annotations

from alembic import op

revision = "closings"
down_revision = "refused"
branch_labels = None
depends_on = None

_WEBHOOKS = """
ALTER TABLE webhooks ADD COLUMN older_secrets JSONB DEFAULT '[]' NOT NULL;

CREATE INDEX webhook_deliveries_due_idx ON webhook_deliveries (webhook_id, next_attempt_at, position)
    WHERE state = 'waiting';

CREATE INDEX webhook_deliveries_claimed_idx ON webhook_deliveries (webhook_id, claimed_until)
    WHERE state = 'waiting' AND claimed_until IS NOT NULL
"""
_NO_WEBHOOKS = """
DROP INDEX webhook_deliveries_claimed_idx;

DROP INDEX webhook_deliveries_due_idx;

ALTER TABLE webhooks DROP COLUMN older_secrets
"""


def upgrade() -> None:
    """Add what is new."""
    for statement in _WEBHOOKS.split(";"):
        op.execute(statement)


def downgrade() -> None:
    """Drop it."""
    for statement in _NO_WEBHOOKS.split(";"):
        op.execute(statement)
