"""Limits: replicas share the limits of keys, and old rows of the audit trail may be deleted by the retention."""

from __future__ import annotations

from alembic import op

revision = "limits"
down_revision = "compatible"
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
_SHARES = """
CREATE UNLOGGED TABLE key_shares (
    key_id TEXT NOT NULL,
    unit TEXT NOT NULL,
    shares JSONB DEFAULT '{}' NOT NULL,
    changed_at timestamptz DEFAULT now() NOT NULL,
    CONSTRAINT key_shares_pkey PRIMARY KEY (key_id, unit)
) WITH (fillfactor = 50)
"""
# Shares are counted for a minute after they were confirmed. `used` is spent already, and so is held in any case.
_SHARE_OUT = """
CREATE FUNCTION share_out_limits(
    replica text, keys text[], units text[], most int8[], used int8[], wanted int8[], free_in float8[]
) RETURNS TABLE (granted int8, elsewhere int8, free_in_seconds float8) LANGUAGE plpgsql AS $$
DECLARE
    held jsonb;
    instant float8;
BEGIN
    FOR i IN 1 .. coalesce(array_length(keys, 1), 0) LOOP
        INSERT INTO key_shares AS s (key_id, unit) VALUES (keys[i], units[i])
            ON CONFLICT (key_id, unit) DO UPDATE SET changed_at = clock_timestamp() RETURNING s.shares INTO held;
        instant := extract(epoch FROM clock_timestamp());
        SELECT coalesce(jsonb_object_agg(o.key, o.value), '{}'), coalesce(sum((o.value->>'share')::int8), 0),
            min((o.value->>'freeAt')::float8) FILTER (WHERE (o.value->>'freeAt')::float8 > instant) - instant
            INTO held, elsewhere, free_in_seconds
            FROM jsonb_each(held) o WHERE o.key <> replica AND (o.value->>'at')::float8 > instant - 60;
        granted := greatest(used[i], least(wanted[i], most[i] - elsewhere));
        IF granted > 0 THEN
            held := held || jsonb_build_object(replica, jsonb_build_object(
                'share', granted, 'at', instant, 'freeAt', instant + free_in[i]
            ));
        END IF;
        UPDATE key_shares s SET shares = held WHERE s.key_id = keys[i] AND s.unit = units[i];
        RETURN NEXT;
    END LOOP;
END $$
"""
_STATEMENT = "FOR EACH STATEMENT EXECUTE FUNCTION audit_log_is_append_only()"


def upgrade() -> None:
    """Create the shares. Let old audit rows be deleted one by one, and refuse all other changes as before."""
    op.execute(_SHARES)
    op.execute(_SHARE_OUT)
    op.execute(_MAY_BE_DELETED)
    op.execute("DROP TRIGGER audit_log_is_append_only ON audit_log")
    op.execute(f"CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR TRUNCATE ON audit_log {_STATEMENT}")
    op.execute(
        "CREATE TRIGGER audit_rows_are_kept BEFORE DELETE ON audit_log "
        "FOR EACH ROW EXECUTE FUNCTION audit_rows_are_kept()"
    )


def downgrade() -> None:
    """Refuse every change of the audit trail; each replica counts limits on its own again."""
    op.execute("DROP TRIGGER audit_rows_are_kept ON audit_log")
    op.execute("DROP TRIGGER audit_log_is_append_only ON audit_log")
    op.execute(f"CREATE TRIGGER audit_log_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON audit_log {_STATEMENT}")
    op.execute("DROP FUNCTION audit_rows_are_kept()")
    op.execute("DROP FUNCTION share_out_limits(text, text[], text[], int8[], int8[], int8[], float8[])")
    op.execute("DROP TABLE key_shares")
