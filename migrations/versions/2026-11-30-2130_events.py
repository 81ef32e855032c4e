"""An index for the events of all nodes, newest first."""

from __future__ import annotations

from alembic import op

from lucid_compute.postgres.schema import build_index

revision = "events"
down_revision = "usage"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Build the index while replicas write."""
    build_index("node_events_at_idx", "node_events (at DESC, id DESC)")


def downgrade() -> None:
    """Drop the index."""
    op.execute("DROP INDEX node_events_at_idx")
