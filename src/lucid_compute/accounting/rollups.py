"""Moves rollups on: open ones become minutes, minutes become hours, hours become days; deletes old ones.

A statement adds only what it deletes elsewhere, or what `record_marks` says was not added yet, in one transaction. So
nothing counts twice and nothing is lost (docs/adr/0012-records.md).
"""

from __future__ import annotations

import asyncio
import logging
from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from lucid_compute.accounting.exactly_once import ONCE
from lucid_compute.accounting.node_states import CLEAN_STATES
from lucid_compute.accounting.rollup_columns import (
    ALL_NODES,
    GAUGE_COLUMNS,
    JOB_COLUMNS,
    NARROW,
    UPSTREAM,
    WIDE,
    RollupColumn,
    Width,
    add_to_held,
    add_up,
    names,
    owner_scope,
)
from lucid_compute.accounting.timeline import EPOCH
from lucid_compute.accounting.usage import CLEAN_USAGE
from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

JOB_KEYS = "bucket, scope_id, model_id"
GAUGE_KEYS = "bucket, scope_id"
# A job counts for its node by model; for its owner, and for everything, by model and for all models together.
_BY_MODEL = f"unnest(ARRAY[model_id, '{UPSTREAM}'::uuid]) AS m (model_id)"
SCOPED_JOBS = f"""
    SELECT bucket, node_id AS scope_id, model_id, {names(JOB_COLUMNS)} FROM moved
    UNION ALL SELECT bucket, {owner_scope("node_owner")}, m.model_id, {names(JOB_COLUMNS)}
    FROM moved, {_BY_MODEL} WHERE node_id <> '{UPSTREAM}'
    UNION ALL SELECT bucket, '{ALL_NODES}', m.model_id, {names(JOB_COLUMNS)} FROM moved, {_BY_MODEL}
""".replace("m.model_id,", "m.model_id AS model_id,")
SCOPED_GAUGES = f"""
    SELECT bucket, node_id AS scope_id, {names(GAUGE_COLUMNS)} FROM moved
    UNION ALL SELECT bucket, {owner_scope("node_owner")}, {names(GAUGE_COLUMNS)} FROM moved
    UNION ALL SELECT bucket, '{ALL_NODES}', {names(GAUGE_COLUMNS)} FROM moved
"""


class RollupKind:
    """The statements for one kind of rollup, `job` or `gauge`: its open, minute, hour and day tables."""

    def __init__(self, name: str, columns: tuple[RollupColumn, ...], keys: str, scoped: str) -> None:
        self.name = name
        self.columns = columns
        self.keys = keys
        # $1: minutes that began before are over. $2: the highest number of rows, so that no backlog is too large for
        # one statement. $3: where the previous call ended, so that none reads again what was deleted. A late row, whose
        # hour or day is added up already, is added there too. A row to which a replica is adding is left for the next
        # time, so nobody waits for each other. It returns how many rows it moved, and the place of the last one.
        self.move = f"""
            WITH moved AS (
                DELETE FROM {name}_open
                WHERE ctid = ANY(ARRAY(
                    SELECT ctid FROM {name}_open WHERE bucket < $1 AND ctid >= $3 LIMIT $2 FOR UPDATE SKIP LOCKED
                )) RETURNING *, ctid AS place
            ),
            scoped AS ({scoped}),
            {self._add_up("scoped", "minutes", NARROW, NARROW)},
            late AS (
                SELECT date_trunc('hour', bucket) AS bucket, {self._rest(keys)} FROM minutes
                WHERE bucket < (SELECT greatest(hours_until, hours_part) FROM record_marks)
            ),
            {self._add_up("late", "hours", NARROW, WIDE)},
            very_late AS (
                SELECT date_trunc('day', bucket) AS bucket, {self._rest(keys)} FROM hours
                WHERE bucket < (SELECT greatest(days_until, days_part) FROM record_marks)
            ),
            {self._add_up("very_late", "days", WIDE, WIDE)},
            into_days AS ({self._insert("days", WIDE)}),
            into_hours AS ({self._insert("hours", WIDE)}),
            into_minutes AS ({self._insert("minutes", NARROW)})
            SELECT count(*) AS rows, max(place) AS place FROM moved
        """
        # $1: the start of the hour or day to add up. $2, $3: which part of it.
        self.add_up_hour = self._add_up_span("minutes", "hours", NARROW)
        self.add_up_day = self._add_up_span("hours", "days", WIDE)

    def _rest(self, keys: str) -> str:
        return ", ".join([*keys.split(", ")[1:], names(self.columns)])

    def _add_up(self, source: str, into: str, from_: Width, to: Width) -> str:
        return add_up(self.columns, self.keys, source=source, into=into, from_=from_, to=to)

    def _insert(self, tier: str, width: Width) -> str:
        """Return the statement that adds the rows of the relation `tier` to the table of that tier."""
        return f"""
            INSERT INTO {self.name}_{tier} AS held ({self.keys}, {names(self.columns)})
            SELECT {self.keys}, {names(self.columns)} FROM {tier} ORDER BY {self.keys}
            ON CONFLICT ({self.keys}) DO UPDATE SET {add_to_held(self.columns, width)}
        """

    def _add_up_span(self, shorter: str, longer: str, width: Width) -> str:
        return f"""
            WITH source AS (
                SELECT $1::timestamptz AS bucket, {self._rest(self.keys)} FROM {self.name}_{shorter}
                WHERE bucket >= $2 AND bucket < $3
            ),
            {self._add_up("source", longer, width, WIDE)}
            {self._insert(longer, WIDE)}
        """


JOB_ROLLUPS = RollupKind("job", JOB_COLUMNS, JOB_KEYS, SCOPED_JOBS)
GAUGE_ROLLUPS = RollupKind("gauge", GAUGE_COLUMNS, GAUGE_KEYS, SCOPED_GAUGES)
KINDS = (JOB_ROLLUPS, GAUGE_ROLLUPS)
FLUSH_GAUGES = f"""
WITH {ONCE}
INSERT INTO gauge_open AS held (bucket, node_id, node_owner, {names(GAUGE_COLUMNS)})
SELECT to_timestamp(s.second), p.id, p.owner, {names(GAUGE_COLUMNS)}
FROM json_to_recordset($3::text::json) AS s (
    second bigint, node_id uuid, {", ".join(f"{column.name} {column.type}" for column in GAUGE_COLUMNS)}
) JOIN passports p ON p.id = s.node_id
WHERE EXISTS (SELECT FROM once)
ORDER BY p.id, s.second
ON CONFLICT (node_id, bucket) DO UPDATE SET {add_to_held(GAUGE_COLUMNS, NARROW)}
"""


class LongerTier:
    """The statements that add up hours from minutes, or days from hours: a part of an hour or of a day at a time.

    `{mark}_until` says up to where the longer rollups are complete, which is as far as they are read. While an hour or
    a day is added up, `{mark}_part` says up to where its parts are in it; late rows before that are added to it too.
    """

    def __init__(self, mark: str, shorter: str) -> None:
        first = f"SELECT min(bucket) FROM {{kind}}_{shorter} WHERE bucket >= {mark}_until AND bucket < $1"
        of_each = (f"({first.format(kind=kind.name)})" for kind in KINDS)
        # The first hour or day before $1 to add up, since empty ones are skipped, and where to begin in it.
        self.find = f"""
            SELECT date_trunc('{mark[:-1]}', coalesce({mark}_part, least({", ".join(of_each)}))) AS start,
                {mark}_part AS part
            FROM record_marks
        """
        # The end of the next part: it holds $3 rows of each kind at most, or those of one minute or hour.
        beyond = f"""
            SELECT greatest(bucket, (SELECT min(bucket) FROM {{kind}}_{shorter} WHERE bucket >= $1 AND bucket < $2)
                + interval '1 {shorter[:-1]}')
            FROM {{kind}}_{shorter} WHERE bucket >= $1 AND bucket < $2 ORDER BY bucket OFFSET $3 LIMIT 1
        """
        ends = ", ".join(f"({beyond.format(kind=kind.name)})" for kind in KINDS)
        self.find_end = f"SELECT least($2, {ends})"
        self.part_is_done = f"UPDATE record_marks SET {mark}_part = $1"
        # $1: everything before it is added up.
        self.is_done = f"""
            UPDATE record_marks SET {mark}_until = greatest({mark}_until, $1), {mark}_part = NULL
            WHERE {mark}_until < $1 OR {mark}_part IS NOT NULL
        """


HOURS, DAYS = LongerTier("hours", "minutes"), LongerTier("days", "hours")
FIRST_PLACE = (0, 0)
HOURS_UNTIL = "SELECT hours_until FROM record_marks"


class Cleaning(NamedTuple):
    """Two statements that delete one part of a table: `find` returns its end, `delete` deletes up to that.

    `find` takes how many units are kept ($1) and the end of the previous part ($2), so that Postgres does not read
    deleted rows again. `delete` takes the end as an argument: with a computed bound Postgres would plan to read the
    whole table.
    """

    find: str
    delete: str


def _clean(table: str, unit: str, a_turn: str, limit: str) -> Cleaning:
    """Return the statements for a table: they delete a span of `a_turn` at most, and nothing from `limit` on."""
    oldest = f"(SELECT min(bucket) FROM {table} WHERE bucket >= $2) + interval '{a_turn}'"
    find = f"SELECT least(now() - $1 * interval '1 {unit}', {oldest}, {limit})"
    return Cleaning(find, f"DELETE FROM {table} WHERE bucket < $1 AND bucket >= $2")


# Minutes are kept for some hours, hours and days for some days. What is not added up yet is kept longer.
CLEAN_MINUTES = tuple(_clean(f"{kind.name}_minutes", "hour", "1 hour", f"({HOURS_UNTIL})") for kind in KINDS)
CLEAN_HOURS = tuple(
    _clean(f"{kind.name}_hours", "day", "1 day", "(SELECT days_until FROM record_marks)") for kind in KINDS
)
CLEAN_DAYS = tuple(_clean(f"{kind.name}_days", "day", "30 days", "now()") for kind in KINDS)
CLEAN_FLUSHES = "DELETE FROM gauge_flushes WHERE at < now() - interval '1 day'"
# CTEs have no statistics: Postgres may expect ten rows where there are ten thousand, and compare each with each.
JOIN_BY_HASH = "SET enable_nestloop = off"
KEEP_SECONDS = 20.0
CLEANING_SECONDS = 60.0
RUN_SECONDS = 300.0  # what is left then is done in the next run
# Late jobs wait while their minute is moved, and every job behind them: they may wait for two seconds.
ROWS_A_MOVE = 5_000  # a fifth of a second, or a second on a machine that is busy
ROWS_A_PART = 200_000  # of each kind: some ten seconds
ROLLUPS_LOCK = 0x7265636F  # an advisory lock of our own: "reco"
MINUTE_IS_OVER_AFTER = timedelta(minutes=1)  # later rows are moved later
HOUR_IS_OVER_AFTER = timedelta(minutes=3)
_log = logging.getLogger(__name__)


class Retention(NamedTuple):
    """How long rollups are kept: minutes for some hours, hours and days for some days."""

    minutes_hours: int
    hours_days: int
    days_days: int


class RollupKeeper:
    """Moves and deletes the rollups of all replicas, while no other replica does it."""

    def __init__(
        self, url: str, retention: Retention, *, rows_a_move: int = ROWS_A_MOVE, rows_a_part: int = ROWS_A_PART
    ) -> None:
        self._connection = DedicatedConnection(url, Purpose.ROLLUP_KEEPER, session=JOIN_BY_HASH)
        self._retention = retention
        self._rows_a_move = rows_a_move
        self._rows_a_part = rows_a_part
        self.hours_until: datetime | None = None  # of all replicas; None before the first look

    async def run(self) -> None:
        """Work until this task is cancelled."""
        cleaning_due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(KEEP_SECONDS)
            try:
                is_cleaning = loop.time() >= cleaning_due
                await self.keep(cleans=is_cleaning)
                if is_cleaning:
                    cleaning_due = loop.time() + CLEANING_SECONDS
            except TimeoutError:
                _log.warning("the records are not moved on yet: the database did not do it in time")
            except Exception as error:  # noqa: BLE001 - a fault must not end the task: the next run does what this one left
                if not is_transient(error):
                    _log.exception("the records could not be moved on, and wait")

    async def keep(self, *, cleans: bool = True, now: datetime | None = None) -> None:
        """Move what is due at `now` (the database's now by default). Do nothing while another replica works."""
        try:
            async with self._connection.within(RUN_SECONDS) as connection:
                self.hours_until = await connection.fetchval(HOURS_UNTIL)
                if not await connection.fetchval("SELECT pg_try_advisory_lock($1)", ROLLUPS_LOCK):
                    return
                await self._keep(connection, now or await connection.fetchval("SELECT now()"))
                if cleans:
                    await self._clean(connection)
        finally:
            await self._connection.close()  # this releases the lock

    async def _keep(self, connection: asyncpg.Connection[asyncpg.Record], now: datetime) -> None:
        over_before = (now - MINUTE_IS_OVER_AFTER).replace(second=0, microsecond=0)
        for kind in KINDS:
            moved = await connection.fetchrow(kind.move, over_before, self._rows_a_move, FIRST_PLACE)
            while moved is not None and moved["rows"] == self._rows_a_move:
                moved = await connection.fetchrow(kind.move, over_before, self._rows_a_move, moved["place"])
        hour = (now - HOUR_IS_OVER_AFTER).replace(minute=0, second=0, microsecond=0)
        await self._add_up(connection, HOURS, timedelta(hours=1), hour)
        self.hours_until = await connection.fetchval(HOURS_UNTIL)
        await self._add_up(connection, DAYS, timedelta(days=1), self.hours_until.replace(hour=0))

    async def _add_up(
        self, connection: asyncpg.Connection[asyncpg.Record], tier: LongerTier, length: timedelta, until: datetime
    ) -> None:
        """Add up every whole hour or day before `until`, part by part; each part is a transaction with its mark."""
        while (found := await connection.fetchrow(tier.find, until)) is not None and found["start"] is not None:
            start, end = found["start"], found["start"] + length
            since = found["part"] or start
            until_part = await connection.fetchval(tier.find_end, since, end, self._rows_a_part)
            async with connection.transaction():
                for kind in KINDS:
                    statement = kind.add_up_hour if tier is HOURS else kind.add_up_day
                    await connection.execute(statement, start, since, until_part)
                if until_part < end:
                    await connection.execute(tier.part_is_done, until_part)
                else:
                    await connection.execute(tier.is_done, end)
        await connection.execute(tier.is_done, until)

    async def _clean(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Delete old rows part by part, for a tenth of the time at most; the next call continues."""
        loop = asyncio.get_running_loop()
        until = loop.time() + CLEANING_SECONDS / 10
        for cleanings, kept in zip((CLEAN_MINUTES, CLEAN_HOURS, CLEAN_DAYS), self._retention, strict=True):
            for cleaning in cleanings:
                since = EPOCH
                while loop.time() < until:
                    before = await connection.fetchval(cleaning.find, kept, since)
                    if await connection.execute(cleaning.delete, before, since) == "DELETE 0":
                        break
                    since = before
        await connection.execute(CLEAN_STATES, self._retention.hours_days)
        await connection.execute(CLEAN_FLUSHES)
        await connection.execute(CLEAN_USAGE, self._retention.days_days)
