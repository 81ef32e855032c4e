"""Closings: webhooks are claimed one by one, and periods are closed in steps and corrected."""

from __future__ import annotations

from alembic import op

from lucid_compute.postgres.schema import build_index

revision = "closings"
down_revision = "limits"
branch_labels = None
depends_on = None

_OLDER_SECRETS = "ALTER TABLE webhooks ADD COLUMN older_secrets JSONB DEFAULT '[]' NOT NULL"
_INDEXES = {
    "webhook_deliveries_due_idx": "(webhook_id, next_attempt_at, position) WHERE state = 'waiting'",
    "webhook_deliveries_claimed_idx": (
        "(webhook_id, claimed_until) WHERE state = 'waiting' AND claimed_until IS NOT NULL"
    ),
}
_PAYOUTS = """
CREATE TABLE payout_closings (
    period_id UUID NOT NULL,
    starts_on DATE NOT NULL,
    ends_on DATE NOT NULL,
    begun_at timestamptz DEFAULT now() NOT NULL,
    closed_by TEXT NOT NULL,
    is_only BOOLEAN DEFAULT true NOT NULL,
    CONSTRAINT payout_closings_pkey PRIMARY KEY (is_only),
    CONSTRAINT payout_closings_are_one CHECK (is_only)
);

CREATE TABLE payout_corrections (
    id UUID NOT NULL,
    line INTEGER NOT NULL,
    period_id UUID NOT NULL,
    day DATE NOT NULL,
    role TEXT NOT NULL,
    owner TEXT,
    amount_usd NUMERIC NOT NULL,
    reason TEXT NOT NULL,
    created_at timestamptz DEFAULT now() NOT NULL,
    created_by TEXT NOT NULL,
    idempotency_key TEXT,
    body_hash BYTEA,
    CONSTRAINT payout_corrections_pkey PRIMARY KEY (id, line),
    CONSTRAINT payout_corrections_have_owners
        CHECK ((owner IS NULL) = (role = 'protocol') AND role IN ('provider', 'model_owner', 'protocol')),
    CONSTRAINT payout_corrections_change_something CHECK (amount_usd <> 0)
);

CREATE INDEX payout_corrections_day_idx ON payout_corrections (day);

CREATE UNIQUE INDEX payout_corrections_key ON payout_corrections (created_by, idempotency_key, line);

CREATE TRIGGER payout_corrections_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON payout_corrections
    FOR EACH STATEMENT EXECUTE FUNCTION payouts_are_append_only()
"""
_LINES_ARE_OF_CLOSINGS = """
CREATE OR REPLACE FUNCTION payout_period_is_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT period_id FROM added) a LEFT JOIN payout_periods p ON p.id = a.period_id
        WHERE p.xmin IS DISTINCT FROM pg_current_xact_id()::xid
            AND NOT (p.id IS NULL AND EXISTS (SELECT FROM payout_closings c WHERE c.period_id = a.period_id))
    ) THEN
        RAISE EXCEPTION 'closed periods are append-only, and nothing is added to them';
    END IF;
    RETURN NULL;
END $$
"""
_ONE_BY_ONE = """
CREATE FUNCTION payout_period_is_the_one() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM payout_closings WHERE period_id <> NEW.id) THEN
        RAISE EXCEPTION 'another period is being closed';
    END IF;
    RETURN NEW;
END $$
"""
_TRIGGER = """
CREATE TRIGGER payout_periods_are_closed_one_by_one
    BEFORE INSERT ON payout_periods FOR EACH ROW EXECUTE FUNCTION payout_period_is_the_one()
"""

_RECORDS = """
ALTER TABLE record_marks ADD COLUMN hours_part timestamptz, ADD COLUMN days_part timestamptz,
    ADD CONSTRAINT record_marks_keep_parts CHECK (hours_part > hours_until AND days_part > days_until)
"""
_NO_RECORDS = """
DELETE FROM job_hours WHERE bucket >= (SELECT hours_until FROM record_marks);

DELETE FROM gauge_hours WHERE bucket >= (SELECT hours_until FROM record_marks);

DELETE FROM job_days WHERE bucket >= (SELECT days_until FROM record_marks);

DELETE FROM gauge_days WHERE bucket >= (SELECT days_until FROM record_marks);

ALTER TABLE record_marks DROP COLUMN hours_part, DROP COLUMN days_part
"""

_GROWING = ("jobs", "webhook_deliveries", "payout_open", "payout_lines", "job_minutes", "gauge_minutes")
_VACUUMED = [f"autovacuum_{each}_scale_factor" for each in ("vacuum", "vacuum_insert", "analyze")]

_LINES_OF_PERIODS = """
CREATE OR REPLACE FUNCTION payout_period_is_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT period_id FROM added) a LEFT JOIN payout_periods p ON p.id = a.period_id
        WHERE p.xmin IS DISTINCT FROM pg_current_xact_id()::xid
    ) THEN
        RAISE EXCEPTION 'closed periods are append-only, and nothing is added to them';
    END IF;
    RETURN NULL;
END $$
"""
_KEYS = "node_id, day, model_id, node_owner"
_SUMS = "jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"
_ADD = ", ".join(f"{name} = held.{name} + excluded.{name}" for name in _SUMS.split(", "))
# The lines of a period that is being closed become open ones again.
_NO_PAYOUTS = f"""
ALTER TABLE payout_open DISABLE TRIGGER payout_open_is_of_jobs;

ALTER TABLE payout_lines DISABLE TRIGGER payout_lines_is_append_only;

WITH moved AS (DELETE FROM payout_lines WHERE period_id IN (SELECT period_id FROM payout_closings) RETURNING *)
INSERT INTO payout_open AS held ({_KEYS}, {_SUMS}) SELECT {_KEYS}, {_SUMS} FROM moved
ON CONFLICT ({_KEYS}) DO UPDATE SET {_ADD};

ALTER TABLE payout_lines ENABLE TRIGGER payout_lines_is_append_only;

ALTER TABLE payout_open ENABLE TRIGGER payout_open_is_of_jobs;

DROP TRIGGER payout_periods_are_closed_one_by_one ON payout_periods;

DROP FUNCTION payout_period_is_the_one();

DROP TABLE payout_corrections;

DROP TABLE payout_closings
"""
_NO_WEBHOOKS = """
DROP INDEX webhook_deliveries_claimed_idx;

DROP INDEX webhook_deliveries_due_idx;

ALTER TABLE webhooks DROP COLUMN older_secrets
"""


def upgrade() -> None:
    """Add what is new. The indexes come first, as the outbox may be long and is written all the time."""
    for name, columns in _INDEXES.items():
        build_index(name, f"webhook_deliveries {columns}")
    tables = (_OLDER_SECRETS, *_PAYOUTS.split(";"), _RECORDS)
    for statement in (*tables, _LINES_ARE_OF_CLOSINGS, _ONE_BY_ONE, _TRIGGER):
        op.execute(statement)
    for table in _GROWING:
        op.execute(f"ALTER TABLE {table} SET ({', '.join(f'{name} = 0.01' for name in _VACUUMED)})")


def downgrade() -> None:
    """Drop it, corrections as well."""
    for table in _GROWING:
        op.execute(f"ALTER TABLE {table} RESET ({', '.join(_VACUUMED)})")
    for statement in (*_NO_RECORDS.split(";"), *_NO_PAYOUTS.split(";"), _LINES_OF_PERIODS, *_NO_WEBHOOKS.split(";")):
        op.execute(statement)
