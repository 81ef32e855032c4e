"""The SQL that looks for due deliveries webhook by webhook, and that claims them.

`next_attempt_at` says when a waiting delivery is worth a look. A claim moves it to the claim's end. A delivery behind
another one of its node is moved to that one's instant when a look finds it, and is woken when its turn has come. So a
look reads what may be due, through an index, and its cost does not depend on what else waits.
"""

from __future__ import annotations

from sqlalchemy import text

CLAIM_SECONDS = 30
CLAIMED_AT_A_TIME = 128  # of one webhook, by all replicas
READ_AT_A_TIME = 128  # of one webhook, by one look
SECRETS = """ARRAY[w.secret] || CASE WHEN w.former_secret_until > now() THEN ARRAY[w.former_secret] ELSE '{}' END
    || ARRAY(
        SELECT older->>'secret' FROM jsonb_array_elements(w.older_secrets) older
        WHERE (older->>'until')::timestamptz > now() ORDER BY (older->>'until')::timestamptz DESC
    )"""

# The ids of webhooks for which something waits: a step through the index for each, however much waits.
WAITING_WEBHOOKS = """
    WITH RECURSIVE waiting (id) AS (
        (SELECT webhook_id FROM webhook_deliveries WHERE state = 'waiting' ORDER BY webhook_id LIMIT 1)
        UNION ALL
        SELECT (
            SELECT webhook_id FROM webhook_deliveries WHERE state = 'waiting' AND webhook_id > w.id
            ORDER BY webhook_id LIMIT 1
        ) FROM waiting w WHERE w.id IS NOT NULL
    )
"""
DUE_WEBHOOKS = text(f"""
    {WAITING_WEBHOOKS}
    SELECT w.id, w.failing_since IS NOT NULL AS is_failing FROM waiting JOIN webhooks w USING (id)
    WHERE w.disabled_at IS NULL AND EXISTS (
        SELECT FROM webhook_deliveries WHERE webhook_id = w.id AND state = 'waiting' AND next_attempt_at <= now()
    )
""")

# `seen` is what may be due, each with the oldest waiting delivery of its node: its head. Claimed are heads: of each
# webhook in turn, and of a failing one a single one. Deliveries behind a head that waits longer will wait as long.
# Rows that another transaction has locked are skipped, so a look waits for nobody. A head is locked while those behind
# it are moved, so that it does not end meanwhile. Replicas of an older version claim without moving `next_attempt_at`.
# Arrays of positions have Postgres look them up one by one: it can't know how few these are.
CLAIM = text(f"""
    WITH looked AS MATERIALIZED (
        SELECT w.id,
            CASE WHEN w.failing_since IS NULL THEN {CLAIMED_AT_A_TIME} ELSE 1 END - (
                SELECT count(*) FROM webhook_deliveries
                WHERE webhook_id = w.id AND state = 'waiting' AND claimed_until > now()
            ) AS room
        FROM webhooks w WHERE w.id = ANY(CAST(:webhook_ids AS uuid[])) AND w.disabled_at IS NULL
            AND (w.failing_since IS NOT NULL) = :is_failing
    ), seen AS MATERIALIZED (
        SELECT l.room, l.id AS webhook_id, d.position, d.next_attempt_at, h.position AS head, h.waits_until
        FROM looked l CROSS JOIN LATERAL (
            SELECT position, subject_id, next_attempt_at FROM webhook_deliveries
            WHERE webhook_id = l.id AND state = 'waiting' AND next_attempt_at <= now()
            ORDER BY next_attempt_at, position LIMIT {READ_AT_A_TIME}
        ) d CROSS JOIN LATERAL (
            SELECT position, greatest(next_attempt_at, claimed_until) AS waits_until FROM webhook_deliveries
            WHERE webhook_id = l.id AND subject_id = d.subject_id AND state = 'waiting'
            ORDER BY position LIMIT 1
        ) h
    ), placed AS (
        SELECT *, row_number() OVER (PARTITION BY webhook_id ORDER BY next_attempt_at, position) AS place
        FROM seen WHERE position = head AND waits_until <= now()
    ), due AS (
        SELECT position FROM placed WHERE place <= room ORDER BY place, next_attempt_at LIMIT :room
    ), behind AS MATERIALIZED (
        SELECT position, head FROM seen WHERE position <> head AND next_attempt_at < waits_until
    ), held AS MATERIALIZED (
        SELECT position, greatest(next_attempt_at, claimed_until) AS waits_until FROM webhook_deliveries
        WHERE state = 'waiting' AND position = ANY(ARRAY(
            SELECT position FROM due UNION SELECT head FROM behind
        ))
        FOR UPDATE SKIP LOCKED
    ), moved AS (
        UPDATE webhook_deliveries d SET next_attempt_at = held.waits_until
        FROM behind JOIN held ON held.position = behind.head
        WHERE d.position = behind.position AND d.next_attempt_at < held.waits_until AND d.position = ANY(ARRAY(
            SELECT position FROM webhook_deliveries
            WHERE state = 'waiting' AND position = ANY(ARRAY(SELECT position FROM behind)) FOR UPDATE SKIP LOCKED
        ))
    )
    UPDATE webhook_deliveries d
    SET claimed_until = now() + interval '{CLAIM_SECONDS} seconds',
        next_attempt_at = now() + interval '{CLAIM_SECONDS} seconds',
        attempts = d.attempts + 1, first_attempt_at = coalesce(d.first_attempt_at, now())
    FROM webhooks w
    WHERE d.position = ANY(ARRAY(
            SELECT held.position FROM held JOIN due USING (position) WHERE held.waits_until <= now()
        ))
        AND w.id = d.webhook_id AND d.state = 'waiting' AND d.next_attempt_at <= now()
    RETURNING d.position, d.attempts, d.event_id, d.subject_id, d.type, d.occurred_at, d.payload, d.last_attempts,
        w.id AS webhook_id, w.url, {SECRETS} AS secrets, w.failing_since IS NOT NULL AS is_failing
""")

# The oldest waiting deliveries of these nodes have come to their turn. It is a statement of its own after those before
# them have ended, or it would not see one that was written meanwhile.
WAKE = text("""
    UPDATE webhook_deliveries d SET next_attempt_at = now()
    FROM unnest(CAST(:webhook_ids AS uuid[]), CAST(:subject_ids AS uuid[])) AS s (webhook_id, subject_id)
    CROSS JOIN LATERAL (
        SELECT position FROM webhook_deliveries
        WHERE webhook_id = s.webhook_id AND subject_id = s.subject_id AND state = 'waiting'
        ORDER BY position LIMIT 1
    ) next
    WHERE d.position = next.position AND d.attempts = 0 AND d.next_attempt_at > now()
""")
