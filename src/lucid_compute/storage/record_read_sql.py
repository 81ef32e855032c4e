"""The statements that read records: those of a scope, in steps, from the tables that hold each job once."""

from __future__ import annotations

from datetime import timedelta
from enum import Enum
from functools import cache

from lucid_compute.storage.record_columns import (
    ALL_NODES,
    GAUGE_COLUMNS,
    JOB_COLUMNS,
    NARROW,
    UPSTREAM,
    WIDE,
    Merge,
    RecordColumn,
    add_up,
    owner_scope,
)


class Scope(Enum):
    """Whose records are read."""

    NODE = "node"
    OWNER = "owner"
    ALL = "all"


class Tier(Enum):
    """How long the records are that are read first."""

    MINUTES = "minutes"
    HOURS = "hours"
    DAYS = "days"

    @property
    def length(self) -> timedelta:
        """How long one is."""
        return timedelta(**{self.value: 1})


_SCOPE_IDS = {
    Scope.NODE: "CAST(:node_id AS uuid)",
    Scope.OWNER: owner_scope("CAST(:owner AS text)"),
    Scope.ALL: f"'{ALL_NODES}'::uuid",
}
_OPEN_OF = {
    Scope.NODE: "node_id = CAST(:node_id AS uuid)",
    Scope.OWNER: f"node_owner = CAST(:owner AS text) AND node_id <> '{UPSTREAM}'",
    Scope.ALL: "true",
}
# Which tables hold the rest of what a longer one has not got yet, and from which mark on.
_SHORTER = {
    Tier.MINUTES: ((Tier.MINUTES, None),),
    Tier.HOURS: ((Tier.HOURS, None), (Tier.MINUTES, "hours_until")),
    Tier.DAYS: ((Tier.DAYS, None), (Tier.HOURS, "days_until"), (Tier.MINUTES, "hours_until")),
}


@cache
def jobs_sql(scope: Scope, tier: Tier, *, of_model: bool) -> str:
    """Answer the statement that reads jobs: of `:node_id` or `:owner`, by `:since`, `:until`, `:step`, `:model_id`.

    Owners and all have a record of all models together; a node has one for each.
    """
    if of_model:
        model = "AND model_id = CAST(:model_id AS uuid)"
    else:
        model = "" if scope is Scope.NODE else f"AND model_id = '{UPSTREAM}'"
    of_open = "AND model_id = CAST(:model_id AS uuid)" if of_model else ""
    return _read("job", JOB_COLUMNS, tier, f"scope_id = {_SCOPE_IDS[scope]} {model}", f"{_OPEN_OF[scope]} {of_open}")


@cache
def gauges_sql(scope: Scope, tier: Tier) -> str:
    """Answer the statement that reads samples of heartbeats, by the same names."""
    return _read("gauge", GAUGE_COLUMNS, tier, f"scope_id = {_SCOPE_IDS[scope]}", _OPEN_OF[scope])


def _read(kind: str, columns: tuple[RecordColumn, ...], tier: Tier, is_wanted: str, is_wanted_open: str) -> str:
    narrow, wide = _widened(columns), ", ".join(column.name for column in columns)
    of_open = f"bucket >= :since AND bucket < :until AND {is_wanted_open}"
    parts = [f"SELECT bucket, {narrow} FROM {kind}_open WHERE {of_open}"]
    for shorter, mark in _SHORTER[tier]:
        table = f"{kind}_{shorter.value}"
        shown = narrow if shorter is Tier.MINUTES else wide
        # Each is looked up by its key (OFFSET keeps the lookup one): records stand in the order of time.
        parts.append(f"""
            SELECT r.* FROM generate_series({_first(table, mark)}, CAST(:until AS timestamptz) - interval '1 second',
                interval '1 {shorter.value}') AS at, LATERAL (
                SELECT bucket, {shown} FROM {table} WHERE bucket = at AND {is_wanted}
                OFFSET 0
            ) r
        """)
    shown = ", ".join(f"{c.name}::text" if c.merge is Merge.FAULTS else c.name for c in columns)
    return f"""
        WITH parts AS ({" UNION ALL ".join(parts)}),
        binned AS (
            SELECT date_bin(CAST(:step AS interval), bucket, 'epoch'::timestamptz) AS bucket, {wide} FROM parts
        ),
        {add_up(columns, "bucket", source="binned", into="whole", from_=WIDE, to=WIDE)}
        SELECT bucket, {shown} FROM whole
    """


def _first(table: str, mark: str | None) -> str:
    """Answer where to begin in a table: at the mark up to which longer records hold it, not before its first row."""
    since = f"greatest(CAST(:since AS timestamptz), (SELECT min(bucket) FROM {table}))"
    return since if mark is None else f"greatest({since}, (SELECT {mark} FROM record_marks))"


def _widened(columns: tuple[RecordColumn, ...]) -> str:
    """Answer the columns of a record of a minute as longer ones have them."""
    element = f"(v >> {NARROW.bits})::bigint << {WIDE.bits} | (v & {NARROW.most})"
    spread = f"(SELECT array_agg({element}) FROM unnest(spread) v) AS spread"
    return ", ".join(spread if column.merge is Merge.SPREAD else column.name for column in columns)


_STATES_OF = {
    Scope.NODE: "node_id = CAST(:node_id AS uuid)",
    Scope.OWNER: "owner = CAST(:owner AS text)",
    Scope.ALL: "true",
}
_PASSPORTS_OF = {
    Scope.NODE: "id = CAST(:node_id AS uuid)",
    Scope.OWNER: "type = 'compute' AND owner = CAST(:owner AS text)",
    Scope.ALL: "type = 'compute'",
}


def _sums(states: str, keys: str) -> str:
    """Answer the statement that adds the changes of `states` up, by the spans between the instants `:cuts`.

    A fleet's month has hundreds of thousands of changes; Postgres adds them up to a few rows a span.
    """
    return f"""
        WITH states AS ({states}), spans AS (
            SELECT node_id, since, lead(since) OVER (PARTITION BY node_id ORDER BY since) AS until, state FROM states
        ), changes AS (
            SELECT node_id, state, 1 AS change, since AS at FROM spans
            UNION ALL SELECT node_id, state, -1, until FROM spans WHERE until IS NOT NULL
        ), placed AS (
            SELECT *, width_bucket(at, CAST(:cuts AS timestamptz[])) AS place FROM changes
        )
        SELECT {keys} place - 1, state, sum(change)::int8,
            sum(change * extract(epoch FROM (CAST(:cuts AS timestamptz[]))[place + 1] - at))::float8
        FROM placed GROUP BY {keys} place, state
    """


STATE_SUMS = {
    scope: _sums(
        f"""
            SELECT held.node_id, CAST(:since AS timestamptz) AS since, held.state FROM passports p, LATERAL (
                SELECT node_id, state FROM node_states WHERE node_id = p.id AND since <= :since
                ORDER BY since DESC LIMIT 1
            ) held WHERE {_PASSPORTS_OF[scope]}
            UNION ALL
            SELECT node_id, since, state FROM node_states
            WHERE {_STATES_OF[scope]} AND since > :since AND since < :until
        """,
        "",
    )
    for scope in Scope
}
"""What changes of state add up to in each span between `:cuts`, which are the instants from `:since` to `:until`."""

STATE_SUMS_OF_NODES = _sums(
    """
        SELECT n.id AS node_id, CAST(:since AS timestamptz) AS since, held.state
        FROM unnest(CAST(:ids AS uuid[])) AS n (id), LATERAL (
            SELECT state FROM node_states WHERE node_id = n.id AND since <= :since ORDER BY since DESC LIMIT 1
        ) held
        UNION ALL
        SELECT node_id, since, state FROM node_states
        WHERE node_id = ANY(CAST(:ids AS uuid[])) AND since > :since AND since < :until
    """,
    "node_id,",
)
"""The same of each of `:ids`."""
