"""The statements of the job ledger: rows get in with their sums, a dead replica's are closed, sums are read."""

from __future__ import annotations

from lucid_compute.accounting.measured import BUCKETS, FIRST_MS, GROWTH
from lucid_compute.accounting.rollup_columns import JOB_COLUMNS, NARROW, UPSTREAM, add_to_held, add_up, names

# The buckets of `latency_histogram`; what is measured stands before it, 0 for latency and 1 for the first byte.
_ELEMENT = f"""
    CASE WHEN {{ms}} IS NOT NULL THEN ({{kind}} * {BUCKETS} + CASE WHEN {{ms}} > {FIRST_MS}
        THEN least(ceil(ln({{ms}} / {FIRST_MS}) / ln({GROWTH}::float8)), {BUCKETS - 1})::integer ELSE 0
    END) << {NARROW.bits} | 1 END"""
_SPREAD = ", ".join(_ELEMENT.format(kind=kind, ms=ms) for kind, ms in enumerate(("latency_ms", "first_byte_ms")))

# Of one job that ended, what the record of its minute gets.
ENDED_JOB = f"""
    SELECT date_trunc('minute', started_at) AS bucket, coalesce(node_id, '{UPSTREAM}') AS node_id, model_id,
        coalesce(node_owner, '') AS node_owner,
        (outcome = 'completed')::integer AS completed, (outcome = 'failed')::integer AS failed,
        (outcome = 'rejected')::integer AS rejected, (outcome = 'cancelled')::integer AS cancelled,
        (price_usd IS NOT NULL)::integer AS priced,
        CASE WHEN outcome = 'completed' THEN round(latency_ms * 1000)::bigint END AS latency_us,
        CASE WHEN outcome = 'completed' THEN round(first_byte_ms * 1000)::bigint END AS first_byte_us,
        tokens_in, tokens_out, price_usd AS revenue_usd,
        CASE WHEN outcome = 'completed' THEN array_remove(ARRAY[{_SPREAD}], NULL) END AS spread,
        CASE WHEN outcome <> 'completed' THEN jsonb_build_object(outcome || ':' || coalesce(reason, 'unknown'), 1) END
            AS faults
    FROM {{written}} WHERE outcome NOT IN ('running', 'lost')
"""

# $1 the rows, as the text of an array of `job_row`: one f-string a job builds it, where COPY cost this process 1.25
# times and arrays of columns twice the time (docs/adr/0011-job-ledger.md). Instants and durations are microseconds.
#
# A job is written as running, then again when it ended; a batch whose commit is in doubt is written again as it was.
# A row is changed only out of `running` and `lost`, and the sums are taken of the rows that this very statement wrote:
# so nothing counts twice, and rows and sums are always together. `lost` is a guess, and the true outcome wins.
# Sums are taken in the order of node ids, so that replicas wait for one another and never in a circle.
# `job_open` holds the minutes that are not moved yet (docs/adr/0012-records.md); its rows are few and updated in place.
# Whoever writes a job bills it: a trigger of `jobs` adds it to `payout_open` (docs/adr/0015-payouts.md).
COMMIT_JOBS = f"""
WITH written AS (
    INSERT INTO jobs AS held (
        id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint, is_stream,
        started_at, outcome, reason, status, first_byte_ms, latency_ms, tokens_in, tokens_out, are_tokens_counted,
        price_usd
    )
    SELECT id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint, is_stream,
        timestamptz 'epoch' + started_us * interval '1 microsecond', outcome, reason, status,
        first_byte_us / 1000.0::float8, latency_us / 1000.0::float8, tokens_in, tokens_out, are_tokens_counted,
        price_usd
    FROM unnest($1::text::job_row[])
    ON CONFLICT (id, attempt) DO UPDATE SET
        outcome = excluded.outcome, reason = excluded.reason, status = excluded.status,
        first_byte_ms = excluded.first_byte_ms, latency_ms = excluded.latency_ms,
        tokens_in = excluded.tokens_in, tokens_out = excluded.tokens_out,
        are_tokens_counted = excluded.are_tokens_counted, price_usd = excluded.price_usd
    WHERE held.outcome IN ('running', 'lost') AND excluded.outcome NOT IN ('running', 'lost')
    RETURNING node_id, node_owner, model_id, started_at, outcome, reason, latency_ms, first_byte_ms, tokens_in,
        tokens_out, price_usd
), ended AS ({ENDED_JOB.format(written="written")}),
{add_up(JOB_COLUMNS, "bucket, node_id, model_id, node_owner", source="ended", into="summed", from_=NARROW, to=NARROW)},
opened AS (
    INSERT INTO job_open AS held (bucket, node_id, model_id, node_owner, {names(JOB_COLUMNS)})
    SELECT bucket, node_id, model_id, node_owner, {names(JOB_COLUMNS)} FROM summed
    ORDER BY node_id, bucket, model_id, node_owner
    ON CONFLICT (node_id, bucket, model_id, node_owner) DO UPDATE SET {add_to_held(JOB_COLUMNS, NARROW)}
)
INSERT INTO job_totals AS held (node_id, node_owner, completed, failed, rejected, cancelled)
SELECT node_id, min(node_owner), sum(completed), sum(failed), sum(rejected), sum(cancelled)
FROM summed WHERE node_id <> '{UPSTREAM}' GROUP BY node_id ORDER BY node_id
ON CONFLICT (node_id) DO UPDATE SET
    completed = held.completed + excluded.completed, failed = held.failed + excluded.failed,
    rejected = held.rejected + excluded.rejected, cancelled = held.cancelled + excluded.cancelled
"""

LOST_AFTER_SECONDS = 60
"""How long a replica must have been silent before what it ran counts as lost; its lease ended long before."""

# None is closed while no replica can write, nor until all had the same minute to come back after that: an outage is
# recorded in the statement that ends it, so a replica that was heard of just now has recorded it.
MARK_LOST = f"""
UPDATE jobs SET outcome = 'lost' WHERE (id, attempt) IN (
    SELECT id, attempt FROM jobs j
    WHERE outcome = 'running' AND started_at < now() - interval '{LOST_AFTER_SECONDS} seconds'
        AND NOT EXISTS (
            SELECT FROM replicas r
            WHERE r.id = j.replica_id AND r.seen_at > now() - interval '{LOST_AFTER_SECONDS} seconds'
        )
        AND EXISTS (SELECT FROM replicas WHERE seen_at > now() - interval '3 seconds')
        AND NOT EXISTS (SELECT FROM outages WHERE ended_at > now() - interval '{LOST_AFTER_SECONDS} seconds')
    LIMIT 5000 FOR UPDATE SKIP LOCKED
)
"""

# Of each node of :ids, in one look for a page of a list. The last hour is 60 whole minutes and the one that runs. Each
# minute is looked up by its key (OFFSET keeps the lookup one): records stand in the order of time, not of nodes.
STATISTICS = """
SELECT n.id::text, coalesce(t.completed, 0) AS jobs_completed, h.completed, h.failed, h.latency_us
FROM unnest(CAST(:ids AS uuid[])) AS n (id)
LEFT JOIN job_totals t ON t.node_id = n.id
LEFT JOIN LATERAL (
    SELECT sum(completed)::int8 AS completed, sum(failed)::int8 AS failed, sum(latency_us)::int8 AS latency_us
    FROM (
        SELECT completed, failed, latency_us FROM job_open
        WHERE node_id = n.id AND bucket >= date_trunc('minute', now()) - interval '1 hour'
        UNION ALL
        SELECT m.* FROM generate_series(0, 60) AS ago, LATERAL (
            SELECT completed, failed, latency_us FROM job_minutes
            WHERE bucket = date_trunc('minute', now()) - ago * interval '1 minute' AND scope_id = n.id OFFSET 0
        ) m
    ) minutes
) h ON true
"""
