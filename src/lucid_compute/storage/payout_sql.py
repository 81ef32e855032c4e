"""The statements of the payouts: who gets what of which days, and the closing of a period."""

from __future__ import annotations

KEYS = "node_id, day, model_id, node_owner"
SUMS = "jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"

_SUMMED = """sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in, sum(tokens_out)::bigint AS tokens_out,
    sum(gross_usd) AS gross_usd"""
_PARTS = "sum(model_owner_usd) AS model_owner_usd, sum(protocol_usd) AS protocol_usd"

# A passport's owner never changes and passports are never removed, so an open line needs to keep neither it nor names.
_OPEN = f"""
    SELECT NULL::uuid AS period_id, {KEYS}, {SUMS}, NULL::text AS node_name, NULL::text AS model_name,
        NULL::text AS model_owner
    FROM payout_open WHERE day >= :since AND day < :until AND (
        CAST(:owner AS text) IS NULL OR node_owner = :owner
        OR model_id IN (SELECT id FROM passports WHERE owner = :owner AND type = 'model')
    )
"""
_CLOSED = f"""
    SELECT period_id, {KEYS}, {SUMS}, node_name, model_name, model_owner
    FROM payout_lines WHERE {{where}} AND (
        CAST(:owner AS text) IS NULL OR node_owner = :owner OR model_owner = :owner
    )
"""
_OF_DAYS = f"{_OPEN} UNION ALL {_CLOSED.format(where='day >= :since AND day < :until')}"
_OF_PERIOD = _CLOSED.format(where="period_id = :period_id")

# A line is of everybody who gets a part of it. Whose node it was is the business of its owner alone. A model that has
# no passport has no owner: its part is the provider's, as `revenue.split` says.
_ROLES = """
    SELECT 'provider' AS role, node_owner AS owner, {keys} node_id, node_name, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd,
        gross_usd - protocol_usd - CASE WHEN model_owner IS NULL THEN 0 ELSE model_owner_usd END AS amount_usd
    FROM lines
    UNION ALL SELECT 'model_owner', model_owner, {keys} NULL, NULL, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd, model_owner_usd
    FROM lines WHERE model_owner IS NOT NULL
    UNION ALL SELECT 'protocol', NULL, {keys} NULL, NULL, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd, protocol_usd
    FROM lines WHERE CAST(:owner AS text) IS NULL
"""


def _payouts(raw: str, keys: str, sets: str) -> str:
    """Answer the statement that adds up what each owner gets in each role, by node, model and `keys`, totals first.

    What is closed keeps its names in the statement of its period; elsewhere things are called as they are now.
    """
    return f"""
        WITH raw AS ({raw}), summed AS (
            SELECT {keys} node_id, model_id, node_owner, {_SUMMED}, {_PARTS}, max(node_name) AS held_node_name,
                max(model_name) AS held_model_name, max(raw.model_owner) AS held_model_owner
            FROM raw GROUP BY {keys} node_id, model_id, node_owner
        ), lines AS (
            SELECT summed.*, coalesce({_name("n", "held_node_name", raw)}, '') AS node_name,
                coalesce({_name("m", "held_model_name", raw)}, '') AS model_name,
                coalesce(held_model_owner, m.owner) AS model_owner
            FROM summed LEFT JOIN passports n ON n.id = node_id LEFT JOIN passports m ON m.id = model_id
        ), roles AS ({_ROLES.format(keys=keys)})
        SELECT role, owner, {keys} node_id::text, max(node_name) AS node_name, model_id::text,
            max(model_name) AS model_name, {_SUMMED}, sum(amount_usd) AS amount_usd
        FROM roles WHERE CAST(:owner AS text) IS NULL OR owner = :owner
        GROUP BY GROUPING SETS ({sets} (role, owner, {keys} node_id, model_id))
        ORDER BY grouping(model_id) DESC, owner NULLS LAST,
            array_position(ARRAY['provider', 'model_owner', 'protocol'], role), {keys} node_id, model_id
        LIMIT :most
    """


def _name(passport: str, held: str, raw: str) -> str:
    return held if raw is _OF_PERIOD else f"{passport}.name, {held}"


_DAILY = "day, period_id, "
_TOTALS = "(role, owner), "
PAYOUTS_OF_DAYS = _payouts(_OF_DAYS, "", _TOTALS)
PAYOUTS_OF_PERIOD = _payouts(_OF_PERIOD, "", _TOTALS)
DAILY_PAYOUTS_OF_DAYS = _payouts(_OF_DAYS, _DAILY, "")
DAILY_PAYOUTS_OF_PERIOD = _payouts(_OF_PERIOD, _DAILY, "")

# What moves on is locked in the order in which the ledger writes, so that the two wait for one another and never in a
# circle. A job that comes later makes an open line again, of its own day: the next period's.
LOCK_OPEN = f"SELECT count(*) FROM (SELECT FROM payout_open WHERE day < :until ORDER BY {KEYS} FOR UPDATE) locked"
MOVE_OPEN = f"""
    WITH moved AS (DELETE FROM payout_open WHERE day < :until RETURNING *)
    INSERT INTO payout_lines (period_id, {KEYS}, {SUMS}, node_name, model_name, model_owner)
    SELECT CAST(:period_id AS uuid), {KEYS}, {SUMS}, coalesce(n.name, ''), coalesce(m.name, ''), m.owner
    FROM moved LEFT JOIN passports n ON n.id = node_id LEFT JOIN passports m ON m.id = model_id
"""

# What billed jobs came to of late, to estimate by.
TYPICAL = """
    SELECT node_id::text, model_id::text, sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in,
        sum(tokens_out)::bigint AS tokens_out, sum(gross_usd) AS gross_usd
    FROM (
        SELECT node_id, model_id, day, jobs, tokens_in, tokens_out, gross_usd FROM payout_open
        UNION ALL SELECT node_id, model_id, day, jobs, tokens_in, tokens_out, gross_usd FROM payout_lines
    ) lines
    WHERE day >= CAST(:since AS date) - 30 AND day < :until GROUP BY 1, 2
"""

# Attempts that were not completed; of a request the last one counts, the others were made up for by trying again.
LOSSES = """
    SELECT node_id::text, model_id::text, outcome, reason, is_last, count(*) AS jobs,
        count(tokens_in) AS jobs_with_tokens, coalesce(sum(tokens_in), 0)::bigint AS tokens_in,
        coalesce(sum(price_usd), 0) AS billed_usd
    FROM jobs j, LATERAL (
        SELECT NOT EXISTS (SELECT FROM jobs later WHERE later.id = j.id AND later.attempt > j.attempt) AS is_last
    ) last
    WHERE outcome <> 'completed' AND started_at >= :since AND started_at < :until
        AND (CAST(:owner AS text) IS NULL OR node_owner = :owner)
    GROUP BY 1, 2, 3, 4, 5
"""
ATTEMPTS = """
    SELECT count(*) FROM jobs WHERE started_at >= :since AND started_at < :until
        AND (CAST(:owner AS text) IS NULL OR node_owner = :owner)
"""
