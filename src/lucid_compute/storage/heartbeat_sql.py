"""The one statement that a group of heartbeats is committed with."""

# $1 the heartbeats as one JSON array (each node at most once), $2 the instant since when a node's silence makes it
# unhealthy, $3 the replica. One text is sent where arrays of columns cost this process twice the time to encode.
#
# A heartbeat is left out when its sequence is not above the one held of the same boot, or when its boot id is a former
# one; `outcome` says which, and `revision` is null. `up_since` starts anew after a silence or a report of unhealthy.
# One that was judged `applied` and has no `revision` lost a race for its row, and is to be judged again: the row is
# locked only after it was judged, and another replica's boot may have come first.
# The look at former boots is no EXISTS, which Postgres would answer by hashing the whole of node_boots.
# `received_at`, the same for all, stands in the first row alone: decoding it takes as long as the rest of a row.
COMMIT_HEARTBEATS = """
WITH sent AS (
    SELECT (report->>'passportId')::uuid AS passport_id, report, report->>'status' AS status,
        report->>'bootId' AS boot_id, (report->>'sequence')::int8 AS sequence, position
    FROM jsonb_array_elements($1::text::jsonb) WITH ORDINALITY AS s (report, position)
), judged AS (
    SELECT s.*, h.boot_id AS held_boot_id,
        CASE
            WHEN s.boot_id IS NULL OR s.sequence IS NULL OR h.boot_id IS NULL THEN 'applied'
            WHEN s.boot_id = h.boot_id THEN CASE WHEN s.sequence > h.sequence THEN 'applied' ELSE 'repeated' END
            WHEN (
                SELECT true FROM node_boots b WHERE b.passport_id = s.passport_id AND b.boot_id = s.boot_id
            ) THEN 'former'
            ELSE 'applied'
        END AS outcome
    FROM sent s JOIN heartbeats h USING (passport_id)
), applied AS (
    UPDATE heartbeats h SET
        received_at = statement_timestamp(),
        up_since = CASE
            WHEN j.status = 'unhealthy' THEN NULL
            WHEN h.up_since IS NULL OR h.received_at < $2 THEN statement_timestamp()
            ELSE h.up_since
        END,
        status = j.status,
        report = j.report,
        boot_id = CASE WHEN j.sequence IS NULL THEN h.boot_id ELSE coalesce(j.boot_id, h.boot_id) END,
        sequence = CASE WHEN j.boot_id IS NULL THEN h.sequence ELSE coalesce(j.sequence, h.sequence) END,
        revision = h.revision + 1
    FROM judged j
    WHERE h.passport_id = j.passport_id AND j.outcome = 'applied'
        AND h.boot_id IS NOT DISTINCT FROM j.held_boot_id
        AND (j.sequence IS NULL OR h.boot_id IS DISTINCT FROM j.boot_id OR j.sequence > h.sequence)
    RETURNING j.position, h.up_since, h.revision
), boots AS (
    INSERT INTO node_boots (passport_id, boot_id)
    SELECT passport_id, boot_id FROM judged JOIN applied USING (position)
    WHERE boot_id IS NOT NULL AND sequence IS NOT NULL AND boot_id IS DISTINCT FROM held_boot_id
    ON CONFLICT DO NOTHING
), restarts AS (
    INSERT INTO node_events (passport_id, type, details)
    SELECT passport_id, 'restarted', jsonb_build_object('bootId', boot_id) FROM judged JOIN applied USING (position)
    WHERE sequence IS NOT NULL AND held_boot_id IS NOT NULL AND boot_id <> held_boot_id
), batch AS (
    INSERT INTO heartbeat_batches (replica_id, passport_ids) SELECT $3, array_agg(passport_id) FROM sent
)
SELECT j.position - 1 AS position, j.outcome, a.revision, a.up_since,
    CASE WHEN row_number() OVER () = 1 THEN statement_timestamp() END AS received_at
FROM judged j LEFT JOIN applied a USING (position)
"""

# Postgres keeps the plan of the statement; one made while a table was empty would read all of it when it is full.
USE_INDEXES = "SET enable_seqscan = off"
