"""Settled: trigger functions find their tables whatever a session's search_path is, as in COPY of a dump."""

from __future__ import annotations

from alembic import op

revision = "settled"
down_revision = "closings"
branch_labels = None
depends_on = None

_FUNCTIONS = (
    "audit_log_is_append_only",
    "audit_rows_are_kept",
    "jobs_are_billed",
    "payout_lines_are_of_jobs",
    "payout_period_is_open",
    "payout_period_is_the_one",
    "payouts_are_append_only",
)
# The schema that the tables are in. A session's temporary tables come last: they must not stand in for ours.
_SET = """
DO $$ BEGIN
    EXECUTE format('ALTER FUNCTION {name}() SET search_path = %I, pg_temp', current_schema());
END $$
"""


def upgrade() -> None:
    """Give each function a search path of its own. Calls under way keep theirs; no table is locked."""
    for name in _FUNCTIONS:
        op.execute(_SET.format(name=name))


def downgrade() -> None:
    """Have the functions use their sessions' search path again."""
    for name in _FUNCTIONS:
        op.execute(f"ALTER FUNCTION {name}() RESET search_path")
