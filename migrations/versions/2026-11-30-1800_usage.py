"""Usage: what each key consumes by day and model, added up by a trigger of jobs; and an index of consumers' jobs."""

from __future__ import annotations

from alembic import op

revision = "usage"
down_revision = "settled"
branch_labels = None
depends_on = None

_COUNTS = ("requests", "completed", "failed", "rejected", "cancelled", "tokens_in", "tokens_out")
_SUMS = (*_COUNTS, "price_usd")
_DAYS = f"""
CREATE TABLE IF NOT EXISTS usage_days (
    consumer TEXT NOT NULL,
    day DATE NOT NULL,
    key_id TEXT NOT NULL,
    model_id UUID NOT NULL,
    {" ".join(f"{name} BIGINT NOT NULL," for name in _COUNTS)}
    price_usd NUMERIC NOT NULL,
    CONSTRAINT usage_days_pkey PRIMARY KEY (consumer, day, key_id, model_id)
) WITH (
    fillfactor = 50, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_insert_scale_factor = 0.01,
    autovacuum_analyze_scale_factor = 0.01
)
"""
_MARKS = """
CREATE TABLE IF NOT EXISTS usage_marks (
    is_only BOOLEAN NOT NULL DEFAULT true,
    filled_since timestamptz NOT NULL,
    CONSTRAINT usage_marks_pkey PRIMARY KEY (is_only),
    CONSTRAINT usage_marks_has_one_row CHECK (is_only)
)
"""
_OUTCOMES = ("completed", "failed", "rejected", "cancelled")


def _count(jobs: str) -> str:
    """Return the statement that adds the ended ones of some jobs to the sums, in the order of the keys."""
    outcomes = ", ".join(f"count(*) FILTER (WHERE outcome = '{outcome}')" for outcome in _OUTCOMES)
    return f"""
        INSERT INTO usage_days AS held (consumer, day, key_id, model_id, {", ".join(_SUMS)})
        SELECT consumer, (started_at AT TIME ZONE 'UTC')::date, key_id, model_id,
            count(*) FILTER (WHERE attempt = 1), {outcomes}, coalesce(sum(tokens_in), 0),
            coalesce(sum(tokens_out), 0), coalesce(sum(price_usd), 0)
        FROM ({jobs}) ended WHERE outcome NOT IN ('running', 'lost')
        GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
        ON CONFLICT (consumer, day, key_id, model_id) DO UPDATE SET
            {", ".join(f"{name} = held.{name} + excluded.{name}" for name in _SUMS)}
    """


# Jobs from before the mark are left to `_FILL`, which moves the mark back. Until it has finished, a writer holds the
# mark until its commit: so either `_FILL` finds the job, or the writer finds the mark moved. It takes the mark before
# any sum, as `_FILL` does: so neither waits for the other in a circle.
_FUNCTION = f"""
CREATE OR REPLACE FUNCTION jobs_are_usage() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    mark timestamptz := (SELECT filled_since FROM usage_marks);
BEGIN
    IF mark > '-infinity' THEN
        SELECT filled_since INTO mark FROM usage_marks FOR SHARE;
    END IF;
    IF TG_OP = 'INSERT' THEN
        {_count("SELECT * FROM written WHERE started_at >= mark")};
    ELSE
        {
    _count(
        "SELECT w.* FROM written w JOIN before b USING (id, attempt) "
        "WHERE w.started_at >= mark AND b.outcome IN ('running', 'lost')"
    )
};
    END IF;
    RETURN NULL;
END $$
"""
_SEARCH_PATH = """
DO $$ BEGIN
    EXECUTE format('ALTER FUNCTION jobs_are_usage() SET search_path = %I, pg_temp', current_schema());
END $$
"""

# Each batch is a transaction: it counts the newest 20,000 jobs before the mark, and moves the mark back to them. So a
# kill loses no batch and repeats none. The mark is locked first: what its holders have written is seen afterwards.
_FILL = f"""
DO $$
DECLARE
    mark timestamptz;
    start timestamptz;
BEGIN
    LOOP
        SELECT filled_since INTO mark FROM usage_marks FOR UPDATE;
        EXIT WHEN mark = '-infinity';
        IF mark = 'infinity' THEN
            UPDATE usage_marks SET filled_since = greatest(
                clock_timestamp(), (SELECT max(started_at) FROM jobs) + interval '1 microsecond'
            );
            COMMIT;
            CONTINUE;
        END IF;
        SELECT min(started_at) INTO start FROM (
            SELECT started_at FROM jobs WHERE started_at < mark ORDER BY started_at DESC LIMIT 20000
        ) newest;
        {_count("SELECT * FROM jobs WHERE started_at >= start AND started_at < mark")};
        UPDATE usage_marks SET filled_since = coalesce(start, '-infinity');
        COMMIT;
    END LOOP;
END $$
"""


def upgrade() -> None:
    """Create the sums and the trigger, then fill in older jobs beside the writers. All of it may be run again.

    The lock of jobs is held for two changes of the catalogue. Until `_FILL` sets the mark, all jobs are left to it.
    """
    op.execute(_DAYS)
    op.execute("CREATE INDEX IF NOT EXISTS usage_days_of_key_idx ON usage_days (key_id, day)")
    op.execute("CREATE INDEX IF NOT EXISTS usage_days_day_idx ON usage_days (day)")
    op.execute(_MARKS)
    op.execute(_FUNCTION)
    op.execute(_SEARCH_PATH)
    op.execute("INSERT INTO usage_marks (filled_since) VALUES ('infinity') ON CONFLICT DO NOTHING")
    op.execute("LOCK TABLE jobs IN SHARE ROW EXCLUSIVE MODE")
    op.execute(
        "CREATE OR REPLACE TRIGGER jobs_are_usage_once AFTER INSERT ON jobs REFERENCING NEW TABLE AS written "
        "FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_usage()"
    )
    op.execute(
        "CREATE OR REPLACE TRIGGER jobs_are_usage_when_they_end AFTER UPDATE ON jobs "
        "REFERENCING OLD TABLE AS before NEW TABLE AS written "
        "FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_usage()"
    )
    with op.get_context().autocommit_block():
        op.execute(_FILL)
        op.execute("DROP INDEX CONCURRENTLY IF EXISTS jobs_newest_of_consumer_idx")
        op.execute("CREATE INDEX CONCURRENTLY jobs_newest_of_consumer_idx ON jobs (consumer, started_at DESC)")


def downgrade() -> None:
    """Drop the sums. What the jobs that are kept add up to is filled in again by an upgrade."""
    op.execute("DROP INDEX jobs_newest_of_consumer_idx")
    op.execute("DROP TRIGGER jobs_are_usage_once ON jobs")
    op.execute("DROP TRIGGER jobs_are_usage_when_they_end ON jobs")
    op.execute("DROP FUNCTION jobs_are_usage()")
    op.execute("DROP TABLE usage_marks")
    op.execute("DROP TABLE usage_days")
