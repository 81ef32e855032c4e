"""Responses: the secret with which replicas seal the ids of stored responses, made once and never changed."""

from __future__ import annotations

from alembic import op

revision = "responses"
down_revision = "earners"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, with its one row. Each UUID has 122 random bits of Postgres's secure source."""
    op.execute("""
        CREATE TABLE response_secret (
            only_row BOOLEAN NOT NULL DEFAULT true,
            secret BYTEA NOT NULL,
            CONSTRAINT response_secret_pkey PRIMARY KEY (only_row),
            CONSTRAINT response_secret_has_one_row CHECK (only_row)
        )
    """)
    op.execute("""
        INSERT INTO response_secret (secret)
        SELECT sha256(convert_to(concat(gen_random_uuid(), gen_random_uuid(), gen_random_uuid()), 'UTF8'))
    """)


def downgrade() -> None:
    """Drop the table. Clients can't read the responses any more that nodes have stored."""
    op.execute("DROP TABLE response_secret")
