"""Group commit of heartbeats: those that come while one commit runs share the next, and each is answered after it.

The database sees a handful of statements a second, however large the fleet, and a kill at any instant loses no
heartbeat that was acknowledged. The writer has a connection of its own, so that a full pool never holds heartbeats up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from typing import Any, NamedTuple
from uuid import uuid4

import asyncpg
from pydantic import TypeAdapter

from lucid_compute.errors import DatabaseUnavailable, InvalidRequest, Overloaded
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.node_state import Heartbeat, Receipt
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import is_passing
from lucid_compute.storage.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.storage.gauge_recorder import GaugeRecorder
from lucid_compute.storage.heartbeat_sql import COMMIT_HEARTBEATS, USE_INDEXES

MAX_BATCH = 1000
MAX_WAITING = 20_000
RECONNECT_SECONDS = 0.1

_log = logging.getLogger(__name__)
_HEARTBEATS = TypeAdapter(list[Heartbeat])


class OwnHeartbeats:
    """Which heartbeats of Postgres this replica need not read back: its own, but those it is unsure of.

    After a commit that failed, or may have, the writer goes on under another id, so that one which commits late is read
    as another's; `unsure_of` names the nodes of those that committed before that.
    """

    def __init__(self) -> None:
        """Start sure of everything."""
        self.writer_id = str(uuid4())
        self.unsure_of: set[str] = set()

    def doubt(self, passport_ids: Iterable[str]) -> None:
        """Read these nodes' heartbeats back, and whatever the former id still commits."""
        self.writer_id = str(uuid4())
        self.unsure_of.update(passport_ids)


Outcome = Receipt | None | Exception
Tell = Callable[[Outcome], None]


class _Waiting(NamedTuple):
    heartbeat: Heartbeat
    tell: Tell


class HeartbeatWriter:
    """Commits heartbeats in groups and shows them to the fleet."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        clock: DatabaseClock,
        *,
        own: OwnHeartbeats,
        gauges: GaugeRecorder,
        timeout_seconds: float = 2.0,
    ) -> None:
        """Write to the database at `url`; a commit that takes longer than `timeout_seconds` counts as failed."""
        self._fleet = fleet
        self._clock = clock
        self._own = own
        self._gauges = gauges
        self._timeout_seconds = timeout_seconds
        self._waiting: dict[str, _Waiting] = {}
        self._later: list[_Waiting] = []
        self._work = asyncio.Event()
        self._connection = DedicatedConnection(url, Purpose.HEARTBEATS, session=USE_INDEXES)

    @property
    def is_full(self) -> bool:
        """Whether as many wait as may."""
        return len(self._waiting) + len(self._later) >= MAX_WAITING

    async def write(self, heartbeat: Heartbeat) -> Receipt | None:
        """Commit one heartbeat; answer its receipt, or None when it repeats an older one and changed nothing.

        Raises:
            DatabaseUnavailable: the commit failed or is not known to have held.
            InvalidRequest: its bootId is a former one of this node.
            Overloaded: too many wait.
        """
        committed: asyncio.Future[Receipt | None] = asyncio.get_running_loop().create_future()
        self.submit(heartbeat, partial(_settle, committed))
        return await committed

    def submit(self, heartbeat: Heartbeat, tell: Tell) -> None:
        """Have one heartbeat committed; `tell` is called once with what `write` would answer or raise.

        It may not raise: others' heartbeats are told of in the same turn of the loop.

        Raises:
            Overloaded: too many wait.
        """
        if self.is_full:
            message = "Too many heartbeats are waiting to be written. Send it again after Retry-After seconds."
            raise Overloaded(message, retry_after_seconds=2)
        waiting = _Waiting(heartbeat, tell)
        if heartbeat.passport_id in self._waiting:
            self._later.append(waiting)
        else:
            self._waiting[heartbeat.passport_id] = waiting
        self._work.set()

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
            self._fail(self._take_all(), DatabaseUnavailable())
            self._connection.terminate()

    def _take_group(self) -> list[_Waiting]:
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
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait are told, and the next group is taken
            await self._explain(group, error)

    async def _execute(self, group: list[_Waiting]) -> list[asyncpg.Record]:
        async with self._connection.within(self._timeout_seconds) as connection:
            reports = _HEARTBEATS.dump_json([waiting.heartbeat for waiting in group], exclude_none=True)
            live_since = self._fleet.live_since(self._clock.now())
            return await connection.fetch(COMMIT_HEARTBEATS, reports.decode(), live_since, self._own.writer_id)

    def _acknowledge(self, group: list[_Waiting], rows: list[asyncpg.Record]) -> None:
        received_at: Any = rows[0]["received_at"] if rows else None
        for position, outcome, revision, up_since, _ in rows:
            waiting = group[position]
            if revision is not None:
                receipt = Receipt(waiting.heartbeat, received_at, up_since, revision)
                self._fleet.apply_receipt(waiting.heartbeat.passport_id, receipt)
                self._gauges.note(waiting.heartbeat, received_at)
                waiting.tell(receipt)
            elif outcome == "former":
                waiting.tell(InvalidRequest.at("bootId", "This bootId is a former one of the node. Make a new one."))
            elif outcome == "applied":  # another replica's heartbeat of this node came first: judge it again
                self._later.append(waiting)
                self._work.set()
            else:
                waiting.tell(None)
        if len(rows) < len(group):  # nodes without a row yet: another replica's, seconds old
            found = {row["position"] for row in rows}
            self._fail([w for n, w in enumerate(group) if n not in found], DatabaseUnavailable())

    async def _explain(self, group: list[_Waiting], error: Exception) -> None:
        """Fail the group, or find the one that Postgres refuses by committing its halves."""
        if isinstance(error, asyncpg.PostgresError) and not is_passing(error) and len(group) > 1:
            middle = len(group) // 2
            await self._commit(group[:middle])
            await self._commit(group[middle:])
            return
        if not is_passing(error):
            _log.error("heartbeats could not be written", exc_info=error)
        self._own.doubt(waiting.heartbeat.passport_id for waiting in group)
        self._fail(group, DatabaseUnavailable())
        if not isinstance(error, asyncpg.PostgresError):  # it does not answer: let nobody wait for the next time-out
            self._fail(self._take_all(), DatabaseUnavailable())
        await asyncio.sleep(RECONNECT_SECONDS)

    def _take_all(self) -> list[_Waiting]:
        taken = [*self._waiting.values(), *self._later]
        self._waiting, self._later = {}, []
        return taken

    def _fail(self, group: list[_Waiting], error: Exception) -> None:
        for waiting in group:
            waiting.tell(error)


def _settle(committed: asyncio.Future[Receipt | None], outcome: Outcome) -> None:
    if committed.done():  # who waited for it was cancelled
        return
    if isinstance(outcome, Exception):
        committed.set_exception(outcome)
    else:
        committed.set_result(outcome)
