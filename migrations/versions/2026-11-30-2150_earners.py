"""Earners: open lines are found by the node's owner and by model, so that a report reads its owner's lines alone."""

from __future__ import annotations

from alembic import op

from lucid_compute.postgres.schema import build_index

revision = "earners"
down_revision = "events"
branch_labels = None
depends_on = None

_INDEXES = {
    "payout_open_provider_idx": "payout_open (node_owner, day)",
    "payout_open_model_idx": "payout_open (model_id, day)",
}


def upgrade() -> None:
    """Build the indexes beside the writers."""
    for name, columns in _INDEXES.items():
        build_index(name, columns)


def downgrade() -> None:
    """Drop them."""
    for name in _INDEXES:
        op.execute(f"DROP INDEX {name}")
