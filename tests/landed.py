"""What a database held at each revision: rows written as that revision's replicas did."""

from __future__ import annotations

import json
from typing import Any

from lucid_compute.postgres import schema
from lucid_compute.postgres.database import connect

NODE = "11111111-1111-4111-8111-111111111111"
MODEL = "22222222-2222-4222-8222-222222222222"
REPLICA = "33333333-3333-4333-8333-333333333333"
WEBHOOK = "44444444-4444-4444-8444-444444444444"
PERIOD = "55555555-5555-4555-8555-555555555555"

_JOB = f"""
INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
    is_stream, started_at, outcome, status, first_byte_ms, latency_ms, tokens_in, tokens_out, are_tokens_counted,
    price_usd)
VALUES (gen_random_uuid(), 1, '{REPLICA}', '{MODEL}', 'm', '{NODE}', 'olga', 'key', 'carl', 'chat/completions', false,
    now() - interval '3 minutes', 'completed', 200, 20, 400, 12, 34, true, 0.5);
"""

# By revision, from the first on: what its replicas could write for the first time, or write in another way.
ROWS = {
    "registry": f"""
INSERT INTO passports (id, type, owner, name, tags, metadata, secrets) VALUES
    ('{NODE}', 'compute', 'olga', 'rack-1', '{{eu}}',
        '{{"gpu": "A100", "vram": "80GB", "inferenceUrl": "http://gpu.example.com:8080/v1"}}', '{{"apiKey": "s"}}'),
    ('{MODEL}', 'model', 'mona', 'm', '{{}}', '{{"format": "safetensors"}}', '{{}}');
INSERT INTO nodes (passport_id, declared_models)
    VALUES ('{NODE}', '[{{"id": "{MODEL}", "maxTokens": 100, "quantization": null}}]');
INSERT INTO heartbeats (passport_id, received_at, up_since, status, boot_id, sequence, report, revision)
    VALUES ('{NODE}', now(), now(), 'healthy', 'boot', 7, '{{"passportId": "{NODE}", "status": "healthy", "load": 0.5,
        "queueDepth": 0, "availableModels": [], "bootId": "boot", "sequence": 7}}', 3);
INSERT INTO api_keys (id, name, owner, scopes, passport_id, digest, prefix, last_four)
    VALUES ('key', 'of the node', 'olga', '{{compute}}', '{NODE}', '\\x01', 'lk_live_', 'abcd');
INSERT INTO audit_log (actor_owner, action, target_type, target_id)
    VALUES ('olga', 'passport.create', 'compute', '{NODE}');
INSERT INTO node_events (passport_id, type) VALUES ('{NODE}', 'registered');
INSERT INTO node_boots (passport_id, boot_id) VALUES ('{NODE}', 'boot');
INSERT INTO model_names (name, passport_id) VALUES ('m', '{MODEL}');
INSERT INTO idempotency_keys (owner, key, body_hash, result_id) VALUES ('olga', 'k', '\\x02', 'r');
INSERT INTO outages (started_at, ended_at) VALUES (now() - interval '2 hours', now() - interval '1 hour');
INSERT INTO heartbeat_batches (replica_id, passport_ids) VALUES ('{REPLICA}', '{{{NODE}}}');
INSERT INTO replicas (id, applied_snapshot) VALUES ('{REPLICA}', '1:1:');
""",
    "job_ledger": f"""
{_JOB}
INSERT INTO job_minutes SELECT node_id, date_trunc('minute', started_at), 1, 0, latency_ms FROM jobs;
INSERT INTO job_totals (node_id, node_owner, completed, failed, rejected, cancelled)
    VALUES ('{NODE}', 'olga', 1, 0, 0, 0);
""",
    "records": f"""
INSERT INTO gauge_flushes (replica_id, number) VALUES ('{REPLICA}', 5);
INSERT INTO node_states (node_id, since, state, owner) VALUES ('{NODE}', now(), 'healthy', 'olga');
INSERT INTO job_days (bucket, scope_id, model_id, completed, failed, rejected, cancelled, priced, revenue_usd)
    VALUES (date_trunc('day', now()) - interval '1 day', '{NODE}', '{MODEL}', 1, 0, 0, 0, 1, 0.5);
""",
    "job_retention": f"""
INSERT INTO job_removals (node_id, node_owner, completed, failed, rejected, cancelled)
    VALUES ('{NODE}', 'olga', 4, 3, 2, 1);
UPDATE job_totals
    SET completed = completed + 4, failed = failed + 3, rejected = rejected + 2, cancelled = cancelled + 1;
""",
    "signals": f"""
INSERT INTO webhooks (id, owner, url, secret, events, passport_id)
    VALUES ('{WEBHOOK}', 'olga', 'https://127.0.0.1:9/', 's', '{{node.unhealthy}}', '{NODE}');
INSERT INTO webhook_deliveries (webhook_id, event_id, subject_id, type, occurred_at, payload, state, ended_at)
    VALUES ('{WEBHOOK}', gen_random_uuid(), '{NODE}', 'node.unhealthy', now(), '{{}}', 'delivered', now());
INSERT INTO model_states (model_id, since, is_available, is_first) VALUES ('{MODEL}', now(), true, true);
""",
    "revenue": f"""
INSERT INTO payout_terms VALUES (now() - interval '1 second', 8000, 1000, 1000);
INSERT INTO payout_periods (id, starts_on, ends_on, closed_by) VALUES ('{PERIOD}', '2026-01-01', '2026-02-01', 'key');
INSERT INTO payout_lines (period_id, node_id, day, model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd,
    model_owner_usd, protocol_usd, node_name, model_name)
VALUES ('{PERIOD}', '{NODE}', '2026-01-09', '{MODEL}', 'olga', 2, 3, 4, 1, 0.2, 0.1, 'rack-1', 'm');
""",
    # its trigger bills the job
    "money": f"""
{_JOB}
UPDATE job_totals SET completed = completed + 1;
""",
    "hooks": """
INSERT INTO webhooks (id, owner, url, secret, events, all_owners, former_secret)
    VALUES (gen_random_uuid(), 'root', 'https://127.0.0.1:9/', 's', '{node.unhealthy}', true, 'f');
""",
    "refused": f"""
INSERT INTO refusals (hour, consumer, model_id, cause, requests)
    VALUES (date_trunc('hour', now()), 'carl', '{MODEL}', 'no_capacity', 9);
""",
    # replicas only read its table
    "compatible": "SELECT FROM schema_compatibility",
    "limits": """
INSERT INTO audit_log (at, actor_owner, action, target_type, target_id)
    VALUES (now() - interval '500 days', 'olga', 'key.create', 'key', 'long ago');
INSERT INTO key_shares (key_id, unit, shares) VALUES ('key', 'requests', '{"r": {"share": 5, "at": 1, "freeAt": 2}}');
""",
    "closings": f"""
INSERT INTO payout_corrections (id, line, period_id, day, role, owner, amount_usd, reason, created_by)
    VALUES (gen_random_uuid(), 0, '{PERIOD}', '2026-02-03', 'provider', 'olga', -0.5, 'why', 'root');
""",
    # its trigger bills jobs of sessions that see no tables
    "settled": f"""
SET search_path = '';
{_JOB.replace("INTO jobs", "INTO public.jobs")}
RESET search_path;
UPDATE job_totals SET completed = completed + 1;
""",
    # its trigger counts what keys use
    "usage": f"""
{_JOB}
UPDATE job_totals SET completed = completed + 1;
""",
    "events": f"""
INSERT INTO node_events (passport_id, type, reason) VALUES ('{NODE}', 'unhealthy', 'silent');
""",
    # its indexes find the lines that jobs add to
    "earners": f"""
{_JOB}
UPDATE job_totals SET completed = completed + 1;
""",
    "responses": "SELECT secret FROM response_secret;",  # written by the migration alone
}
LANDED = tuple(ROWS)
# Revisions that no version ended with: they landed together with a later one. Databases of users are at none of these.
_BETWEEN = {"records", "compatible", "limits", "closings", "events"}
VERSIONS = tuple(revision for revision in LANDED if revision not in _BETWEEN)

Rows = dict[str, list[dict[str, Any]]]


async def grow(url: str, revision: str) -> None:
    """Bring an empty database up to `revision`, with rows of every revision on the way."""
    for landed in LANDED[: LANDED.index(revision) + 1]:
        await schema.upgrade(url, landed)
        await write_rows(url, landed)


async def write_rows(url: str, revision: str) -> None:
    """Write the rows of `revision` into a database that is at it."""
    connection = await connect(url)
    try:
        await connection.execute(ROWS[revision])
    finally:
        await connection.close()


async def all_rows(url: str) -> Rows:
    """Return every row of every table, by table, in one order."""
    connection = await connect(url)
    try:
        names = await connection.fetch(
            "SELECT tablename FROM pg_tables WHERE schemaname = 'public' AND tablename <> 'alembic_version'"
        )
        return {
            name: sorted(
                [json.loads(row[0]) for row in await connection.fetch(f'SELECT to_jsonb(t) FROM "{name}" t')],
                key=lambda row: json.dumps(row, sort_keys=True),
            )
            for (name,) in names
        }
    finally:
        await connection.close()


def shared(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> list[str]:
    """Return rows in what they have in common with `others`, each as text, in one order."""
    columns = set(rows[0]) & set(others[0]) if rows and others else set()
    return sorted(json.dumps({name: row[name] for name in columns}, sort_keys=True) for row in rows)
