"""Limits: rows of the audit trail may be deleted when they are old, by the service's own retention only."""

from __future__ import annotations

from alembic import op

revision = "limits"
down_revision = "refused"
branch_labels = None
depends_on = None

# The retention sets `lucid.retention` for its transaction. The floor of 30 days holds for it as well.
_MAY_BE_DELETED = """
CREATE FUNCTION audit_rows_are_kept() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF OLD.at < now() - interval '30 days' AND current_setting('lucid.retention', true) = 'on' THEN
        RETURN OLD;
    END IF;
    RAISE EXCEPTION 'the audit trail is append-only';
END $$
"""
_STATEMENT = "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_is_append_only()"


def upgrade() -> None:
    """Let old rows be deleted one by one; refuse all other changes as before."""
    op.execute(_MAY_BE_DELETED)
    op.execute("DROP TRIGGER audit_log_is_append_only ON audit_log")
    op.execute(f"CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR TRUNCATE ON audit_log {_STATEMENT}")
    op.execute(
        "CREATE TRIGGER audit_rows_are_kept BEFORE DELETE ON audit_log "
        "FOR EACH ROW EXECUTE FUNCTION audit_rows_are_kept()"
    )


def downgrade() -> None:
    """Refuse every change."""
    op.execute("DROP TRIGGER audit_rows_are_kept ON audit_log")
    op.execute("DROP TRIGGER audit_log_is_append_only ON audit_log")
    op.execute(f"CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log {_STATEMENT}")
    op.execute("DROP FUNCTION audit_rows_are_kept()")
