"""Revenue: bills by day, node and model, closed periods that cannot be changed, and terms of splitting."""

from __future__ import annotations

from alembic import op

revision = "revenue"
down_revision = "signals"
branch_labels = None
depends_on = None

_SUMS = """
    jobs BIGINT NOT NULL,
    tokens_in BIGINT NOT NULL,
    tokens_out BIGINT NOT NULL,
    gross_usd NUMERIC NOT NULL,
    model_owner_usd NUMERIC NOT NULL,
    protocol_usd NUMERIC NOT NULL,
"""
_KEYS = """
    node_id UUID NOT NULL,
    day DATE NOT NULL,
    model_id UUID NOT NULL,
    node_owner TEXT NOT NULL,
"""
_STATEMENTS = f"""
CREATE TABLE payout_open (
    {_KEYS} {_SUMS}
    CONSTRAINT payout_open_pkey PRIMARY KEY (node_id, day, model_id, node_owner)
) WITH (fillfactor = 50);

CREATE TABLE payout_periods (
    id UUID NOT NULL,
    starts_on DATE NOT NULL,
    ends_on DATE NOT NULL,
    closed_at timestamptz DEFAULT now() NOT NULL,
    closed_by TEXT NOT NULL,
    CONSTRAINT payout_periods_pkey PRIMARY KEY (id),
    CONSTRAINT payout_periods_have_days CHECK (starts_on < ends_on)
);

CREATE UNIQUE INDEX payout_periods_start_key ON payout_periods (starts_on);

CREATE UNIQUE INDEX payout_periods_end_key ON payout_periods (ends_on);

CREATE TABLE payout_lines (
    period_id UUID NOT NULL,
    {_KEYS} {_SUMS}
    node_name TEXT NOT NULL,
    model_name TEXT NOT NULL,
    model_owner TEXT,
    CONSTRAINT payout_lines_pkey PRIMARY KEY (period_id, node_id, day, model_id, node_owner)
);

CREATE INDEX payout_lines_day_idx ON payout_lines (day);

CREATE INDEX payout_lines_provider_idx ON payout_lines (node_owner, day);

CREATE INDEX payout_lines_model_owner_idx ON payout_lines (model_owner, day);

CREATE TABLE payout_terms (
    since timestamptz DEFAULT now() NOT NULL,
    provider_bps INTEGER NOT NULL,
    model_owner_bps INTEGER NOT NULL,
    protocol_bps INTEGER NOT NULL,
    CONSTRAINT payout_terms_pkey PRIMARY KEY (since),
    CONSTRAINT payout_terms_are_whole CHECK (provider_bps + model_owner_bps + protocol_bps = 10000)
);

INSERT INTO payout_terms VALUES (timestamptz 'epoch', 7000, 2000, 1000)
"""

# What the ledger holds already, as if it had been written with its lines: see `BILL_JOBS`.
_TAKE_IN_THE_LEDGER = """
INSERT INTO payout_open
SELECT node_id, (started_at AT TIME ZONE 'UTC')::date, model_id, coalesce(node_owner, ''),
    count(*), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0), sum(price_usd),
    sum(trunc(price_usd * 2000 * 0.0001, 12)), sum(trunc(price_usd * 1000 * 0.0001, 12))
FROM jobs
WHERE price_usd IS NOT NULL AND node_id IS NOT NULL AND outcome NOT IN ('running', 'lost')
GROUP BY 1, 2, 3, 4
"""

_NO_CHANGES = """
CREATE FUNCTION payouts_are_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'closed periods and terms are append-only';
END $$
"""
_FROZEN = ("payout_periods", "payout_lines", "payout_terms")


def upgrade() -> None:
    """Create the tables, bill the jobs in the ledger, and refuse changes of closed periods."""
    for statement in _STATEMENTS.split(";"):
        op.execute(statement)
    op.execute(_TAKE_IN_THE_LEDGER)
    op.execute(_NO_CHANGES)
    for table in _FROZEN:
        op.execute(
            f"CREATE TRIGGER {table}_is_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
            "FOR EACH STATEMENT EXECUTE FUNCTION payouts_are_append_only()"
        )


def downgrade() -> None:
    """Drop all of it, including closed periods: dump `payout_periods` and `payout_lines` first."""
    for table in (*_FROZEN, "payout_open"):
        op.execute(f"DROP TABLE {table}")
    op.execute("DROP FUNCTION payouts_are_append_only()")
