"""Group commit of heartbeats: those that arrive during one commit share the next, and each is answered after its own.

The database gets a few statements a second, however large the fleet. A crash at any moment loses no heartbeat that was
acknowledged. The writer has its own connection, so that a full pool never delays heartbeats.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from datetime import datetime
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import asyncpg

from lucid_compute.errors import DatabaseUnavailable, InvalidRequest, Overloaded
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.domain.node_state import Heartbeat, Receipt
from lucid_compute.registry.fleet.change_feed import OwnHeartbeats
from lucid_compute.registry.fleet.fleet import Fleet

# $1: the heartbeats as one JSON array, each node at most once. One text, because arrays of columns take this process
# twice the time to encode. $2: a node whose last heartbeat is older was unhealthy. $3: the replica.
#
# A heartbeat is not applied when its sequence is not above the stored one of the same boot (`repeated`), or when its
# boot id is a previous one of the node (`former`): `outcome` says which, and `revision` is null.
# `up_since` restarts after a silence or a report of unhealthy.
# A row that was judged `applied` and has no `revision` lost a race: it is locked only after it was judged, and another
# replica's heartbeat came first. The caller sends it again.
# Each row is looked up by its key, whatever plan Postgres would prefer: for a join with a fleet of some thousand nodes
# it reads all of them at each commit. Former boots are found by a scalar subquery: for an EXISTS it would hash all of
# node_boots. `received_at` is the same for all, and is in the first row only; `outcome` is only in rows that were not
# applied. Decoding them takes as long as the rest of a row.
COMMIT_HEARTBEATS = """
WITH sent AS (
    SELECT (report->>'passportId')::uuid AS passport_id, report, report->>'status' AS status,
        report->>'bootId' AS boot_id, (report->>'sequence')::int8 AS sequence, position
    FROM jsonb_array_elements($1::text::jsonb) WITH ORDINALITY AS s (report, position)
), judged AS (
    SELECT s.*, h.boot_id AS held_boot_id,
        CASE
            WHEN s.boot_id IS NULL OR s.sequence IS NULL OR h.boot_id IS NULL THEN 'applied'
            WHEN s.boot_id = h.boot_id THEN CASE WHEN s.sequence > h.sequence THEN 'applied' ELSE 'repeated' END
            WHEN (
                SELECT true FROM node_boots b WHERE b.passport_id = s.passport_id AND b.boot_id = s.boot_id
            ) THEN 'former'
            ELSE 'applied'
        END AS outcome
    FROM sent s, LATERAL (
        SELECT boot_id, sequence FROM heartbeats WHERE passport_id = s.passport_id OFFSET 0
    ) h
), applied AS (
    UPDATE heartbeats h SET
        received_at = statement_timestamp(),
        up_since = CASE
            WHEN j.status = 'unhealthy' THEN NULL
            WHEN h.up_since IS NULL OR h.received_at < $2 THEN statement_timestamp()
            ELSE h.up_since
        END,
        status = j.status,
        report = j.report,
        boot_id = CASE WHEN j.sequence IS NULL THEN h.boot_id ELSE coalesce(j.boot_id, h.boot_id) END,
        sequence = CASE WHEN j.boot_id IS NULL THEN h.sequence ELSE coalesce(j.sequence, h.sequence) END,
        revision = h.revision + 1
    FROM judged j
    WHERE h.passport_id = j.passport_id AND j.outcome = 'applied'
        AND h.boot_id IS NOT DISTINCT FROM j.held_boot_id
        AND (j.sequence IS NULL OR h.boot_id IS DISTINCT FROM j.boot_id OR j.sequence > h.sequence)
    RETURNING j.position, h.up_since, h.revision
), boots AS (
    INSERT INTO node_boots (passport_id, boot_id)
    SELECT passport_id, boot_id FROM judged JOIN applied USING (position)
    WHERE boot_id IS NOT NULL AND sequence IS NOT NULL AND boot_id IS DISTINCT FROM held_boot_id
    ON CONFLICT DO NOTHING
), restarts AS (
    INSERT INTO node_events (passport_id, type, details)
    SELECT passport_id, 'restarted', jsonb_build_object('bootId', boot_id) FROM judged JOIN applied USING (position)
    WHERE sequence IS NOT NULL AND held_boot_id IS NOT NULL AND boot_id <> held_boot_id
), batch AS (
    INSERT INTO heartbeat_batches (replica_id, passport_ids) SELECT $3, array_agg(passport_id) FROM sent
)
SELECT j.position - 1 AS position, CASE WHEN a.revision IS NULL THEN j.outcome END AS outcome, a.revision, a.up_since,
    CASE WHEN row_number() OVER () = 1 THEN statement_timestamp() END AS received_at
FROM judged j LEFT JOIN applied a USING (position)
"""
# Postgres keeps the plan of the statement. A plan made while a table was empty would scan it when it is full.
USE_INDEXES = "SET enable_seqscan = off"
MAX_BATCH = 1000
RECONNECT_SECONDS = 0.1
_log = logging.getLogger(__name__)
Outcome = Receipt | None | Exception
OnDone = Callable[[Outcome], None]
OnCommit = Callable[[Heartbeat, datetime], None]  # gets a committed heartbeat, and when it was received


class _Waiting(NamedTuple):
    heartbeat: Heartbeat
    on_done: OnDone
    report: bytes | None


class HeartbeatWriter:
    """Commits heartbeats in groups and applies them to the fleet."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        clock: DatabaseClock,
        *,
        own: OwnHeartbeats,
        on_commit: OnCommit,
        timeout_seconds: float = 2.0,
        max_waiting: int = 20_000,
    ) -> None:
        """A commit that takes longer than `timeout_seconds` has failed. `on_commit` gets each committed heartbeat."""
        self._fleet = fleet
        self._clock = clock
        self._own = own
        self._on_commit = on_commit
        self._timeout_seconds = timeout_seconds
        self.max_waiting = max_waiting
        self._waiting: dict[str, _Waiting] = {}
        self._later: list[_Waiting] = []
        self._work = asyncio.Event()
        self._connection = DedicatedConnection(url, Purpose.HEARTBEATS, session=USE_INDEXES)

    @property
    def is_full(self) -> bool:
        """Return whether as many heartbeats wait as may wait."""
        return len(self._waiting) + len(self._later) >= self.max_waiting

    async def write(self, heartbeat: Heartbeat) -> Receipt | None:
        """Commit one heartbeat; return its receipt, or None when it repeats an older one and changed nothing.

        Raises:
            DatabaseUnavailable: the commit failed, or it is not known whether it succeeded.
            InvalidRequest: its bootId is a previous one of this node.
            Overloaded: too many heartbeats wait.
        """
        outcome: asyncio.Future[Receipt | None] = asyncio.get_running_loop().create_future()
        self.submit(heartbeat, partial(_resolve, outcome))
        return await outcome

    def submit(self, heartbeat: Heartbeat, on_done: OnDone, report: bytes | None = None) -> None:
        """Queue one heartbeat for the next commit; `on_done` is called once with what `write` would return or raise.

        It may not raise: the heartbeats after it in the group would not be notified. `report` is the heartbeat as JSON
        that is stored as it is; without it the heartbeat is written out again.

        Raises:
            Overloaded: too many heartbeats wait.
        """
        if self.is_full:
            message = "Too many heartbeats are waiting to be written. Send it again in 2 s."
            raise Overloaded(message, retry_after_seconds=2)
        waiting = _Waiting(heartbeat, on_done, report)
        if heartbeat.passport_id in self._waiting:
            self._later.append(waiting)
        else:
            self._waiting[heartbeat.passport_id] = waiting
        self._work.set()

    async def run(self) -> None:
        """Commit waiting heartbeats for as long as this task runs."""
        try:
            while True:
                await self._work.wait()
                await asyncio.sleep(0)  # heartbeats that arrive in this turn of the loop join the group
                self._work.clear()
                if group := self._next_group():
                    await self._commit(group)
        finally:
            self._fail(self._clear(), DatabaseUnavailable())
            self._connection.terminate()

    def _next_group(self) -> list[_Waiting]:
        waiting_ids = sorted(islice(self._waiting, MAX_BATCH))  # all replicas lock rows in one order: no deadlock
        group = [self._waiting.pop(passport_id) for passport_id in waiting_ids]
        later, self._later = self._later, []
        for waiting in later:
            if waiting.heartbeat.passport_id in self._waiting:
                self._later.append(waiting)
            else:
                self._waiting[waiting.heartbeat.passport_id] = waiting
        if self._waiting:
            self._work.set()
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        try:
            self._acknowledge(group, await self._execute(group))
        except asyncio.CancelledError:
            self._fail(group, DatabaseUnavailable())
            raise
        except Exception as error:  # noqa: BLE001 - any fault fails this group, and the next one is committed
            await self._handle_failure(group, error)

    async def _execute(self, group: list[_Waiting]) -> list[asyncpg.Record]:
        async with self._connection.within(self._timeout_seconds) as connection:
            reports = b",".join([waiting.report or _write_report(waiting.heartbeat) for waiting in group])
            live_since = self._fleet.live_since(self._clock.now())
            return await connection.fetch(COMMIT_HEARTBEATS, f"[{reports.decode()}]", live_since, self._own.writer_id)

    def _acknowledge(self, group: list[_Waiting], rows: list[asyncpg.Record]) -> None:
        received_at: Any = rows[0]["received_at"] if rows else None
        for position, outcome, revision, up_since, _ in rows:
            waiting = group[position]
            if revision is not None:
                receipt = Receipt(waiting.heartbeat, received_at, up_since, revision)
                self._fleet.apply_receipt(waiting.heartbeat.passport_id, receipt)
                self._on_commit(waiting.heartbeat, received_at)
                waiting.on_done(receipt)
            elif outcome == "former":
                waiting.on_done(InvalidRequest.at("bootId", "This bootId is a former one of the node. Make a new one."))
            elif outcome == "applied":  # another replica's heartbeat of this node came first: send it again
                self._later.append(waiting)
                self._work.set()
            else:
                waiting.on_done(None)
        if len(rows) < len(group):  # nodes whose rows this database does not have yet
            written = {row["position"] for row in rows}
            self._fail([w for n, w in enumerate(group) if n not in written], DatabaseUnavailable())

    async def _handle_failure(self, group: list[_Waiting], error: Exception) -> None:
        """Fail the group, or commit its halves to find the heartbeat that Postgres refuses.

        First it is written out again: JSON may have numbers that Postgres can't read.
        """
        is_refused = isinstance(error, asyncpg.PostgresError) and not is_transient(error)
        if is_refused and any(waiting.report for waiting in group):
            await self._commit([waiting._replace(report=None) for waiting in group])
            return
        if is_refused and len(group) > 1:
            middle = len(group) // 2
            await self._commit(group[:middle])
            await self._commit(group[middle:])
            return
        if not is_transient(error):
            _log.error("heartbeats could not be written", exc_info=error)
        self._own.mark_unsure(waiting.heartbeat.passport_id for waiting in group)
        self._fail(group, DatabaseUnavailable())
        if not isinstance(error, asyncpg.PostgresError):  # Postgres hangs: the others need not wait for a time-out too
            self._fail(self._clear(), DatabaseUnavailable())
        await asyncio.sleep(RECONNECT_SECONDS)

    def _clear(self) -> list[_Waiting]:
        """Empty the queue and return what was in it."""
        waiting = [*self._waiting.values(), *self._later]
        self._waiting, self._later = {}, []
        return waiting

    def _fail(self, group: list[_Waiting], error: Exception) -> None:
        for waiting in group:
            waiting.on_done(error)


def _write_report(heartbeat: Heartbeat) -> bytes:
    return heartbeat.model_dump_json(exclude_none=True).encode()


def _resolve(future: asyncio.Future[Receipt | None], outcome: Outcome) -> None:
    if future.done():  # the caller was cancelled
        return
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
