"""Group commit of heartbeats: those that come while one commit runs share the next, and each is answered after it.

The database sees a handful of statements a second, however large the fleet, and a kill at any instant loses no
heartbeat that was acknowledged. The writer has a connection of its own, so that a full pool never holds heartbeats up.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import Any, NamedTuple

import asyncpg
from pydantic import TypeAdapter

from lucid_compute.errors import DatabaseUnavailable, InvalidRequest, Overloaded
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.node_state import Heartbeat, Receipt
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import connect, is_passing
from lucid_compute.storage.heartbeat_sql import COMMIT_HEARTBEATS, USE_INDEXES

MAX_BATCH = 1000
MAX_WAITING = 20_000
RECONNECT_SECONDS = 0.1

_log = logging.getLogger(__name__)
_HEARTBEATS = TypeAdapter(list[Heartbeat])


class _Waiting(NamedTuple):
    heartbeat: Heartbeat
    committed: asyncio.Future[Receipt | None]


class HeartbeatWriter:
    """Commits heartbeats in groups and shows them to the fleet."""

    def __init__(
        self, url: str, fleet: Fleet, clock: DatabaseClock, *, replica_id: str, timeout_seconds: float = 2.0
    ) -> None:
        """Write to the database at `url`; a commit that takes longer than `timeout_seconds` counts as failed."""
        self._url = url
        self._fleet = fleet
        self._clock = clock
        self._replica_id = replica_id
        self._timeout_seconds = timeout_seconds
        self._waiting: dict[str, _Waiting] = {}
        self._later: list[_Waiting] = []
        self._work = asyncio.Event()
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    async def write(self, heartbeat: Heartbeat) -> Receipt | None:
        """Commit one heartbeat; answer its receipt, or None when it repeats an older one and changed nothing.

        Raises:
            DatabaseUnavailable: the commit failed or is not known to have held.
            InvalidRequest: its bootId is a former one of this node.
            Overloaded: too many wait.
        """
        if len(self._waiting) + len(self._later) >= MAX_WAITING:
            message = "Too many heartbeats are waiting to be written. Send it again after Retry-After seconds."
            raise Overloaded(message, retry_after_seconds=2)
        waiting = _Waiting(heartbeat, asyncio.get_running_loop().create_future())
        if heartbeat.passport_id in self._waiting:
            self._later.append(waiting)
        else:
            self._waiting[heartbeat.passport_id] = waiting
        self._work.set()
        return await waiting.committed

    async def run(self) -> None:
        """Commit what waits, for as long as this task runs."""
        try:
            while True:
                await self._work.wait()
                await asyncio.sleep(0)  # whatever this turn of the loop still brings joins the group
                self._work.clear()
                if group := self._take_group():
                    await self._commit(group)
        finally:
            self._fail(list(self._waiting.values()) + self._later, DatabaseUnavailable())
            self._drop_connection()

    def _take_group(self) -> list[_Waiting]:
        group = list(self._waiting.values())[:MAX_BATCH]
        self._waiting = {w.heartbeat.passport_id: w for w in list(self._waiting.values())[MAX_BATCH:]}
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
            async with asyncio.timeout(self._timeout_seconds):
                rows = await self._execute(group)
        except (
            OSError,
            TimeoutError,
            asyncpg.PostgresError,
            asyncpg.InterfaceError,
            asyncpg.InternalClientError,
        ) as error:
            await self._explain(group, error)
        except asyncio.CancelledError:
            self._fail(group, DatabaseUnavailable())
            raise
        else:
            self._acknowledge(group, rows)

    async def _execute(self, group: list[_Waiting]) -> list[asyncpg.Record]:
        if self._connection is None or self._connection.is_closed():
            self._connection = await connect(self._url, application="lucid heartbeats")
            await self._connection.execute(USE_INDEXES)
        reports = _HEARTBEATS.dump_json([waiting.heartbeat for waiting in group], exclude_none=True)
        live_since = self._fleet.live_since(self._clock.now())
        return await self._connection.fetch(COMMIT_HEARTBEATS, reports.decode(), live_since, self._replica_id)

    def _acknowledge(self, group: list[_Waiting], rows: list[asyncpg.Record]) -> None:
        received_at: Any = rows[0]["received_at"] if rows else None
        for position, outcome, revision, up_since, _ in rows:
            waiting = group[position]
            if revision is not None:
                receipt = Receipt(waiting.heartbeat, received_at, up_since, revision)
                self._fleet.apply_receipt(waiting.heartbeat.passport_id, receipt)
                _answer(waiting, receipt)
            elif outcome == "former":
                _refuse(
                    waiting, InvalidRequest.at("bootId", "This bootId is a former one of the node. Make a new one.")
                )
            else:
                _answer(waiting, None)
        if len(rows) < len(group):
            self._fail(group, DatabaseUnavailable())  # nodes without a row yet: another replica's, seconds old

    async def _explain(self, group: list[_Waiting], error: Exception) -> None:
        """Fail the group, or find the one that Postgres refuses by committing its halves."""
        if is_passing(error) or len(group) == 1:
            if not is_passing(error):
                _log.error("a heartbeat was refused by Postgres", exc_info=error)
            self._drop_connection()
            self._fail(group, DatabaseUnavailable())
            await asyncio.sleep(RECONNECT_SECONDS)
            return
        middle = len(group) // 2
        await self._commit(group[:middle])
        await self._commit(group[middle:])

    def _fail(self, group: list[_Waiting], error: Exception) -> None:
        for waiting in group:
            _refuse(waiting, error)

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with suppress(asyncpg.InterfaceError):
                self._connection.terminate()
            self._connection = None


def _answer(waiting: _Waiting, receipt: Receipt | None) -> None:
    if not waiting.committed.done():
        waiting.committed.set_result(receipt)


def _refuse(waiting: _Waiting, error: Exception) -> None:
    if not waiting.committed.done():
        waiting.committed.set_exception(error)
