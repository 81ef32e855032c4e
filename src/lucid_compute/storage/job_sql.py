"""The statements of the job ledger: rows get in with their sums, a dead replica's are closed, sums are read."""

# $1 the rows, as the text of an array of `job_row`: one f-string a job builds it, where COPY cost this process 1.25
# times and arrays of columns twice the time (docs/adr/0011-job-ledger.md). Instants and durations are microseconds.
#
# A job is written as running, then again when it ended; a batch whose commit is in doubt is written again as it was.
# A row is changed only out of `running` and `lost`, and the sums are taken of the rows that this very statement wrote:
# so nothing counts twice, and rows and sums are always together. `lost` is a guess, and the true outcome wins.
# Sums are taken in the order of node ids, so that replicas wait for one another and never in a circle.
COMMIT_JOBS = """
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
    RETURNING node_id, node_owner, started_at, outcome, latency_ms
), counted AS (
    SELECT node_id, min(node_owner) AS node_owner, date_trunc('minute', started_at) AS minute,
        count(*) FILTER (WHERE outcome = 'completed') AS completed,
        count(*) FILTER (WHERE outcome = 'failed') AS failed,
        count(*) FILTER (WHERE outcome = 'rejected') AS rejected,
        count(*) FILTER (WHERE outcome = 'cancelled') AS cancelled,
        coalesce(sum(latency_ms) FILTER (WHERE outcome = 'completed'), 0) AS latency_ms_sum
    FROM written WHERE node_id IS NOT NULL AND outcome NOT IN ('running', 'lost')
    GROUP BY 1, 3
), minutes AS (
    INSERT INTO job_minutes AS held (node_id, minute, completed, failed, latency_ms_sum)
    SELECT node_id, minute, completed, failed, latency_ms_sum FROM counted WHERE completed + failed > 0
    ORDER BY node_id, minute
    ON CONFLICT (node_id, minute) DO UPDATE SET
        completed = held.completed + excluded.completed, failed = held.failed + excluded.failed,
        latency_ms_sum = held.latency_ms_sum + excluded.latency_ms_sum
)
INSERT INTO job_totals AS held (node_id, node_owner, completed, failed, rejected, cancelled)
SELECT node_id, min(node_owner), sum(completed), sum(failed), sum(rejected), sum(cancelled)
FROM counted GROUP BY node_id ORDER BY node_id
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

# Of each node of :ids, in one look for a page of a list. The last hour is 60 whole minutes and the one that runs.
STATISTICS = """
SELECT n.id::text, coalesce(t.completed, 0) AS jobs_completed, h.completed, h.failed, h.latency_ms_sum
FROM unnest(CAST(:ids AS uuid[])) AS n (id)
LEFT JOIN job_totals t ON t.node_id = n.id
LEFT JOIN LATERAL (
    SELECT sum(completed)::int8 AS completed, sum(failed)::int8 AS failed, sum(latency_ms_sum) AS latency_ms_sum
    FROM job_minutes m
    WHERE m.node_id = n.id AND m.minute >= date_trunc('minute', now()) - interval '1 hour'
) h ON true
"""

JOB_MINUTES_KEPT_HOURS = 24
CLEAN_JOB_MINUTES = f"DELETE FROM job_minutes WHERE minute < now() - interval '{JOB_MINUTES_KEPT_HOURS} hours'"
