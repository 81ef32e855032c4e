"""Hooks: webhooks for nodes of all owners, for several nodes, and with a secret under rotation."""

from __future__ import annotations

from alembic import op

revision = "hooks"
down_revision = "money"
branch_labels = None
depends_on = None

_UP = """
ALTER TABLE webhooks
    ADD COLUMN all_owners BOOLEAN DEFAULT false NOT NULL,
    ADD COLUMN passport_ids UUID[],
    ADD COLUMN former_secret TEXT,
    ADD COLUMN former_secret_until timestamptz;

UPDATE webhooks SET passport_ids = ARRAY[passport_id] WHERE passport_id IS NOT NULL;

ALTER TABLE webhooks DROP COLUMN passport_id;

CREATE INDEX webhooks_all_owners_idx ON webhooks (id) WHERE all_owners
"""
_DOWN = """
ALTER TABLE webhooks ADD COLUMN passport_id UUID CONSTRAINT webhooks_passport_id_fkey REFERENCES passports (id);

DELETE FROM webhooks WHERE all_owners OR cardinality(passport_ids) > 1;

UPDATE webhooks SET passport_id = passport_ids[1] WHERE passport_ids IS NOT NULL;

DROP INDEX webhooks_all_owners_idx;

ALTER TABLE webhooks DROP COLUMN all_owners, DROP COLUMN passport_ids, DROP COLUMN former_secret,
    DROP COLUMN former_secret_until
"""


def upgrade() -> None:
    """Add the columns. `passport_id` is dropped at once, because no release had it."""
    for statement in _UP.split(";"):
        op.execute(statement)


def downgrade() -> None:
    """Drop the columns; webhooks that the older version cannot express are deleted."""
    for statement in _DOWN.split(";"):
        op.execute(statement)
