"""Money: a trigger on jobs writes their revenue lines, and refuses additions to closed periods."""

from __future__ import annotations

from alembic import op

from lucid_compute.postgres.schema import build_index

revision = "money"
down_revision = "revenue"
branch_labels = None
depends_on = None

_KEYS = "node_id, day, model_id, node_owner"
_SUMS = "jobs, tokens_in, tokens_out, gross_usd, model_owner_usd, protocol_usd"
_AMOUNTS = [name.strip() for name in _SUMS.split(",")]

# What the jobs of `{jobs}` come to by line, each split by the terms that held when it started: as `revenue.split`. A
# product with a decimal is exact in Postgres, a quotient is not.
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
_ADD = f"ON CONFLICT ({_KEYS}) DO UPDATE SET " + ", ".join(
    f"{name} = held.{name} + excluded.{name}" for name in _AMOUNTS
)


def _bill(jobs: str) -> str:
    """Return the SQL that adds jobs to lines, in the order of their keys, so that replicas cannot deadlock."""
    return f"""
        INSERT INTO payout_open AS held ({_KEYS}, {_SUMS})
        SELECT {_KEYS}, {_SUMS} FROM ({_LINES_OF.format(jobs=jobs)}) lines ORDER BY {_KEYS} {_ADD}
    """


_IS_BILLED = "b.price_usd IS NOT NULL AND b.node_id IS NOT NULL AND b.outcome NOT IN ('running', 'lost')"
_JOBS_ARE_BILLED = f"""
CREATE OR REPLACE FUNCTION jobs_are_billed() RETURNS trigger LANGUAGE plpgsql AS $$
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
END $$
"""

# An older replica writes lines beside its jobs. These make them now, so what comes from anywhere else is passed over.
_LINES_ARE_OF_JOBS = """
CREATE OR REPLACE FUNCTION payout_lines_are_of_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RETURN NULL;
END $$
"""
# For as long as this migration runs, its own lines are taken.
_OR_OF_THIS = """
CREATE OR REPLACE FUNCTION payout_lines_are_of_jobs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF current_setting('lucid.migration', true) = 'money' THEN
        RETURN NEW;
    END IF;
    RETURN NULL;
END $$
"""

# A period gets its lines in the transaction that makes it.
_CLOSED_IS_CLOSED = """
CREATE OR REPLACE FUNCTION payout_period_is_open() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (
        SELECT FROM (SELECT DISTINCT period_id FROM added) a LEFT JOIN payout_periods p ON p.id = a.period_id
        WHERE p.xmin IS DISTINCT FROM pg_current_xact_id()::xid
    ) THEN
        RAISE EXCEPTION 'closed periods are append-only, and nothing is added to them';
    END IF;
    RETURN NULL;
END $$
"""

# What a replica without the trigger wrote since lines are kept: by how much the jobs are more than their lines. That no
# longer changes once the triggers are there, because jobs and their lines are written together: nobody is locked out.
_BILL_WHAT_WAS_LEFT_OUT = f"""
    INSERT INTO payout_open AS held ({_KEYS}, {_SUMS})
    SELECT {_KEYS}, {", ".join(f"told.{name} - coalesce(billed.{name}, 0)" for name in _AMOUNTS)}
    FROM ({_LINES_OF.format(jobs="SELECT * FROM jobs")}) told LEFT JOIN (
        SELECT {_KEYS}, {", ".join(f"sum({name}) AS {name}" for name in _AMOUNTS)}
        FROM (SELECT {_KEYS}, {_SUMS} FROM payout_open UNION ALL SELECT {_KEYS}, {_SUMS} FROM payout_lines) lines
        GROUP BY {_KEYS}
    ) billed USING ({_KEYS})
    WHERE told.jobs > coalesce(billed.jobs, 0) ORDER BY {_KEYS}
    {_ADD}
"""
_TRIGGERS = """
CREATE OR REPLACE TRIGGER jobs_are_billed_once AFTER INSERT ON jobs REFERENCING NEW TABLE AS written
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_billed();

CREATE OR REPLACE TRIGGER jobs_are_billed_when_they_end
    AFTER UPDATE ON jobs REFERENCING OLD TABLE AS before NEW TABLE AS written
    FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_billed();

CREATE OR REPLACE TRIGGER payout_open_is_of_jobs BEFORE INSERT ON payout_open
    FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION payout_lines_are_of_jobs();

CREATE OR REPLACE TRIGGER payout_lines_are_complete AFTER INSERT ON payout_lines REFERENCING NEW TABLE AS added
    FOR EACH STATEMENT EXECUTE FUNCTION payout_period_is_open()
"""


def upgrade() -> None:
    """Bill every job from now on in the statement that writes it, and then the jobs that were left out.

    It may be interrupted anywhere, and is then run again.
    """
    for statement in (_JOBS_ARE_BILLED, _OR_OF_THIS, _CLOSED_IS_CLOSED, *_TRIGGERS.split(";")):
        op.execute(statement)
    op.execute(
        "ALTER TABLE payout_terms DROP CONSTRAINT IF EXISTS payout_terms_are_parts, "
        "ADD CONSTRAINT payout_terms_are_parts CHECK (least(provider_bps, model_owner_bps, protocol_bps) >= 0)"
    )
    build_index("payout_open_day_idx", "payout_open (day)")  # commits the triggers
    op.execute("SET LOCAL lucid.migration = 'money'")
    op.execute(_BILL_WHAT_WAS_LEFT_OUT)
    op.execute(_LINES_ARE_OF_JOBS)


def downgrade() -> None:
    """Let replicas write the lines again."""
    op.execute("DROP INDEX payout_open_day_idx")
    op.execute("ALTER TABLE payout_terms DROP CONSTRAINT payout_terms_are_parts")
    for trigger, table in (
        ("jobs_are_billed_once", "jobs"),
        ("jobs_are_billed_when_they_end", "jobs"),
        ("payout_open_is_of_jobs", "payout_open"),
        ("payout_lines_are_complete", "payout_lines"),
    ):
        op.execute(f"DROP TRIGGER {trigger} ON {table}")
    for function in ("jobs_are_billed", "payout_lines_are_of_jobs", "payout_period_is_open"):
        op.execute(f"DROP FUNCTION {function}()")
