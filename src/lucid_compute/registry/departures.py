"""Departures: a node that is deregistered or revoked stops being chosen first, and ends when nothing runs on it."""

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
_STEP_SECONDS = 0.05

Answer = TypeVar("Answer")


class Departure(NamedTuple):
    """Who lets which node go and why; `visible_owner` is the only owner whose nodes may leave, None is any."""

    actor: Actor
    passport_id: str
    visible_owner: str | None
    reason: str
    wait_seconds: float = 0


class Drain(NamedTuple):
    """A drain that a departure waits behind: the node's row that it stands in, and whether the departure began it."""

    passport_id: str
    xid: int
    revision: int
    is_ours: bool


class Departures:
    """Drains a node on every replica, waits for its requests, and only then lets its passport end.

    The drain is an ordinary one: after a crash in the middle the node stays draining, and its last event of that type
    says why. Leaving again ends it, `resume` keeps it.
    """

    def __init__(self, database: Database, fleet: Fleet) -> None:
        """Drain in `database`, and see in `fleet` what runs."""
        self._database = database
        self._fleet = fleet
        self._leaving: set[asyncio.Task[object]] = set()

    async def leave(self, departure: Departure, finish: Callable[[Drain | None], Awaitable[Answer]]) -> Answer:
        """Return what `finish` does once the node is drained everywhere, or it is no node, or ended already.

        `finish` gets the drain, to be sure of it inside its own transaction (`close`). A caller that is cancelled
        leaves it to run to its end: a departure is never half done.

        Raises:
            RequestsInFlight: requests still run after `wait_seconds`; a drain that was begun for this is ended again.
        """
        task = asyncio.create_task(self._leave(departure, finish), name=f"departure of {departure.passport_id}")
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
        return await asyncio.shield(task)

    async def close(self, connection: AsyncConnection, drain: Drain | None) -> Lifecycle | None:
        """Refuse unless the drain is still on; the transaction has to lock the passport before, and to end it.

        A drain that the departure began is over with it: what is answered then is for the fleet to apply after the
        passport. None when nothing changes.

        Raises:
            RequestsInFlight: the drain was ended meanwhile, so that requests may have begun.
        """
        if drain is None or has_ended(row := await lock_node(connection, drain.passport_id, None)):
            return None
        if read_lifecycle(row).drain_xid != drain.xid:
            raise RequestsInFlight(self._fleet.in_flight(drain.passport_id))
        return read_lifecycle(await resume_node(connection, drain.passport_id)) if drain.is_ours else None

    def show(self, closed: Lifecycle | None) -> None:
        """Show this replica what `close` answered, once it is committed and the passport is shown as ended."""
        if closed is not None:
            self._fleet.apply_lifecycle(closed)

    async def _leave(self, departure: Departure, finish: Callable[[Drain | None], Awaitable[Answer]]) -> Answer:
        drain = await self._begin(departure)
        try:
            if drain is not None:
                await self._settle(drain, departure.wait_seconds)
            return await finish(drain)
        except DatabaseUnavailable:
            raise  # whether it ended is not known, and the caller is told to ask again
        except BaseException:  # a shutdown among them
            if drain is not None and drain.is_ours:
                await self._give_up(departure, drain)
            raise

    async def _begin(self, departure: Departure) -> Drain | None:
        """Drain the node if it does not drain; None when it is no node that has still to end."""
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

    async def _settle(self, drain: Drain, wait_seconds: float) -> None:
        """Wait until every replica has applied the drain and runs nothing on the node.

        Other replicas get a moment to apply it even when there is nothing to wait for. One that does not renew its
        lease in that moment, and counted no request before, has gone without a goodbye.

        Raises:
            RequestsInFlight: time is up, or the drain was ended.
        """
        clock = asyncio.get_running_loop().time
        began_at = clock()
        heard = {replica.id: replica.seen_at for replica in self._fleet.replicas.others()}
        while not self._is_over(drain):
            running, waited = self._fleet.in_flight(drain.passport_id), clock() - began_at
            if self._was_resumed(drain):
                raise RequestsInFlight(running)
            if waited >= wait_seconds and (running or waited >= SETTLING_SECONDS):
                if running or self._is_ignored(drain, heard):
                    raise RequestsInFlight(running)
                return
            await asyncio.sleep(_STEP_SECONDS)

    def _is_over(self, drain: Drain) -> bool:
        """Return whether the node is drained everywhere, or somebody else has ended it."""
        node = self._fleet.find_node(drain.passport_id)
        if node is None:  # another replica has only just registered it: the feed brings it
            return False
        return node.record.has_ended or (node.drain_xid == drain.xid and self._fleet.is_drained(node))

    def _was_resumed(self, drain: Drain) -> bool:
        node = self._fleet.find_node(drain.passport_id)
        return node is not None and node.lifecycle_revision > drain.revision and node.drain_xid != drain.xid

    def _is_ignored(self, drain: Drain, heard: Mapping[str, datetime]) -> bool:
        """Return whether a replica has renewed its lease since it was `heard` of, and still not applied the drain."""
        return any(
            drain.xid not in replica.applied and heard.get(replica.id) != replica.seen_at
            for replica in self._fleet.replicas.others()
        )

    async def _give_up(self, departure: Departure, drain: Drain) -> None:
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
