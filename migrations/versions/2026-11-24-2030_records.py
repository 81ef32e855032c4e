"""Records: jobs and heartbeats by minute, hour and day, and the states that nodes were in."""

from __future__ import annotations

from alembic import op

revision = "records"
down_revision = "job_ledger"
branch_labels = None
depends_on = None

_GAUGES = (
    "load",
    "queue_depth",
    "in_flight",
    "reported_in_flight",
    "gpu_utilization",
    "gpu_memory_used_mb",
    "gpu_memory_total_mb",
)
_UPSTREAM = "00000000-0000-0000-0000-000000000000"
_TIERS = ("minutes", "hours", "days")

_STATEMENTS = """
CREATE TABLE gauge_flushes (
    replica_id UUID NOT NULL,
    number BIGINT NOT NULL,
    at timestamptz DEFAULT now() NOT NULL,
    CONSTRAINT gauge_flushes_pkey PRIMARY KEY (replica_id)
);

CREATE TABLE record_marks (
    is_only BOOLEAN DEFAULT true NOT NULL,
    began_at timestamptz NOT NULL,
    hours_until timestamptz NOT NULL,
    days_until timestamptz NOT NULL,
    CONSTRAINT record_marks_pkey PRIMARY KEY (is_only)
);

CREATE TABLE node_states (
    node_id UUID NOT NULL,
    since timestamptz NOT NULL,
    state TEXT NOT NULL,
    owner TEXT NOT NULL,
    CONSTRAINT node_states_pkey PRIMARY KEY (node_id, since)
);

CREATE INDEX node_states_since_idx ON node_states (since);

DROP TABLE job_minutes
"""

# What the ledger holds already, as if it had been written with its records: see `ENDED_JOB`.
_TAKE_IN_THE_LEDGER = f"""
INSERT INTO job_open
SELECT node_id, bucket, model_id, node_owner, min(completed), min(failed), min(rejected), min(cancelled), min(priced),
    min(latency_us), min(first_byte_us), min(tokens_in), min(tokens_out), min(revenue_usd),
    array_agg(place << 22 | least(n, 4194303)::integer) FILTER (WHERE place IS NOT NULL),
    jsonb_object_agg(fault, n) FILTER (WHERE fault IS NOT NULL)
FROM (
    WITH ended AS (
        SELECT coalesce(node_id, '{_UPSTREAM}') AS node_id, date_trunc('minute', started_at) AS bucket, model_id,
            coalesce(node_owner, '') AS node_owner, outcome, reason, latency_ms, first_byte_ms, tokens_in, tokens_out,
            price_usd
        FROM jobs WHERE outcome NOT IN ('running', 'lost')
    ), sums AS (
        SELECT node_id, bucket, model_id, node_owner,
            count(*) FILTER (WHERE outcome = 'completed') AS completed,
            count(*) FILTER (WHERE outcome = 'failed') AS failed,
            count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
            count(*) FILTER (WHERE outcome = 'cancelled') AS cancelled,
            count(price_usd) AS priced,
            sum(round(latency_ms * 1000)::bigint) FILTER (WHERE outcome = 'completed') AS latency_us,
            sum(round(first_byte_ms * 1000)::bigint) FILTER (WHERE outcome = 'completed') AS first_byte_us,
            sum(tokens_in) AS tokens_in, sum(tokens_out) AS tokens_out, sum(price_usd) AS revenue_usd
        FROM ended GROUP BY 1, 2, 3, 4
    ), details AS (
        SELECT node_id, bucket, model_id, node_owner, NULL::integer AS place,
            outcome || ':' || coalesce(reason, 'unknown') AS fault, count(*) AS n
        FROM ended WHERE outcome <> 'completed' GROUP BY 1, 2, 3, 4, 6
        UNION ALL
        SELECT node_id, bucket, model_id, node_owner,
            kind * 256 + CASE WHEN ms > 0.1 THEN least(ceil(ln(ms / 0.1) / ln(1.1::float8)), 255)::integer ELSE 0 END,
            NULL, count(*)
        FROM ended, LATERAL (VALUES (0, latency_ms), (1, first_byte_ms)) AS m (kind, ms)
        WHERE outcome = 'completed' AND ms IS NOT NULL GROUP BY 1, 2, 3, 4, 5
    )
    SELECT * FROM sums LEFT JOIN details USING (node_id, bucket, model_id, node_owner)
) AS whole
GROUP BY node_id, bucket, model_id, node_owner
"""
_BEGIN = """
INSERT INTO record_marks (began_at, hours_until, days_until)
SELECT at, date_trunc('hour', at), date_trunc('day', at)
FROM (SELECT coalesce(min(started_at), now()) AS at FROM jobs) began
"""
_BACK = (
    """
    CREATE TABLE job_minutes (
        node_id UUID NOT NULL,
        minute timestamptz NOT NULL,
        completed BIGINT NOT NULL,
        failed BIGINT NOT NULL,
        latency_ms_sum DOUBLE PRECISION NOT NULL,
        CONSTRAINT job_minutes_pkey PRIMARY KEY (node_id, minute)
    ) WITH (fillfactor = 50)
    """,
    "CREATE INDEX job_minutes_minute_idx ON job_minutes (minute)",
    """
    INSERT INTO job_minutes
    SELECT node_id, date_trunc('minute', started_at), count(*) FILTER (WHERE outcome = 'completed'),
        count(*) FILTER (WHERE outcome = 'failed'),
        coalesce(sum(latency_ms) FILTER (WHERE outcome = 'completed'), 0)
    FROM jobs
    WHERE node_id IS NOT NULL AND outcome IN ('completed', 'failed') AND started_at > now() - interval '24 hours'
    GROUP BY 1, 2
    """,
)


def _job_table(tier: str, count: str, element: str, keys: str, options: str) -> str:
    columns = "".join(f"{key}, " for key in keys.split(", "))
    names = ", ".join(key.split()[0] for key in keys.split(", "))
    return f"""
        CREATE TABLE job_{tier} (
            {columns}
            completed {count} NOT NULL, failed {count} NOT NULL, rejected {count} NOT NULL, cancelled {count} NOT NULL,
            priced {count} NOT NULL, latency_us BIGINT, first_byte_us BIGINT, tokens_in BIGINT, tokens_out BIGINT,
            revenue_usd NUMERIC, spread {element}[], faults JSONB,
            CONSTRAINT job_{tier}_pkey PRIMARY KEY ({names})
        ) {options}
    """


def _gauge_table(tier: str, count: str, total: str, keys: str, options: str) -> str:
    sums = "".join(f"{name}_sum {total}, " for name in _GAUGES)
    highest = "".join(f"{name}_max REAL, " for name in _GAUGES)
    counts = "".join(f"{name}_count {count}, " for name in _GAUGES)
    primary = ", ".join(key.split()[0] for key in keys.split(", ")[:2])
    return f"""
        CREATE TABLE gauge_{tier} (
            {keys}, samples {count} NOT NULL, {sums} {highest} {counts}
            CONSTRAINT gauge_{tier}_pkey PRIMARY KEY ({primary})
        ) {options}
    """


def upgrade() -> None:
    """Create the tables, fill them from the ledger, and drop the previous sums by minute."""
    for statement in _STATEMENTS.split(";"):
        op.execute(statement)
    in_place = "WITH (fillfactor = 50)"
    node, bucket, scope = "node_id UUID NOT NULL", "bucket timestamptz NOT NULL", "scope_id UUID NOT NULL"
    model, owner = "model_id UUID NOT NULL", "node_owner TEXT NOT NULL"
    op.execute(_job_table("open", "INTEGER", "INTEGER", f"{node}, {bucket}, {model}, {owner}", in_place))
    op.execute(_gauge_table("open", "INTEGER", "REAL", f"{node}, {bucket}, {owner}", in_place))
    for tier in _TIERS:
        count = "INTEGER" if tier == "minutes" else "BIGINT"
        total = "REAL" if tier == "minutes" else "DOUBLE PRECISION"
        op.execute(_job_table(tier, count, count, f"{bucket}, {scope}, {model}", ""))
        op.execute(_gauge_table(tier, count, total, f"{bucket}, {scope}", ""))
    op.execute(_TAKE_IN_THE_LEDGER)
    op.execute(_BEGIN)


def downgrade() -> None:
    """Drop the records, for which the older version has no tables, and recreate the sums by minute."""
    tables = [f"{kind}_{tier}" for kind in ("job", "gauge") for tier in ("open", *_TIERS)]
    for name in (*tables, "gauge_flushes", "record_marks", "node_states"):
        op.execute(f"DROP TABLE {name}")
    for statement in _BACK:
        op.execute(statement)
