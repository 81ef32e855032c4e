"""The statements of the payouts: who gets what of which days, and the closing of a period."""

from __future__ import annotations

KEYS = "node_id, day, model_id, node_owner"
SUMS = "jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"

# A passport's owner never changes and passports are never removed, so an open line needs to keep neither it nor names.
_NAMED = f"""
    SELECT {{period}} AS period_id, {KEYS}, {SUMS}, coalesce(n.name, '') AS node_name,
        coalesce(m.name, '') AS model_name, m.owner AS model_owner
    FROM {{source}} o LEFT JOIN passports n ON n.id = o.node_id LEFT JOIN passports m ON m.id = o.model_id
"""
_CLOSED = f"SELECT period_id, {KEYS}, {SUMS}, node_name, model_name, model_owner FROM payout_lines"
_OF_DAYS = f"""
    {_NAMED.format(period="NULL::uuid", source="payout_open")} WHERE day >= :since AND day < :until
    UNION ALL {_CLOSED} WHERE day >= :since AND day < :until
"""
_OF_PERIOD = f"{_CLOSED} WHERE period_id = :period_id"

# A line is of everybody who gets a part of it. Whose node it was is the business of its owner alone. A model that has
# no passport has no owner: its part is the provider's, as `revenue.split` says.
_ROLES = """
    SELECT 'provider' AS role, node_owner AS owner, period_id, day, node_id, node_name, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd,
        gross_usd - protocol_usd - CASE WHEN model_owner IS NULL THEN 0 ELSE model_owner_usd END AS amount_usd
    FROM lines
    UNION ALL SELECT 'model_owner', model_owner, period_id, day, NULL, NULL, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd, model_owner_usd
    FROM lines WHERE model_owner IS NOT NULL
    UNION ALL SELECT 'protocol', NULL, period_id, day, NULL, NULL, model_id, model_name,
        jobs, tokens_in, tokens_out, gross_usd, protocol_usd
    FROM lines
"""


def _payouts(lines: str, keys: str) -> str:
    """Answer the statement that adds up what each owner gets in each role, by node, model and `keys`."""
    return f"""
        WITH lines AS ({lines}), roles AS ({_ROLES})
        SELECT role, owner, {keys} node_id::text, max(node_name) AS node_name, model_id::text,
            max(model_name) AS model_name, sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in,
            sum(tokens_out)::bigint AS tokens_out, sum(gross_usd) AS gross_usd, sum(amount_usd) AS amount_usd
        FROM roles WHERE CAST(:owner AS text) IS NULL OR owner = :owner
        GROUP BY role, owner, {keys} node_id, model_id
        ORDER BY owner NULLS LAST, array_position(ARRAY['provider', 'model_owner', 'protocol'], role),
            {keys} node_id, model_id
        LIMIT :most
    """


_DAILY = "day, period_id, "
PAYOUTS_OF_DAYS = _payouts(_OF_DAYS, "")
PAYOUTS_OF_PERIOD = _payouts(_OF_PERIOD, "")
DAILY_PAYOUTS_OF_DAYS = _payouts(_OF_DAYS, _DAILY)
DAILY_PAYOUTS_OF_PERIOD = _payouts(_OF_PERIOD, _DAILY)

# What moves on is locked in the order in which the ledger writes, so that the two wait for one another and never in a
# circle. A job that comes later makes an open line again, of its own day: the next period's.
LOCK_OPEN = f"SELECT count(*) FROM (SELECT FROM payout_open WHERE day < :until ORDER BY {KEYS} FOR UPDATE) locked"
MOVE_OPEN = f"""
    WITH moved AS (DELETE FROM payout_open WHERE day < :until RETURNING *)
    INSERT INTO payout_lines (period_id, {KEYS}, {SUMS}, node_name, model_name, model_owner)
    {_NAMED.format(period="CAST(:period_id AS uuid)", source="moved")}
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
