"""Reads the rollups of a node, an owner or everything, for each step of a timeline.

What is not in longer rollups yet is read from shorter ones, so that each job counts exactly once at any time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.measured import Gauge, GaugeRollup, JobRollup, SpanMetrics, StateRollup
from lucid_compute.accounting.rollup_columns import (
    ALL_NODES,
    GAUGE_COLUMNS,
    GAUGES,
    JOB_COLUMNS,
    NARROW,
    UPSTREAM,
    WIDE,
    Merge,
    RollupColumn,
    add_up,
    owner_scope,
)
from lucid_compute.accounting.rollups import Retention
from lucid_compute.accounting.timeline import StateSum, Timeline, cut, integrate
from lucid_compute.postgres.database import Database
from lucid_compute.registry.fleet.replicas import Outage, merge_outages


class RollupScope(Enum):
    """Whose rollups are read."""

    NODE = "node"
    OWNER = "owner"
    ALL = "all"


class Tier(Enum):
    """The length of rollups."""

    MINUTES = "minutes"
    HOURS = "hours"
    DAYS = "days"

    @property
    def length(self) -> timedelta:
        """Return the length as a span of time."""
        return timedelta(**{self.value: 1})


_SCOPE_IDS = {
    RollupScope.NODE: "CAST(:node_id AS uuid)",
    RollupScope.OWNER: owner_scope("CAST(:owner AS text)"),
    RollupScope.ALL: f"'{ALL_NODES}'::uuid",
}
_OPEN_OF = {
    RollupScope.NODE: "node_id = CAST(:node_id AS uuid)",
    RollupScope.OWNER: f"node_owner = CAST(:owner AS text) AND node_id <> '{UPSTREAM}'",
    RollupScope.ALL: "true",
}
# Up to where a table is complete. Behind it there may be a part of an hour or a day that is being added up.
_MARKS = {Tier.HOURS: "hours_until", Tier.DAYS: "days_until"}
# The tables to read for each tier, and the mark from which on a shorter table has what the longer one lacks.
_SHORTER = {
    Tier.MINUTES: ((Tier.MINUTES, None),),
    Tier.HOURS: ((Tier.HOURS, None), (Tier.MINUTES, "hours_until")),
    Tier.DAYS: ((Tier.DAYS, None), (Tier.HOURS, "days_until"), (Tier.MINUTES, "hours_until")),
}


@cache
def jobs_sql(scope: RollupScope, tier: Tier, *, of_model: bool) -> str:
    """Return the statement that reads jobs by `:since`, `:until`, `:step`, and `:node_id`, `:owner` or `:model_id`.

    Owners, and everything, have rollups of all models together; a node has only one for each model.
    """
    if of_model:
        model = "AND model_id = CAST(:model_id AS uuid)"
    else:
        model = "" if scope is RollupScope.NODE else f"AND model_id = '{UPSTREAM}'"
    of_open = "AND model_id = CAST(:model_id AS uuid)" if of_model else ""
    return _select_of(
        "job", JOB_COLUMNS, tier, f"scope_id = {_SCOPE_IDS[scope]} {model}", f"{_OPEN_OF[scope]} {of_open}"
    )


@cache
def gauges_sql(scope: RollupScope, tier: Tier) -> str:
    """Return the statement that reads samples of heartbeats, with the same parameters."""
    return _select_of("gauge", GAUGE_COLUMNS, tier, f"scope_id = {_SCOPE_IDS[scope]}", _OPEN_OF[scope])


def _select_of(kind: str, columns: tuple[RollupColumn, ...], tier: Tier, condition: str, open_condition: str) -> str:
    narrow, wide = _widened(columns), ", ".join(column.name for column in columns)
    of_open = f"bucket >= :since AND bucket < :until AND {open_condition}"
    parts = [f"SELECT bucket, {narrow} FROM {kind}_open WHERE {of_open}"]
    for shorter, mark in _SHORTER[tier]:
        table = f"{kind}_{shorter.value}"
        shown = narrow if shorter is Tier.MINUTES else wide
        # Each bucket is looked up by its key (OFFSET prevents another plan): rollups are stored by time.
        parts.append(f"""
            SELECT r.* FROM generate_series({_first(table, mark)}, {_end(shorter)} - interval '1 second',
                interval '1 {shorter.value}') AS at, LATERAL (
                SELECT bucket, {shown} FROM {table} WHERE bucket = at AND {condition}
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
    """Return where to begin in a table: at the mark up to which longer rollups have it, not before its first row."""
    since = f"greatest(CAST(:since AS timestamptz), (SELECT min(bucket) FROM {table}))"
    return since if mark is None else f"greatest({since}, (SELECT {mark} FROM record_marks))"


def _end(tier: Tier) -> str:
    """Return where to end in a table."""
    until = "CAST(:until AS timestamptz)"
    return f"least({until}, (SELECT {_MARKS[tier]} FROM record_marks))" if tier in _MARKS else until


def _widened(columns: tuple[RollupColumn, ...]) -> str:
    """Return the columns of a minute's rollup, converted to the types of longer ones."""
    element = f"(v >> {NARROW.bits})::bigint << {WIDE.bits} | (v & {NARROW.most})"
    spread = f"(SELECT array_agg({element}) FROM unnest(spread) v) AS spread"
    return ", ".join(spread if column.merge is Merge.SPREAD else column.name for column in columns)


_STATES_OF = {
    RollupScope.NODE: "node_id = CAST(:node_id AS uuid)",
    RollupScope.OWNER: "owner = CAST(:owner AS text)",
    RollupScope.ALL: "true",
}
_PASSPORTS_OF = {
    RollupScope.NODE: "id = CAST(:node_id AS uuid)",
    RollupScope.OWNER: "type = 'compute' AND owner = CAST(:owner AS text)",
    RollupScope.ALL: "type = 'compute'",
}


def _sums(states: str, keys: str) -> str:
    """Return the statement that adds up the changes of `states` by the spans between the instants `:cuts`.

    A fleet has hundreds of thousands of changes a month; Postgres reduces them to a few rows a span.
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
    for scope in RollupScope
}
"""Reads the sum of changes of state in each span between `:cuts`, the instants from `:since` to `:until`."""
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
"""Reads the same for each of the nodes `:ids`."""
_PLAIN = [column.name for column in JOB_COLUMNS if column.name not in {"spread", "faults"}]
_OUTAGES = text("SELECT started_at, ended_at FROM outages WHERE ended_at > :since AND started_at < :until")
_BEGAN = text("SELECT began_at FROM record_marks")


class RollupQuery(NamedTuple):
    """Which rollups: a node's, an owner's nodes', or with neither everyone's and those of upstreams; of one model."""

    node_id: str | None = None
    owner: str | None = None
    model_id: str | None = None

    @property
    def scope(self) -> RollupScope:
        """Whether a node, an owner or everything is read."""
        if self.node_id is not None:
            return RollupScope.NODE
        return RollupScope.ALL if self.owner is None else RollupScope.OWNER


class TimelineMetrics(NamedTuple):
    """The metrics of each step of a timeline, and the registry's own outages in that time."""

    steps: list[SpanMetrics]
    outages: tuple[Outage, ...]


class RollupReader:
    """Reads rollups and states of nodes from Postgres."""

    def __init__(self, database: Database, retention: Retention) -> None:
        """Read from `database`, which keeps rollups for as long as `retention` says."""
        self._database = database
        self._retention = retention

    async def measure(
        self, query: RollupQuery, timeline: Timeline, *, now: datetime, known_since: datetime | None
    ) -> TimelineMetrics:
        """Return the metrics of each step. Before `known_since` and after `now` jobs are unknown, which is not 0.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        tier = _tier_of(timeline.step)
        until = max(min(timeline.until, now + timeline.step), timeline.since)
        values = {"since": timeline.since, "until": until, "step": timeline.step, **query._asdict()}
        async with self._database.transaction() as connection:
            began_at = await connection.scalar(_BEGAN)
            jobs = await _read(connection, jobs_sql(query.scope, tier, of_model=query.model_id is not None), values)
            gauges = await _read(connection, gauges_sql(query.scope, tier), values)
            outages = await _read_outages(connection, timeline.since, until)
            states = await _read_states(connection, query, [min(edge, now) for edge in timeline.edges()], outages)
        began_at = max(began_at, known_since or began_at)
        jobs_since, states_since = (max(began_at, self._kept_since(kept, now)) for kept in (tier, Tier.HOURS))
        steps = []
        for start, state in zip(timeline.starts(), states, strict=True):
            step = _known_part(start, start + timeline.step, jobs_since, now)
            step.states = state
            state.known_seconds = _seconds_between(max(start, states_since), min(start + timeline.step, now))
            if start in jobs:
                step.jobs = _read_jobs(jobs[start])
            if start in gauges:
                step.gauges = _read_gauges(gauges[start])
            steps.append(step)
        return TimelineMetrics(steps, outages)

    async def measure_jobs(self, query: RollupQuery, timeline: Timeline, *, now: datetime) -> list[SpanMetrics]:
        """Return the jobs of each step, without gauges and states, by one statement.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        values = {"since": timeline.since, "until": timeline.until, "step": timeline.step, **query._asdict()}
        statement = jobs_sql(query.scope, _tier_of(timeline.step), of_model=query.model_id is not None)
        async with self._database.transaction() as connection:
            jobs = await _read(connection, statement, values)
        steps = [_known_part(start, start + timeline.step, start, now) for start in timeline.starts()]
        for start, step in zip(timeline.starts(), steps, strict=True):
            if start in jobs:
                step.jobs = _read_jobs(jobs[start])
        return steps

    async def states(self, query: RollupQuery, lengths: Sequence[timedelta], *, now: datetime) -> list[StateRollup]:
        """Return how long nodes were in each state in the last `lengths` of time.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        edges = _edges_of(lengths, now)
        async with self._database.transaction() as connection:
            outages = await _read_outages(connection, edges[0], now)
            states = await _read_states(connection, query, edges, outages)
        return _windows_of(states, edges, lengths)

    async def states_of_nodes(
        self, node_ids: Sequence[str], lengths: Sequence[timedelta], *, now: datetime
    ) -> dict[str, list[StateRollup]]:
        """Return the same for each of the nodes, by one statement.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        edges = _edges_of(lengths, now)
        sums: dict[str, list[StateSum]] = {node_id: [] for node_id in node_ids}
        async with self._database.transaction() as connection:
            outages = await _read_outages(connection, edges[0], now)
            values = {"ids": list(node_ids), "since": edges[0], "until": now, "cuts": cut(edges, outages)}
            for node_id, *each in await connection.execute(text(STATE_SUMS_OF_NODES), values):
                sums[str(node_id)].append(StateSum(*each))
        return {
            node_id: _windows_of(integrate(found, edges, outages), edges, lengths) for node_id, found in sums.items()
        }

    def _kept_since(self, tier: Tier, now: datetime) -> datetime:
        kept = {
            Tier.MINUTES: timedelta(hours=self._retention.minutes_hours),
            Tier.HOURS: timedelta(days=self._retention.hours_days),
            Tier.DAYS: timedelta(days=self._retention.days_days),
        }
        return now - kept[tier]


def _tier_of(step: timedelta) -> Tier:
    """Return the longest tier that fits into the step."""
    return next(tier for tier in (Tier.DAYS, Tier.HOURS, Tier.MINUTES) if step >= tier.length)


def _known_part(start: datetime, end: datetime, since: datetime, now: datetime) -> SpanMetrics:
    """Return a step whose jobs are known from `since` until `now`: no jobs, or unknown outside of that time."""
    seconds = _seconds_between(max(start, since), min(end, now))
    return SpanMetrics(seconds, JobRollup()) if seconds else SpanMetrics()


def _seconds_between(since: datetime, until: datetime) -> float:
    return max((until - since).total_seconds(), 0.0)


async def _read(connection: AsyncConnection, statement: str, values: dict[str, Any]) -> dict[datetime, RowMapping]:
    rows = await connection.execute(text(statement), values)
    return {row["bucket"]: row for row in rows.mappings()}


def _edges_of(lengths: Sequence[timedelta], now: datetime) -> list[datetime]:
    return [*(now - length for length in sorted({*lengths}, reverse=True)), now]


def _windows_of(
    states: Sequence[StateRollup], edges: Sequence[datetime], lengths: Sequence[timedelta]
) -> list[StateRollup]:
    """Return the windows that end with the last edge and have these `lengths`."""
    windows = []
    for length in lengths:
        window = StateRollup()
        for start, state in zip(edges, states, strict=False):
            if start >= edges[-1] - length:
                window.add(state)
        windows.append(window)
    return windows


async def _read_states(
    connection: AsyncConnection, query: RollupQuery, edges: Sequence[datetime], outages: tuple[Outage, ...]
) -> list[StateRollup]:
    cuts = cut(edges, outages)
    values = {"since": cuts[0], "until": cuts[-1], "cuts": cuts, "node_id": query.node_id, "owner": query.owner}
    rows = await connection.execute(text(STATE_SUMS[query.scope]), values) if len(cuts) > 1 else ()
    return integrate([StateSum(*row) for row in rows], edges, outages)


async def _read_outages(connection: AsyncConnection, since: datetime, until: datetime) -> tuple[Outage, ...]:
    rows = await connection.execute(_OUTAGES, {"since": since, "until": until})
    return merge_outages(Outage(*row) for row in rows)


def _read_jobs(row: RowMapping) -> JobRollup:
    rollup = JobRollup(**{name: row[name] for name in _PLAIN})
    rollup.spread = Counter({element >> WIDE.bits: element & WIDE.most for element in row["spread"] or ()})
    rollup.faults = Counter(json.loads(row["faults"]) if row["faults"] else {})
    return rollup


def _read_gauges(row: RowMapping) -> GaugeRollup:
    gauges = {name: Gauge(row[f"{name}_count"] or 0, row[f"{name}_sum"] or 0.0, row[f"{name}_max"]) for name in GAUGES}
    return GaugeRollup(row["samples"], {name: gauge for name, gauge in gauges.items() if gauge.count})
