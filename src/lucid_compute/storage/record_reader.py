"""Reads the records of a node, an owner or all: what was measured in each step of a timeline.

What has been added up is read as it is, the rest from the shorter records: each job counts once at every instant.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import RowMapping, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.fleet.outages import Outage, merge_outages
from lucid_compute.records import Gauge, GaugeRecord, JobRecord, Measured, StateRecord
from lucid_compute.storage.database import Database
from lucid_compute.storage.record_columns import GAUGES, JOB_COLUMNS, WIDE
from lucid_compute.storage.record_keeper import Retention
from lucid_compute.storage.record_read_sql import STATE_SUMS, STATE_SUMS_OF_NODES, Scope, Tier, gauges_sql, jobs_sql
from lucid_compute.timeline import StateSum, Timeline, cut, integrate

_PLAIN = [column.name for column in JOB_COLUMNS if column.name not in {"spread", "faults"}]
_OUTAGES = text("SELECT started_at, ended_at FROM outages WHERE ended_at > :since AND started_at < :until")
_BEGAN = text("SELECT began_at FROM record_marks")


class Wanted(NamedTuple):
    """Whose records: a node's, an owner's nodes', or, with neither, those of all nodes and upstreams; of one model."""

    node_id: str | None = None
    owner: str | None = None
    model_id: str | None = None

    @property
    def scope(self) -> Scope:
        """Which of the three it is."""
        if self.node_id is not None:
            return Scope.NODE
        return Scope.ALL if self.owner is None else Scope.OWNER


class Measurement(NamedTuple):
    """What was measured in each step of a timeline, and when the registry itself was away meanwhile."""

    steps: list[Measured]
    outages: tuple[Outage, ...]


class RecordReader:
    """Reads records from Postgres."""

    def __init__(self, database: Database, retention: Retention) -> None:
        """Read from `database`, which keeps records for as long as `retention` says."""
        self._database = database
        self._retention = retention

    async def measure(
        self, wanted: Wanted, timeline: Timeline, *, now: datetime, known_since: datetime | None
    ) -> Measurement:
        """Answer what was measured in each step. Nothing is known of jobs before `known_since` and after `now`.

        Raises:
            DatabaseUnavailable: as named.
        """
        tier = _tier_of(timeline.step)
        until = max(min(timeline.until, now + timeline.step), timeline.since)
        values = {"since": timeline.since, "until": until, "step": timeline.step, **wanted._asdict()}
        async with self._database.transaction() as connection:
            began_at = await connection.scalar(_BEGAN)
            jobs = await _read(connection, jobs_sql(wanted.scope, tier, of_model=wanted.model_id is not None), values)
            gauges = await _read(connection, gauges_sql(wanted.scope, tier), values)
            outages = await _read_outages(connection, timeline.since, until)
            states = await _read_states(connection, wanted, [min(edge, now) for edge in timeline.edges()], outages)
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
        return Measurement(steps, outages)

    async def measure_jobs(self, wanted: Wanted, timeline: Timeline, *, now: datetime) -> list[Measured]:
        """Answer the jobs of each step alone, at the cost of one look.

        Raises:
            DatabaseUnavailable: as named.
        """
        values = {"since": timeline.since, "until": timeline.until, "step": timeline.step, **wanted._asdict()}
        statement = jobs_sql(wanted.scope, _tier_of(timeline.step), of_model=wanted.model_id is not None)
        async with self._database.transaction() as connection:
            jobs = await _read(connection, statement, values)
        steps = [_known_part(start, start + timeline.step, start, now) for start in timeline.starts()]
        for start, step in zip(timeline.starts(), steps, strict=True):
            if start in jobs:
                step.jobs = _read_jobs(jobs[start])
        return steps

    async def states(self, wanted: Wanted, lengths: Sequence[timedelta], *, now: datetime) -> list[StateRecord]:
        """Answer how long nodes were in each state in the last `lengths` of time.

        Raises:
            DatabaseUnavailable: as named.
        """
        edges = _edges_of(lengths, now)
        async with self._database.transaction() as connection:
            outages = await _read_outages(connection, edges[0], now)
            states = await _read_states(connection, wanted, edges, outages)
        return _windows_of(states, edges, lengths)

    async def states_of_nodes(
        self, node_ids: Sequence[str], lengths: Sequence[timedelta], *, now: datetime
    ) -> dict[str, list[StateRecord]]:
        """Answer `states` of each of the nodes, in one look.

        Raises:
            DatabaseUnavailable: as named.
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
    """Answer the longest records that fit into the step."""
    return next(tier for tier in (Tier.DAYS, Tier.HOURS, Tier.MINUTES) if step >= tier.length)


def _known_part(start: datetime, end: datetime, since: datetime, now: datetime) -> Measured:
    """Answer a step of which jobs are known from `since` until `now`: none there is one that none started in."""
    seconds = _seconds_between(max(start, since), min(end, now))
    return Measured(seconds, JobRecord()) if seconds else Measured()


def _seconds_between(since: datetime, until: datetime) -> float:
    return max((until - since).total_seconds(), 0.0)


async def _read(connection: AsyncConnection, statement: str, values: dict[str, Any]) -> dict[datetime, RowMapping]:
    found = await connection.execute(text(statement), values)
    return {row["bucket"]: row for row in found.mappings()}


def _edges_of(lengths: Sequence[timedelta], now: datetime) -> list[datetime]:
    return [*(now - length for length in sorted({*lengths}, reverse=True)), now]


def _windows_of(
    states: Sequence[StateRecord], edges: Sequence[datetime], lengths: Sequence[timedelta]
) -> list[StateRecord]:
    """Answer the windows that end where the last of the states does, each as long as one of `lengths`."""
    windows = []
    for length in lengths:
        window = StateRecord()
        for start, state in zip(edges, states, strict=False):
            if start >= edges[-1] - length:
                window.add(state)
        windows.append(window)
    return windows


async def _read_states(
    connection: AsyncConnection, wanted: Wanted, edges: Sequence[datetime], outages: tuple[Outage, ...]
) -> list[StateRecord]:
    cuts = cut(edges, outages)
    values = {"since": cuts[0], "until": cuts[-1], "cuts": cuts, "node_id": wanted.node_id, "owner": wanted.owner}
    found = await connection.execute(text(STATE_SUMS[wanted.scope]), values) if len(cuts) > 1 else ()
    return integrate([StateSum(*row) for row in found], edges, outages)


async def _read_outages(connection: AsyncConnection, since: datetime, until: datetime) -> tuple[Outage, ...]:
    found = await connection.execute(_OUTAGES, {"since": since, "until": until})
    return merge_outages(Outage(*row) for row in found)


def _read_jobs(row: RowMapping) -> JobRecord:
    record = JobRecord(**{name: row[name] for name in _PLAIN})
    record.spread = Counter({element >> WIDE.bits: element & WIDE.most for element in row["spread"] or ()})
    record.faults = Counter(json.loads(row["faults"]) if row["faults"] else {})
    return record


def _read_gauges(row: RowMapping) -> GaugeRecord:
    gauges = {name: Gauge(row[f"{name}_count"] or 0, row[f"{name}_sum"] or 0.0, row[f"{name}_max"]) for name in GAUGES}
    return GaugeRecord(row["samples"], {name: gauge for name, gauge in gauges.items() if gauge.count})
