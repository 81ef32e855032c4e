"""The job ledger: a row per attempt of a request on a node, and sums by node and minute."""

from __future__ import annotations

from alembic import op

revision = "job_ledger"
down_revision = "registry"
branch_labels = None
depends_on = None

# `job_row` is what a replica sends: see `COMMIT_JOBS`. A type of its own, so that `jobs` may get columns without it.
_STATEMENTS = """
CREATE TABLE jobs (
    id UUID NOT NULL,
    attempt SMALLINT NOT NULL,
    replica_id UUID NOT NULL,
    model_id UUID NOT NULL,
    model_name TEXT NOT NULL,
    node_id UUID,
    node_owner TEXT,
    key_id TEXT NOT NULL,
    consumer TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    is_stream BOOLEAN NOT NULL,
    started_at timestamptz NOT NULL,
    outcome TEXT NOT NULL,
    reason TEXT,
    status SMALLINT,
    first_byte_ms DOUBLE PRECISION,
    latency_ms DOUBLE PRECISION,
    tokens_in BIGINT,
    tokens_out BIGINT,
    are_tokens_counted BOOLEAN NOT NULL,
    price_usd NUMERIC,
    CONSTRAINT jobs_pkey PRIMARY KEY (id, attempt)
);

CREATE INDEX jobs_newest_idx ON jobs (started_at DESC);

CREATE INDEX jobs_newest_of_owner_idx ON jobs (node_owner, started_at DESC);

CREATE INDEX jobs_newest_of_node_idx ON jobs (node_id, started_at DESC);

CREATE INDEX jobs_open_idx ON jobs (outcome, replica_id) WHERE outcome IN ('running', 'lost');

CREATE INDEX jobs_faults_of_owner_idx ON jobs (node_owner, started_at DESC) WHERE outcome <> 'completed';

CREATE INDEX jobs_faults_of_node_idx ON jobs (node_id, started_at DESC) WHERE outcome <> 'completed';

CREATE TABLE job_minutes (
    node_id UUID NOT NULL,
    minute timestamptz NOT NULL,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    latency_ms_sum DOUBLE PRECISION NOT NULL,
    CONSTRAINT job_minutes_pkey PRIMARY KEY (node_id, minute)
) WITH (fillfactor = 50);

CREATE INDEX job_minutes_minute_idx ON job_minutes (minute);

CREATE TABLE job_totals (
    node_id UUID NOT NULL,
    node_owner TEXT,
    completed BIGINT NOT NULL,
    failed BIGINT NOT NULL,
    rejected BIGINT NOT NULL,
    cancelled BIGINT NOT NULL,
    CONSTRAINT job_totals_pkey PRIMARY KEY (node_id)
) WITH (fillfactor = 50);

CREATE TYPE job_row AS (
    id uuid,
    attempt smallint,
    replica_id uuid,
    model_id uuid,
    model_name text,
    node_id uuid,
    node_owner text,
    key_id text,
    consumer text,
    endpoint text,
    is_stream boolean,
    started_us bigint,
    outcome text,
    reason text,
    status smallint,
    first_byte_us bigint,
    latency_us bigint,
    tokens_in bigint,
    tokens_out bigint,
    are_tokens_counted boolean,
    price_usd numeric
)
"""


def upgrade() -> None:
    """Create the ledger's tables, and the type of the rows that replicas send."""
    for statement in _STATEMENTS.split(";"):
        op.execute(statement)


def downgrade() -> None:
    """Drop the ledger with every job: the older version has no tables for them."""
    op.execute("DROP TYPE job_row")
    for name in ("job_totals", "job_minutes", "jobs"):
        op.execute(f"DROP TABLE {name}")
