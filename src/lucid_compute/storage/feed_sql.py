"""What the feed reads: everything once, then what changed since a snapshot. Each is one statement, so one snapshot.

`NOT pg_visible_in_snapshot(changed_xid, $1)` names exactly the rows whose transaction the former read could not see,
also those that committed out of order; the comparison with xmin lets the index find them.
"""

from datetime import timedelta

ENDED_NODES_KEPT = timedelta(hours=24)
"""How long nodes that were deregistered or revoked still stand in explanations."""

_MIRRORED = f"""
    p.type IN ('compute', 'model')
    AND (p.status <> 'revoked' AND p.deregistered_at IS NULL
         OR p.updated_at > now() - interval '{ENDED_NODES_KEPT.total_seconds()} seconds')
"""

_SERVICE = """
    SELECT 'snapshot' AS kind, to_jsonb(pg_current_snapshot()::text)::text AS body
    UNION ALL SELECT 'now', to_jsonb(clock_timestamp())::text
    UNION ALL SELECT 'replica', to_jsonb(r)::text FROM replicas r
    UNION ALL SELECT 'outage', to_jsonb(o)::text FROM outages o WHERE o.ended_at > now() - interval '30 days'
"""

# Beside the row of the passport, whose revision is theirs: one that comes without them has none.
_SECRETS = """
    SELECT 'secrets', jsonb_build_object('id', p.id, 'secrets', p.secrets)::text FROM passports p
    WHERE p.secrets <> '{}' AND p.type IN ('compute', 'model') AND p.status <> 'revoked' AND p.deregistered_at IS NULL
"""

EVERYTHING = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {_MIRRORED}
    UNION ALL {_SECRETS} AND {_MIRRORED}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n JOIN passports p ON p.id = n.passport_id WHERE {_MIRRORED}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h JOIN passports p ON p.id = h.passport_id
        WHERE h.received_at IS NOT NULL AND {_MIRRORED}
"""

_UNSEEN = (
    "changed_xid >= pg_snapshot_xmin($1::text::pg_snapshot) "
    "AND NOT pg_visible_in_snapshot(changed_xid, $1::text::pg_snapshot)"
)

CHANGES = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k WHERE {_UNSEEN}
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {_UNSEEN}
    UNION ALL {_SECRETS} AND {_UNSEEN}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n WHERE {_UNSEEN}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h WHERE h.passport_id IN (
        SELECT unnest(b.passport_ids) FROM heartbeat_batches b WHERE {_UNSEEN} AND b.replica_id <> $2
        UNION ALL SELECT unnest($3::uuid[])
    )
"""

# How long no replica could renew its lease, in one statement with the renewal: an outage of ours when it is longer
# than $5. A replica's lease is renewed only by a loop that runs and a database that commits, as heartbeats need.
RENEW_LEASE = """
WITH silent AS (
    SELECT max(seen_at) AS since FROM replicas
), renewed AS (
    INSERT INTO replicas (id, seen_at, applied_at, applied_snapshot, in_flight)
    VALUES ($1, clock_timestamp(), $2, $3, $4::jsonb)
    ON CONFLICT (id) DO UPDATE SET
        seen_at = clock_timestamp(), applied_at = $2, applied_snapshot = $3, in_flight = $4::jsonb
)
INSERT INTO outages (started_at, ended_at)
SELECT since, clock_timestamp() FROM silent WHERE clock_timestamp() - since > $5::interval
RETURNING started_at, ended_at
"""
