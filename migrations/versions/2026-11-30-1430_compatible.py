"""Compatible: the oldest revision whose replicas can still serve, so that they stay ready while newer ones roll out."""

from __future__ import annotations

from alembic import op

revision = "compatible"
down_revision = "refused"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the table, with its one row."""
    op.execute("""
        CREATE TABLE schema_compatibility (
            only_row BOOLEAN NOT NULL DEFAULT true,
            oldest_revision TEXT NOT NULL,
            CONSTRAINT schema_compatibility_pkey PRIMARY KEY (only_row),
            CONSTRAINT schema_compatibility_has_one_row CHECK (only_row)
        )
    """)
    op.execute("INSERT INTO schema_compatibility (oldest_revision) VALUES ('compatible')")


def downgrade() -> None:
    """Drop the table."""
    op.execute("DROP TABLE schema_compatibility")
