"""Departures: a node that is deregistered or revoked is drained first, and ends when no request runs on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from datetime import datetime
from typing import NamedTuple, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import DatabaseUnavailable, NodeNotFound, RequestsInFlight
from lucid_compute.postgres.changes import announce
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.events import record_event
from lucid_compute.registry.fleet.fleet import Fleet, Lifecycle
from lucid_compute.registry.fleet.rows import read_lifecycle
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.registry.locks import drain_node, has_ended, lock_node, resume_node

SETTLING_SECONDS = 3.0
_POLL_SECONDS = 0.05

Result = TypeVar("Result")


class Departure(NamedTuple):
    """Who ends which node and why; `visible_owner` is the only owner whose nodes may end, None is any."""

    actor: Actor
    passport_id: str
    visible_owner: str | None
    reason: str
    wait_seconds: float = 0


class Drain(NamedTuple):
    """The drain that a departure waits for, by its transaction; `is_ours` when the departure began it."""

    passport_id: str
    xid: int
    revision: int
    is_ours: bool


class Departures:
    """Drains a node on every replica, waits for its requests, and only then lets its passport end.

    The drain is an ordinary one. After a crash in the middle the node stays draining, and its last event of that type
    says why. Another deregistration ends the node then, and `resume` keeps it.
    """

    def __init__(self, database: Database, fleet: Fleet) -> None:
        self._database = database
        self._fleet = fleet
        self._tasks: set[asyncio.Task[object]] = set()

    async def run(self, departure: Departure, finish: Callable[[Drain | None], Awaitable[Result]]) -> Result:
        """Drain the node, call `finish`, which ends it, and return its result.

        `finish` gets the drain and passes it to `end_drain` inside its own transaction; None when the passport is no
        node, or one that has ended already. A caller that is cancelled does not stop the departure.

        Raises:
            RequestsInFlight: requests still run after `wait_seconds`, or the drain was ended meanwhile. A drain that
                the departure began is ended again.
        """
        task = asyncio.create_task(self._run(departure, finish), name=f"departure of {departure.passport_id}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def end_drain(self, connection: AsyncConnection, drain: Drain | None) -> Lifecycle | None:
        """End the drain if the departure began it, in the transaction that ends the passport and has locked it.

        Return what the fleet is to apply (`apply`) after the ended passport; None when nothing changes.

        Raises:
            RequestsInFlight: the drain was ended meanwhile, so that requests may have begun.
        """
        if drain is None or has_ended(row := await lock_node(connection, drain.passport_id, None)):
            return None
        if read_lifecycle(row).drain_xid != drain.xid:
            raise RequestsInFlight(self._fleet.in_flight(drain.passport_id))
        return read_lifecycle(await resume_node(connection, drain.passport_id)) if drain.is_ours else None

    def apply(self, lifecycle: Lifecycle | None) -> None:
        """Show the fleet what `end_drain` returned, once it is committed and the fleet has the ended passport."""
        if lifecycle is not None:
            self._fleet.apply_lifecycle(lifecycle)

    async def _run(self, departure: Departure, finish: Callable[[Drain | None], Awaitable[Result]]) -> Result:
        drain = await self._begin_drain(departure)
        try:
            if drain is not None:
                await self._wait_until_drained(drain, departure.wait_seconds)
            return await finish(drain)
        except DatabaseUnavailable:
            raise  # it is not known whether the node ended; the client sends the request again
        except BaseException:  # a shutdown among them
            if drain is not None and drain.is_ours:
                await self._undo_drain(departure, drain)
            raise

    async def _begin_drain(self, departure: Departure) -> Drain | None:
        """Drain the node if it does not drain yet; return None if it is no node, or one that has ended already."""
        passport_id, reason = departure.passport_id, departure.reason
        async with self._database.transaction() as connection:
            try:
                row = await lock_node(connection, passport_id, departure.visible_owner)
            except NodeNotFound:
                return None
            if has_ended(row):
                return None
            if not departure.wait_seconds and (running := self._fleet.in_flight(passport_id)):
                raise RequestsInFlight(running)
            is_ours = row["draining_since"] is None
            if is_ours:
                row = await drain_node(connection, passport_id)
                await record_event(connection, passport_id, EventType.DRAINING, reason=reason)
                change = Change("compute.drain", "compute", passport_id, details={"reason": reason})
                await record_change(connection, departure.actor, change)
                await announce(connection)
        lifecycle = read_lifecycle(row)
        self._fleet.apply_lifecycle(lifecycle)
        return Drain(passport_id, lifecycle.drain_xid or 0, lifecycle.revision, is_ours)

    async def _wait_until_drained(self, drain: Drain, wait_seconds: float) -> None:
        """Wait until every replica has applied the drain and runs no request on the node.

        Other replicas get `SETTLING_SECONDS` to apply it even when no request is known to run. A replica that does not
        renew its lease in that time, and counted no request before, has crashed and is ignored.

        Raises:
            RequestsInFlight: time is up, or the drain was ended.
        """
        clock = asyncio.get_running_loop().time
        began_at = clock()
        seen_at_first = {replica.id: replica.seen_at for replica in self._fleet.replicas.others()}
        while not self._is_over(drain):
            running, waited = self._fleet.in_flight(drain.passport_id), clock() - began_at
            if self._was_resumed(drain):
                raise RequestsInFlight(running)
            if waited >= wait_seconds and (running or waited >= SETTLING_SECONDS):
                if running or self._is_ignored(drain, seen_at_first):
                    raise RequestsInFlight(running)
                return
            await asyncio.sleep(_POLL_SECONDS)

    def _is_over(self, drain: Drain) -> bool:
        """Return whether the node is drained everywhere, or another call has ended it."""
        node = self._fleet.find_node(drain.passport_id)
        if node is None:  # another replica has only just registered it; the feed will deliver it
            return False
        return node.record.has_ended or (node.drain_xid == drain.xid and self._fleet.is_drained(node))

    def _was_resumed(self, drain: Drain) -> bool:
        node = self._fleet.find_node(drain.passport_id)
        return node is not None and node.lifecycle_revision > drain.revision and node.drain_xid != drain.xid

    def _is_ignored(self, drain: Drain, seen_at_first: Mapping[str, datetime]) -> bool:
        """Return whether a replica has renewed its lease meanwhile, and still not applied the drain."""
        return any(
            drain.xid not in replica.applied and seen_at_first.get(replica.id) != replica.seen_at
            for replica in self._fleet.replicas.others()
        )

    async def _undo_drain(self, departure: Departure, drain: Drain) -> None:
        async with self._database.transaction() as connection:
            row = await lock_node(connection, drain.passport_id, None)
            if has_ended(row) or read_lifecycle(row).drain_xid != drain.xid:
                return
            row = await resume_node(connection, drain.passport_id)
            await record_event(
                connection, drain.passport_id, EventType.RESUMED, reason=f"{departure.reason} was given up"
            )
            await record_change(connection, departure.actor, Change("compute.resume", "compute", drain.passport_id))
            await announce(connection)
        self._fleet.apply_lifecycle(read_lifecycle(row))
