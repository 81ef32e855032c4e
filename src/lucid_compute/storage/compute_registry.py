"""The compute registry: the only writer of node state. What it acknowledges is committed, and in this fleet at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import NodeDeregistered, NodeNotFound, RequestsInFlight
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.matching_engine import is_healthy
from lucid_compute.node_state import DeclaredModel
from lucid_compute.passports import Passport, PassportStatus
from lucid_compute.storage.audit import Actor, Change, record_change
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import Database
from lucid_compute.storage.node_events import EventType, record_event
from lucid_compute.storage.passport_search import ids_are_uuids
from lucid_compute.storage.rows import read_lifecycle, read_passport
from lucid_compute.storage.tables import heartbeats, nodes, passports

_WAIT_STEP_SECONDS = 0.1


async def add_node_rows(connection: AsyncConnection, passport_id: str) -> None:
    """Give a new compute passport the rows that its heartbeats and its operator write to."""
    await connection.execute(insert(nodes).values(passport_id=passport_id))
    await connection.execute(insert(heartbeats).values(passport_id=passport_id))


class ComputeRegistry:
    """Declares, drains, resumes and deregisters nodes. Heartbeats have a writer of their own, `HeartbeatWriter`.

    `sees` is the only owner whose nodes may be changed, None is any.
    """

    def __init__(self, database: Database, fleet: Fleet, clock: DatabaseClock) -> None:
        """Write to `database` and show each change to `fleet` at once."""
        self._database = database
        self._fleet = fleet
        self._clock = clock

    def is_healthy(self, passport_id: str) -> bool:
        """Whether the node is fresh, reports healthy, and neither drains nor ended: the models guide's `isHealthy`."""
        node = self._fleet.find_node(passport_id)
        return node is not None and is_healthy(node.state, self._clock.now())

    async def declare_models(
        self, actor: Actor, passport_id: str, models: Sequence[DeclaredModel], *, sees: str | None
    ) -> None:
        """Replace the node's whole declaration.

        Raises:
            NodeNotFound, NodeDeregistered: as named.
        """
        declared = [{"id": m.id, "maxTokens": m.max_tokens, "quantization": m.quantization} for m in models]
        async with self._database.transaction() as connection:
            row = await _lock_registered(connection, passport_id, sees)
            changed = await _change_node(connection, passport_id, declared_models=declared)
            if row["declared_models"] != declared:
                ids = [model.id for model in models]
                await record_event(connection, passport_id, EventType.MODELS_DECLARED, details={"models": ids})
            change = Change("compute.declare", "compute", passport_id, row["declared_models"], declared)
            await record_change(connection, actor, change)
        self._show(changed)

    async def drain(self, actor: Actor, passport_id: str, *, sees: str | None) -> None:
        """Start no request on the node from here on; running ones finish. Draining a draining node changes nothing.

        Raises:
            NodeNotFound, NodeDeregistered: as named.
        """
        async with self._database.transaction() as connection:
            row = await _lock_registered(connection, passport_id, sees)
            if row["draining_since"] is not None:
                return
            xid = func.pg_current_xact_id()
            changed = await _change_node(connection, passport_id, draining_since=func.now(), drain_xid=xid)
            await record_event(connection, passport_id, EventType.DRAINING, reason="drained by its operator")
            await record_change(connection, actor, Change("compute.drain", "compute", passport_id))
        self._show(changed)

    async def resume(self, actor: Actor, passport_id: str, *, sees: str | None) -> None:
        """End the operator's drain. One that the node reports itself ends when the node reports otherwise.

        Raises:
            NodeNotFound, NodeDeregistered: as named.
        """
        async with self._database.transaction() as connection:
            row = await _lock_registered(connection, passport_id, sees)
            if row["draining_since"] is None:
                return
            changed = await _change_node(connection, passport_id, draining_since=None, drain_xid=None)
            await record_event(connection, passport_id, EventType.RESUMED)
            await record_change(connection, actor, Change("compute.resume", "compute", passport_id))
        self._show(changed)

    async def deregister(
        self, actor: Actor, passport_id: str, *, sees: str | None, force: bool, wait_seconds: float
    ) -> None:
        """End the node for good. No request is started on it from here on; those that run are waited for, or refused.

        Raises:
            NodeNotFound: as named.
            RequestsInFlight: requests still run after `wait_seconds`, and `force` is not set.
        """
        node = self._fleet.find_node(passport_id)
        is_over = force or (node is not None and node.record.deregistered_at is not None)
        if not is_over and (running := await self._wait_until_idle(passport_id, wait_seconds)):
            raise RequestsInFlight(running)
        async with self._database.transaction() as connection:
            row = await _lock(connection, passport_id, sees)
            if row["deregistered_at"] is not None:
                return
            passport = await _end(connection, passport_id)
            await record_event(connection, passport_id, EventType.DEREGISTERED, details={"force": force})
            await record_change(connection, actor, Change("compute.deregister", "compute", passport_id))
        self._fleet.apply_passport(passport)

    async def _wait_until_idle(self, passport_id: str, wait_seconds: float) -> int:
        """Wait for the node's requests to end, at most `wait_seconds`; answer how many still run."""
        clock = asyncio.get_running_loop().time
        deadline = clock() + wait_seconds
        while (running := self._fleet.in_flight(passport_id)) and clock() < deadline:  # noqa: ASYNC110 - other replicas' counts come by poll
            await asyncio.sleep(_WAIT_STEP_SECONDS)
        return running

    def _show(self, row: RowMapping) -> None:
        self._fleet.apply_lifecycle(read_lifecycle(row))


async def _change_node(connection: AsyncConnection, passport_id: str, **changes: Any) -> RowMapping:
    statement = (
        update(nodes)
        .where(nodes.c.passport_id == passport_id)
        .values(revision=nodes.c.revision + 1, changed_xid=func.pg_current_xact_id(), **changes)
        .returning(nodes)
    )
    row: RowMapping = (await connection.execute(statement)).mappings().one()
    return row


async def _end(connection: AsyncConnection, passport_id: str) -> Passport:
    statement = (
        update(passports)
        .where(passports.c.id == passport_id)
        .values(
            deregistered_at=func.now(),
            updated_at=func.now(),
            revision=passports.c.revision + 1,
            changed_xid=func.pg_current_xact_id(),
        )
        .returning(passports)
    )
    return read_passport((await connection.execute(statement)).mappings().one())


async def _lock(connection: AsyncConnection, passport_id: str, sees: str | None) -> RowMapping:
    if not ids_are_uuids(passport_id):
        raise NodeNotFound(passport_id)
    columns = (passports.c.owner, passports.c.status, passports.c.deregistered_at, *nodes.c)
    statement = select(*columns).join_from(passports, nodes).where(passports.c.id == passport_id)
    row = (await connection.execute(statement.with_for_update())).mappings().one_or_none()
    if row is None or (sees is not None and row["owner"] != sees):
        raise NodeNotFound(passport_id)
    return row


async def _lock_registered(connection: AsyncConnection, passport_id: str, sees: str | None) -> RowMapping:
    row = await _lock(connection, passport_id, sees)
    if row["deregistered_at"] is not None or row["status"] == PassportStatus.REVOKED:
        raise NodeDeregistered(passport_id)
    return row
