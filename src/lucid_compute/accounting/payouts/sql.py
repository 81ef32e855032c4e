"""The SQL of payouts: the statements that read and close them, and the definition of the triggers that bill jobs.

Migrations create the triggers. `FUNCTIONS` and `TRIGGERS` show the current definition, and a test compares it with the
database, so that the code of billing can be read here.
"""

from __future__ import annotations

from typing import NamedTuple

KEYS = "node_id, day, model_id, node_owner"
SUMS = "jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"

_COUNTED = """sum(jobs)::bigint AS jobs, sum(tokens_in)::bigint AS tokens_in, sum(tokens_out)::bigint AS tokens_out,
    sum(gross_usd) AS gross_usd"""
_PARTED = "sum(model_owner_usd) AS model_owner_usd, sum(protocol_usd) AS protocol_usd"

# A passport's owner never changes and passports are never removed, so open lines need no copy of owners and names.
_OPEN = f"""
    SELECT NULL::uuid AS period_id, {KEYS}, {SUMS}, NULL::text AS held_node, NULL::text AS held_model,
        NULL::text AS held_owner
    FROM payout_open WHERE day >= :since AND day < :until AND
"""
_IS_ITS = "(CAST(:owner AS text) IS NULL OR node_owner = :owner)"
# Each part has an index of its own; of both with OR, or with a query of the models, Postgres reads everyone's lines.
MODELS_OF = "SELECT id FROM passports WHERE owner = :owner AND type = 'model'"
_OPEN_OF_NODES = f"{_OPEN} {_IS_ITS}"
_OPEN_OF_MODELS = f"{_OPEN} node_owner <> :owner AND model_id = ANY(CAST(:models AS uuid[]))"
_CLOSED = f"""
    SELECT {{period_id}} AS period_id, {KEYS}, {SUMS}, node_name AS held_node, model_name AS held_model,
        model_owner AS held_owner
    FROM payout_lines l {{join}} WHERE {{where}} AND (
        CAST(:owner AS text) IS NULL OR node_owner = :owner OR model_owner = :owner
    )
"""
# Lines of a period that is being closed are in none yet.
_CLOSED_OF_DAYS = _CLOSED.format(
    period_id="p.id",
    join="LEFT JOIN payout_periods p ON p.id = l.period_id",
    where="day >= :since AND day < :until",
)
_OF_NODES = f"{_OPEN_OF_NODES} UNION ALL {_CLOSED_OF_DAYS}"
_OF_DAYS = f"{_OF_NODES} UNION ALL {_OPEN_OF_MODELS}"
_OF_PERIOD = _CLOSED.format(period_id="l.period_id", join="", where="l.period_id = :period_id")

# A model that has no passport has no owner: its part is the provider's.
_PROVIDERS_USD = "gross_usd - protocol_usd - CASE WHEN model_owner IS NULL THEN 0 ELSE model_owner_usd END"


class PayoutQueries(NamedTuple):
    """The statements that read the payouts of some days or of a period, day by day or not.

    `parties` returns what owners get in each role, without naming nodes, because only a node's owner may see which node
    it was; and their totals, unless it is day by day. `nodes` returns the providers' lines, and `size` their number, up
    to :most.
    """

    parties: str
    nodes: str
    size: str


_SUMMED = f"max(held_model) AS held_model, max(held_owner) AS held_owner, {_COUNTED}, {_PARTED}"


def _queries(raw: str, of_nodes: str, keys: str) -> PayoutQueries:
    """Return the statements over the lines of `raw`, and over those `of_nodes`, which are a part of them.

    Each reads its lines once, and adds up before it joins names.

    The report of a closed period has the names of that time; other reports have the current names.
    """
    grouped = f"FROM ({of_nodes}) raw WHERE {_IS_ITS} GROUP BY {keys} node_id, model_id, node_owner"
    size = f"SELECT count(*) FROM (SELECT {grouped} LIMIT :most) lines"
    return PayoutQueries(_parties(raw, keys), _nodes(of_nodes, keys, grouped), size)


def _parties(raw: str, keys: str) -> str:
    totals = "" if keys else "(role, owner),"
    return f"""
        WITH raw AS ({raw}), summed AS (
            SELECT {keys} node_owner, model_id, {_SUMMED} FROM raw GROUP BY {keys} node_owner, model_id
        ), lines AS MATERIALIZED (
            SELECT summed.*, {_model(raw)} FROM summed LEFT JOIN passports m ON m.id = model_id
        ), roles AS (
            SELECT 'provider' AS role, node_owner AS owner, {keys} NULL::uuid AS model_id, NULL AS model_name,
                jobs, tokens_in, tokens_out, gross_usd, {_PROVIDERS_USD} AS amount_usd
            FROM lines WHERE {not keys}
            UNION ALL SELECT 'model_owner', model_owner, {keys} model_id, model_name,
                jobs, tokens_in, tokens_out, gross_usd, model_owner_usd
            FROM lines WHERE model_owner IS NOT NULL
            UNION ALL SELECT 'protocol', NULL, {keys} model_id, model_name,
                jobs, tokens_in, tokens_out, gross_usd, protocol_usd
            FROM lines WHERE CAST(:owner AS text) IS NULL
        )
        SELECT role, owner, {keys} NULL AS node_id, NULL AS node_name, model_id::text, max(model_name) AS model_name,
            {_COUNTED}, sum(amount_usd) AS amount_usd
        FROM roles WHERE CAST(:owner AS text) IS NULL OR owner = :owner
        GROUP BY GROUPING SETS ({totals} (role, owner, {keys} model_id))
        HAVING grouping(model_id) = 1 OR role <> 'provider'
    """


def _nodes(raw: str, keys: str, grouped: str) -> str:
    return f"""
        WITH summed AS (
            SELECT {keys} node_id, model_id, node_owner, max(held_node) AS held_node, {_SUMMED} {grouped}
        ), lines AS (
            SELECT summed.*, coalesce({_name("n", "held_node", raw)}, '') AS node_name, {_model(raw)}
            FROM summed LEFT JOIN passports n ON n.id = node_id LEFT JOIN passports m ON m.id = model_id
        )
        SELECT 'provider' AS role, node_owner AS owner, {keys} node_id::text, node_name, model_id::text, model_name,
            jobs, tokens_in, tokens_out, gross_usd, {_PROVIDERS_USD} AS amount_usd
        FROM lines
    """


def _model(raw: str) -> str:
    name = _name("m", "held_model", raw)
    return f"coalesce({name}, '') AS model_name, coalesce(held_owner, m.owner) AS model_owner"


def _name(passport: str, held: str, raw: str) -> str:
    return held if raw is _OF_PERIOD else f"{passport}.name, {held}"


_DAILY = "day, period_id,"
OF_DAYS, DAILY_OF_DAYS = (_queries(_OF_DAYS, _OF_NODES, keys) for keys in ("", _DAILY))
OF_PERIOD, DAILY_OF_PERIOD = (_queries(_OF_PERIOD, _OF_PERIOD, keys) for keys in ("", _DAILY))

# A period is closed by moving its lines, some of a day in each step. Lines that the ledger has locked are left for a
# later step, so that nobody waits for long. A later job makes a new open line of its own day. If the period has a line
# with the same key already, the new one belongs to the next period, as do those that come after the last step.
FIRST_OPEN_DAY = "SELECT min(day) FROM payout_open WHERE day >= :since AND day < :until"
# Postgres looks a scalar subquery up by its key; NOT EXISTS it joins, in ways that grow with the lines.
_IS_NEW = """(
    SELECT true FROM payout_lines l WHERE l.period_id = CAST(:period_id AS uuid) AND l.node_id = o.node_id
        AND l.day = o.day AND l.model_id = o.model_id AND l.node_owner = o.node_owner
) IS NULL"""
_MOVE = f"""
    WITH moved AS (DELETE FROM payout_open o WHERE {{which}} RETURNING *)
    INSERT INTO payout_lines (period_id, {KEYS}, {SUMS}, node_name, model_name, model_owner)
    SELECT CAST(:period_id AS uuid), {KEYS}, {SUMS}, coalesce(n.name, ''), coalesce(m.name, ''), m.owner
    FROM moved LEFT JOIN passports n ON n.id = node_id LEFT JOIN passports m ON m.id = model_id
"""
MOVE_SOME = _MOVE.format(
    which=f"""ctid = ANY(ARRAY(
        SELECT ctid FROM payout_open o WHERE day = :day AND {_IS_NEW} LIMIT :most FOR UPDATE SKIP LOCKED
    ))"""
)
# The last step waits for the ledger. Lines are locked in the order in which it writes them, so there is no deadlock.
_IS_REST = f"day < :until AND {_IS_NEW}"
LOCK_REST = f"SELECT count(*) FROM (SELECT FROM payout_open o WHERE {_IS_REST} ORDER BY {KEYS} FOR UPDATE) locked"
MOVE_REST = _MOVE.format(which=_IS_REST)
END_CLOSING = "DELETE FROM payout_closings"

# For estimates: the totals of billed jobs of :models in the last 30 days, on each of :nodes, and on all under null.
_RECENT = f"""
    SELECT node_id, model_id, {_COUNTED} FROM {{table}}
    WHERE day >= CAST(:since AS date) - 30 AND day < :until AND model_id = ANY(CAST(:models AS uuid[]))
    GROUP BY node_id, model_id
"""
BILLED_TOTALS = f"""
    WITH lines AS MATERIALIZED (
        {_RECENT.format(table="payout_open")} UNION ALL {_RECENT.format(table="payout_lines")}
    )
    SELECT NULL AS node_id, model_id::text, {_COUNTED} FROM lines GROUP BY model_id
    UNION ALL SELECT node_id::text, model_id::text, {_COUNTED} FROM lines
    WHERE node_id = ANY(CAST(:nodes AS uuid[])) GROUP BY node_id, model_id
"""

# Attempts that were not completed. `is_last` is the last attempt of a request; the others were retried.
LOSSES = """
    SELECT node_id::text, model_id::text, outcome, reason, is_last, count(*) AS jobs,
        count(tokens_in) AS jobs_with_tokens, coalesce(sum(tokens_in), 0)::bigint AS tokens_in,
        coalesce(sum(price_usd), 0) AS billed_usd
    FROM jobs j, LATERAL (
        SELECT NOT EXISTS (SELECT FROM jobs later WHERE later.id = j.id AND later.attempt > j.attempt) AS is_last
    ) last
    WHERE outcome <> 'completed' AND started_at >= :since AND started_at < :until
        AND (CAST(:owner AS text) IS NULL OR node_owner = :owner)
        AND (CAST(:model AS uuid) IS NULL OR model_id = CAST(:model AS uuid))
    GROUP BY 1, 2, 3, 4, 5
"""
# Requests that were refused before they reached a node: those that the owner sent, and those for its models.
REFUSALS = """
    SELECT model_id::text, cause, coalesce(m.metadata->>'format' = 'api', false) AS has_upstream,
        sum(requests)::bigint AS requests
    FROM refusals r LEFT JOIN passports m ON m.id = r.model_id
    WHERE hour >= :since AND hour < :until
        AND (CAST(:owner AS text) IS NULL OR r.consumer = :owner OR m.owner = :owner)
        AND (CAST(:model AS uuid) IS NULL OR model_id = CAST(:model AS uuid))
    GROUP BY 1, 2, 3
"""
ATTEMPTS = """
    SELECT count(*) FROM jobs WHERE started_at >= :since AND started_at < :until
        AND (CAST(:owner AS text) IS NULL OR node_owner = :owner)
        AND (CAST(:model AS uuid) IS NULL OR model_id = CAST(:model AS uuid))
"""

# The triggers as a migrated database has them. A change needs a migration too: a test compares both.

# The lines of the jobs `{jobs}`, each split by the terms that were valid when it started. Multiplication by a decimal
# is exact in Postgres, division is not.
_LINES_OF = """
    SELECT node_id, (started_at AT TIME ZONE 'UTC')::date AS day, model_id, coalesce(node_owner, '') AS node_owner,
        count(*) AS jobs, coalesce(sum(tokens_in), 0) AS tokens_in, coalesce(sum(tokens_out), 0) AS tokens_out,
        sum(price_usd) AS gross_usd,
        sum(trunc(price_usd * terms[1] * 0.0001, 12)) AS model_owner_usd,
        sum(trunc(price_usd * terms[2] * 0.0001, 12)) AS protocol_usd
    FROM (
        SELECT *, (
            SELECT ARRAY[model_owner_bps, protocol_bps] FROM payout_terms
            WHERE since <= started_at ORDER BY since DESC LIMIT 1
        ) AS terms
        FROM ({jobs}) those
        WHERE price_usd IS NOT NULL AND node_id IS NOT NULL AND outcome NOT IN ('running', 'lost')
    ) billed
    GROUP BY 1, 2, 3, 4
"""
_ADD = f"ON CONFLICT ({KEYS}) DO UPDATE SET " + ", ".join(
    f"{name} = held.{name} + excluded.{name}" for name in SUMS.split(", ")
)


def _bill(jobs: str) -> str:
    """Return the statement that adds jobs to their lines, in the order of the keys, so that there is no deadlock."""
    return f"""
        INSERT INTO payout_open AS held ({KEYS}, {SUMS})
        SELECT {KEYS}, {SUMS} FROM ({_LINES_OF.format(jobs=jobs)}) lines ORDER BY {KEYS} {_ADD}
    """


_IS_BILLED = "b.price_usd IS NOT NULL AND b.node_id IS NOT NULL AND b.outcome NOT IN ('running', 'lost')"
_BILL_JOBS = f"""
BEGIN
    IF TG_OP = 'INSERT' THEN
        {_bill("SELECT * FROM written")};
        RETURN NULL;
    END IF;
    IF EXISTS (
        SELECT FROM written w JOIN before b USING (id, attempt) WHERE {_IS_BILLED}
            AND (w.price_usd, w.outcome, w.node_id, w.node_owner, w.model_id, w.started_at, w.tokens_in, w.tokens_out)
            IS DISTINCT FROM
            (b.price_usd, b.outcome, b.node_id, b.node_owner, b.model_id, b.started_at, b.tokens_in, b.tokens_out)
    ) THEN
        RAISE EXCEPTION 'a job that was billed does not change any more' USING ERRCODE = '23000';
    END IF;
    {_bill(f"SELECT w.* FROM written w JOIN before b USING (id, attempt) WHERE NOT ({_IS_BILLED})")};
    RETURN NULL;
END
"""
# A period gets its lines while it is being closed; from an older replica in the transaction that creates it.
_REFUSE_LATE_LINES = """
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT period_id FROM added) a LEFT JOIN payout_periods p ON p.id = a.period_id
        WHERE p.xmin IS DISTINCT FROM pg_current_xact_id()::xid
            AND NOT (p.id IS NULL AND EXISTS (SELECT FROM payout_closings c WHERE c.period_id = a.period_id))
    ) THEN
        RAISE EXCEPTION 'closed periods are append-only, and nothing is added to them';
    END IF;
    RETURN NULL;
END
"""
# An older replica would close the rest of these days as a period of its own.
_REFUSE_SECOND_CLOSING = """
BEGIN
    IF EXISTS (SELECT FROM payout_closings WHERE period_id <> NEW.id) THEN
        RAISE EXCEPTION 'another period is being closed';
    END IF;
    RETURN NEW;
END
"""
FUNCTIONS = {
    "jobs_are_billed": _BILL_JOBS,
    "payout_lines_are_of_jobs": "BEGIN RETURN NULL; END",  # older replicas write lines beside their jobs
    "payout_period_is_open": _REFUSE_LATE_LINES,
    "payout_period_is_the_one": _REFUSE_SECOND_CLOSING,
    "payouts_are_append_only": "BEGIN RAISE EXCEPTION 'closed periods and terms are append-only'; END",
}
"""The bodies of the trigger functions, in PL/pgSQL; compared with the database by a test."""

_FROZEN = ("payout_periods", "payout_lines", "payout_terms", "payout_corrections")
TRIGGERS = {
    "jobs_are_billed_once": """
        AFTER INSERT ON jobs REFERENCING NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_billed()""",
    "jobs_are_billed_when_they_end": """
        AFTER UPDATE ON jobs REFERENCING OLD TABLE AS before NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_billed()""",
    "payout_open_is_of_jobs": """
        BEFORE INSERT ON payout_open
        FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION payout_lines_are_of_jobs()""",
    "payout_lines_are_complete": """
        AFTER INSERT ON payout_lines REFERENCING NEW TABLE AS added
        FOR EACH STATEMENT EXECUTE FUNCTION payout_period_is_open()""",
    "payout_periods_are_closed_one_by_one": """
        BEFORE INSERT ON payout_periods FOR EACH ROW EXECUTE FUNCTION payout_period_is_the_one()""",
    **{
        f"{table}_is_append_only": f"""
        BEFORE UPDATE OR DELETE OR TRUNCATE ON {table}
        FOR EACH STATEMENT EXECUTE FUNCTION payouts_are_append_only()"""
        for table in _FROZEN
    },
}
"""The triggers of `jobs` and of the payouts' tables; compared with the database by a test."""
