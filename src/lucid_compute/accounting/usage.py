"""What consumers use: the trigger of `jobs` that adds it up by key, day and model, and the reader of these sums.

Migrations create the trigger. `FUNCTIONS` and `TRIGGERS` show the current definition, and a test compares it with the
database.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any, NamedTuple

from sqlalchemy import text

from lucid_compute.accounting.jobs import UsageGroup
from lucid_compute.accounting.tables import USAGE_COUNTS
from lucid_compute.errors import InvalidRequest
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.key_limits import BudgetPeriod, KeyLimits
from lucid_compute.registry.keys.budgets import KeyBudgets

MAX_LINES = 10_000
MAX_BUDGETS = 1000
_SUMS = (*USAGE_COUNTS, "price_usd")
_OUTCOMES = ("completed", "failed", "rejected", "cancelled")

# The sums of the ended jobs `{jobs}`. The keys are in order, so that two writers never wait for each other.
_SUMS_OF = """
    SELECT consumer, (started_at AT TIME ZONE 'UTC')::date, key_id, model_id, count(*) FILTER (WHERE attempt = 1),
        {outcomes}, coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0), coalesce(sum(price_usd), 0)
    FROM ({{jobs}}) ended WHERE outcome NOT IN ('running', 'lost')
    GROUP BY 1, 2, 3, 4 ORDER BY 1, 2, 3, 4
""".format(outcomes=", ".join(f"count(*) FILTER (WHERE outcome = '{outcome}')" for outcome in _OUTCOMES))


def _count(jobs: str) -> str:
    """Return the statement that adds jobs to the sums."""
    return f"""
        INSERT INTO usage_days AS held (consumer, day, key_id, model_id, {", ".join(_SUMS)})
        {_SUMS_OF.format(jobs=jobs)}
        ON CONFLICT (consumer, day, key_id, model_id) DO UPDATE SET
            {", ".join(f"{name} = held.{name} + excluded.{name}" for name in _SUMS)}
    """


# Jobs from before `filled_since` are left to the migration that fills in older ones. While it does, a writer of such a
# job holds the mark until its commit: so either the migration finds the job, or the writer finds the new mark.
_COUNT_JOBS = f"""
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
END
"""
FUNCTIONS = {"jobs_are_usage": _COUNT_JOBS}
"""The bodies of the trigger functions, in PL/pgSQL; compared with the database by a test."""

TRIGGERS = {
    "jobs_are_usage_once": """
        AFTER INSERT ON jobs REFERENCING NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_usage()""",
    "jobs_are_usage_when_they_end": """
        AFTER UPDATE ON jobs REFERENCING OLD TABLE AS before NEW TABLE AS written
        FOR EACH STATEMENT EXECUTE FUNCTION jobs_are_usage()""",
}
"""The triggers of `jobs`; compared with the database by a test."""


class UsageSums(NamedTuple):
    """Sums of requests. `requests` counts each once, `failed` and `rejected` count attempts."""

    requests: int
    completed: int
    failed: int
    rejected: int
    cancelled: int
    tokens_in: int
    tokens_out: int
    price_usd: Decimal

    @property
    def errors(self) -> int:
        """Requests that were neither completed nor cancelled. One that is being tried again counts until it is."""
        return max(self.requests - self.completed - self.cancelled, 0)


class UsageLine(NamedTuple):
    """The sums of one group; what it is not grouped by is None. A name is None if nothing has it any more."""

    sums: UsageSums
    day: date | None = None
    model_id: str | None = None
    model: str | None = None
    key_id: str | None = None
    key: str | None = None
    owner: str | None = None


class SpentBudget(NamedTuple):
    """A key's budget, and what it has spent of it in the period that is under way."""

    key_id: str
    name: str
    usd: Decimal
    period: BudgetPeriod
    spent_usd: Decimal


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """Which usage to read: of the days from `since` until before `until`; None sets no condition."""

    since: date
    until: date
    owner: str | None = None
    key_id: str | None = None
    model_ids: Sequence[str] | None = None


_COLUMNS = {
    UsageGroup.DAY: "day",
    UsageGroup.MODEL: "model_id",
    UsageGroup.KEY: "key_id",
    UsageGroup.OWNER: "consumer",
}
_CONDITION = """
    day >= :since AND day < :until
    AND (CAST(:owner AS text) IS NULL OR consumer = :owner)
    AND (CAST(:key_id AS text) IS NULL OR key_id = :key_id)
    AND (CAST(:model_ids AS uuid[]) IS NULL OR model_id = ANY(:model_ids))
"""
_ADDED_UP = ", ".join(f"coalesce(sum({name}), 0)::int8 {name}" for name in USAGE_COUNTS)
_ADDED_UP += ", coalesce(sum(price_usd), 0) price_usd"
# Each day is looked up by its key.
_SPENT = text("""
    SELECT u.key_id, sum(u.price_usd)
    FROM unnest(CAST(:key_ids AS text[])) k (id), LATERAL (
        SELECT key_id, price_usd FROM usage_days WHERE key_id = k.id AND day >= :since OFFSET 0
    ) u
    GROUP BY u.key_id
""")
_BUDGETS = text("""
    SELECT id, name, limits FROM api_keys
    WHERE owner = :owner AND revoked_at IS NULL AND limits ? 'budgetUsd' ORDER BY name, id LIMIT :most
""")
CLEAN_USAGE = "DELETE FROM usage_days WHERE day < (now() AT TIME ZONE 'UTC')::date - $1::int"


class UsageReader:
    """Reads what consumers have used."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def read(self, query: UsageQuery, by: Collection[UsageGroup]) -> tuple[list[UsageLine], UsageSums]:
        """Return a line for each group, in the order of its keys, and the sums of all of them, from one snapshot.

        Raises:
            InvalidRequest: there would be too many lines.
        """
        groups = [group for group in UsageGroup if group in by]
        async with self._database.transaction() as connection:
            found = await connection.execute(text(_lines_sql(groups)), self._values(query))
            rows = found.mappings().all()
        if len(rows) > MAX_LINES:
            message = f"That is more than {MAX_LINES:,} lines. Send a shorter span, or group by less."
            raise InvalidRequest.at("query.groupBy", message)
        lines = [_read_line(row) for row in rows]
        return lines, add_up([line.sums for line in lines])

    async def spent(self, key_ids: Sequence[str], since: datetime) -> dict[str, Decimal]:
        """Return what the requests of each key have cost since the day that begins at `since`.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            rows = await connection.execute(_SPENT, {"key_ids": list(key_ids), "since": since.date()})
            return {row[0]: row[1] for row in rows}

    async def budgets(self, owner: str, now: datetime) -> list[SpentBudget]:
        """Return the budgets of the owner's keys, by their names: of `MAX_BUDGETS` keys at most.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        async with self._database.transaction() as connection:
            rows = await connection.execute(_BUDGETS, {"owner": owner, "most": MAX_BUDGETS})
            keys = [(id_, name, KeyLimits.model_validate(limits)) for id_, name, limits in rows]
        spent: dict[str, Decimal] = {}
        for period in BudgetPeriod:
            if ids := [key_id for key_id, _, limits in keys if limits.budget_period is period]:
                spent |= await self.spent(ids, period.starts_at(now))
        return [
            SpentBudget(key_id, name, limits.budget_usd, limits.budget_period, spent.get(key_id, Decimal(0)))
            for key_id, name, limits in keys
            if limits.budget_usd is not None and limits.budget_period is not None
        ]

    @staticmethod
    def _values(query: UsageQuery) -> dict[str, Any]:
        return {
            "since": query.since,
            "until": query.until,
            "owner": query.owner,
            "key_id": query.key_id,
            "model_ids": None if query.model_ids is None else list(query.model_ids),
            "most": MAX_LINES + 1,
        }


class UsageParts(NamedTuple):
    """What routes read usage from, and what refuses the requests of keys that have spent their budgets."""

    reader: UsageReader
    budgets: KeyBudgets


def build_usage(database: Database) -> UsageParts:
    """Return the parts of one replica."""
    reader = UsageReader(database)
    return UsageParts(reader, KeyBudgets(reader.spent))


def add_up(sums: Sequence[UsageSums]) -> UsageSums:
    """Return the sums of all."""
    return UsageSums(
        requests=sum(each.requests for each in sums),
        completed=sum(each.completed for each in sums),
        failed=sum(each.failed for each in sums),
        rejected=sum(each.rejected for each in sums),
        cancelled=sum(each.cancelled for each in sums),
        tokens_in=sum(each.tokens_in for each in sums),
        tokens_out=sum(each.tokens_out for each in sums),
        price_usd=sum((each.price_usd for each in sums), Decimal(0)),
    )


def _lines_sql(groups: Sequence[UsageGroup]) -> str:
    """Return the statement for the lines; names are joined after adding up."""
    columns = ", ".join(_COLUMNS[group] for group in groups)
    names, joins = "", ""
    if UsageGroup.MODEL in groups:
        names += ", m.name AS model"
        joins += " LEFT JOIN passports m ON m.id = u.model_id"
    if UsageGroup.KEY in groups:
        names += ", k.name AS key"
        joins += " LEFT JOIN api_keys k ON k.id = u.key_id"
    grouped = f"GROUP BY {columns}" if columns else ""
    ordered = f"ORDER BY {columns}" if columns else ""
    return f"""
        WITH u AS (
            SELECT {columns}{"," if columns else ""} {_ADDED_UP} FROM usage_days WHERE {_CONDITION}
            {grouped} {ordered} LIMIT :most
        )
        SELECT u.*{names} FROM u{joins} {ordered}
    """


def _read_line(row: Any) -> UsageLine:
    model_id = row.get("model_id")
    return UsageLine(
        sums=UsageSums(*(row[name] for name in UsageSums._fields)),
        day=row.get("day"),
        model_id=None if model_id is None else str(model_id),
        model=row.get("model"),
        key_id=row.get("key_id"),
        key=row.get("key"),
        owner=row.get("consumer"),
    )
