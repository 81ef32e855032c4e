"""The compute registry: the only writer of node state. What it acknowledges is committed, and in this fleet at once."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import RowMapping

from lucid_compute.fleet.fleet import Fleet
from lucid_compute.matching_engine import is_healthy
from lucid_compute.node_state import DeclaredModel
from lucid_compute.storage.audit import Actor, Change, record_change
from lucid_compute.storage.changes import announce
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import Database
from lucid_compute.storage.departures import Departure, Departures, Drain
from lucid_compute.storage.node_events import EventType, record_event
from lucid_compute.storage.node_rows import (
    change_node,
    drain_node,
    end_node,
    lock_node,
    lock_registered_node,
    resume_node,
)
from lucid_compute.storage.rows import read_lifecycle


class ComputeRegistry:
    """Declares, drains, resumes and deregisters nodes. Heartbeats have a writer of their own, `HeartbeatWriter`.

    `sees` is the only owner whose nodes may be changed, None is any.
    """

    def __init__(self, database: Database, fleet: Fleet, clock: DatabaseClock) -> None:
        """Write to `database` and show each change to `fleet` at once."""
        self._database = database
        self._fleet = fleet
        self._clock = clock
        self._departures = Departures(database, fleet)

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
            row = await lock_registered_node(connection, passport_id, sees)
            changed = await change_node(connection, passport_id, declared_models=declared)
            if row["declared_models"] != declared:
                ids = [model.id for model in models]
                await record_event(connection, passport_id, EventType.MODELS_DECLARED, details={"models": ids})
            change = Change("compute.declare", "compute", passport_id, row["declared_models"], declared)
            await record_change(connection, actor, change)
            await announce(connection)
        self._show(changed)

    async def drain(self, actor: Actor, passport_id: str, *, sees: str | None) -> None:
        """Start no request on the node from here on; running ones finish. Draining a draining node changes nothing.

        Raises:
            NodeNotFound, NodeDeregistered: as named.
        """
        async with self._database.transaction() as connection:
            row = await lock_registered_node(connection, passport_id, sees)
            if row["draining_since"] is not None:
                return
            changed = await drain_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.DRAINING, reason="drained by its operator")
            await record_change(connection, actor, Change("compute.drain", "compute", passport_id))
            await announce(connection)
        self._show(changed)

    async def resume(self, actor: Actor, passport_id: str, *, sees: str | None) -> None:
        """End the operator's drain. One that the node reports itself ends when the node reports otherwise.

        Raises:
            NodeNotFound, NodeDeregistered: as named.
        """
        async with self._database.transaction() as connection:
            row = await lock_registered_node(connection, passport_id, sees)
            if row["draining_since"] is None:
                return
            changed = await resume_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.RESUMED)
            await record_change(connection, actor, Change("compute.resume", "compute", passport_id))
            await announce(connection)
        self._show(changed)

    async def deregister(
        self, actor: Actor, passport_id: str, *, sees: str | None, force: bool, wait_seconds: float
    ) -> None:
        """End the node for good, when no replica runs a request on it. None is started from here on.

        With `force` it ends whatever runs. Deregistering a deregistered node changes nothing.

        Raises:
            NodeNotFound: as named.
            RequestsInFlight: requests still run after `wait_seconds`; they and new ones go on as before.
        """
        if force:
            await self._end(actor, passport_id, sees, None, force=True)
        else:
            departure = Departure(actor, passport_id, sees, "deregistering", wait_seconds)
            await self._departures.leave(
                departure, lambda drain: self._end(actor, passport_id, sees, drain, force=False)
            )

    async def _end(self, actor: Actor, passport_id: str, sees: str | None, drain: Drain | None, *, force: bool) -> None:
        async with self._database.transaction() as connection:
            row = await lock_node(connection, passport_id, sees)
            if row["deregistered_at"] is not None:
                return
            closed = await self._departures.close(connection, drain)
            passport = await end_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.DEREGISTERED, details={"force": force})
            await record_change(connection, actor, Change("compute.deregister", "compute", passport_id))
            await announce(connection)
        self._fleet.apply_passport(passport)
        self._departures.show(closed)

    def _show(self, row: RowMapping) -> None:
        self._fleet.apply_lifecycle(read_lifecycle(row))
