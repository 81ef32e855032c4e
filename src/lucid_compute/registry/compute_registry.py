"""The compute registry: every operation on nodes.

An operation that returned is committed in Postgres, and visible in this replica's fleet.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import RowMapping

from lucid_compute.errors import DatabaseUnavailable, NodeDeregistered, NodeNotFound, PassportNotFound
from lucid_compute.postgres.changes import announce
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.registry.departures import Departure, Departures, Drain
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.domain.node_state import DeclaredModel, Heartbeat, JobStatistics, NodeStatus, Receipt
from lucid_compute.registry.domain.passports import Passport, PassportType
from lucid_compute.registry.events import record_event
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.replicas import seconds_lost
from lucid_compute.registry.fleet.rows import read_lifecycle
from lucid_compute.registry.heartbeat_writer import HeartbeatWriter, OnDone
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.registry.locks import (
    change_node,
    drain_node,
    end_node,
    get_passport,
    lock_node,
    lock_registered_node,
    resume_node,
)
from lucid_compute.registry.matching_engine import Reason, health_reasons, is_healthy

IDS_IN_EVENT = 5  # of each list, in the event of a declaration
ReadStatistics = Callable[[Sequence[str]], Awaitable[dict[str, JobStatistics]]]
"""Returns the statistics of each of these nodes, by node id; accounting reads them from the job ledger."""


class Health(NamedTuple):
    """A node's health at the instant `at`, as the registry sees it; `reasons` is empty exactly when it is healthy."""

    node: FleetNode
    at: datetime
    status: NodeStatus
    has_stopped: bool
    uptime_seconds: float
    in_flight: int
    is_drained: bool
    reasons: tuple[Reason, ...]


class ComputeRegistry:
    """Records heartbeats of nodes, returns their health, and declares, drains, resumes and deregisters them.

    `visible_owner` is the only owner whose nodes may be read or changed, None is any.
    """

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        clock: DatabaseClock,
        *,
        feed: ChangeFeed,
        heartbeats: HeartbeatWriter,
        statistics: ReadStatistics,
    ) -> None:
        self._database = database
        self._fleet = fleet
        self._clock = clock
        self._feed = feed
        self._heartbeats = heartbeats
        self._statistics = statistics
        self._departures = Departures(database, fleet)

    # --- heartbeats

    @property
    def is_full(self) -> bool:
        """Return whether too many heartbeats wait to be written, so that the next one is refused."""
        return self._heartbeats.is_full

    def submit(self, heartbeat: Heartbeat, on_done: OnDone, report: bytes | None = None) -> None:
        """Queue one heartbeat for the next commit. `on_done` gets its receipt, None when it is a repeat, or an error.

        `on_done` is called once and may not raise. `report` is as in `HeartbeatWriter.submit`.

        Raises:
            Overloaded: too many heartbeats wait.
        """
        self._heartbeats.submit(heartbeat, on_done, report)

    async def newest_receipt(self, passport_id: str) -> Receipt:
        """Return the node's newest receipt, also one that another replica has only just committed.

        Raises:
            DatabaseUnavailable: this replica could not catch up with the database in time.
        """
        await self._feed.catch_up()
        node = self._fleet.find_node(passport_id)
        if node is None or node.state.last_heartbeat is None:
            raise DatabaseUnavailable
        return node.state.last_heartbeat

    # --- reading

    async def get_node(self, passport_id: str, *, visible_owner: str | None) -> FleetNode:
        """Return a node that has not ended, also one that another replica has only just registered.

        Another owner's node costs the same reads as a missing one, so that no clock can tell them apart.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
            NodeDeregistered: it was deregistered or revoked, however long ago.
            DatabaseUnavailable: it is registered, and this replica could not catch up with the database in time.
        """
        if self._fleet.find_visible(passport_id, visible_owner) is None:
            await self._feed.catch_up()
        if self._fleet.find_visible(passport_id, visible_owner) is None:
            if (await self._read_passport(passport_id, visible_owner)).has_ended:
                raise NodeDeregistered(passport_id)
            raise DatabaseUnavailable
        return self._fleet.get_registered_node(passport_id, owner=visible_owner)

    async def get_passport(self, passport_id: str, *, visible_owner: str | None) -> Passport:
        """Return a node's passport, also of a node that ended long ago and is no longer in the fleet.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
        """
        node = self._fleet.find_visible(passport_id, visible_owner)
        return await self._read_passport(passport_id, visible_owner) if node is None else node.record

    def is_healthy(self, node: FleetNode, now: datetime | None = None) -> bool:
        """Return whether the node is healthy: the models guide's `isHealthy`; `now` None is this moment."""
        return is_healthy(node.state, now or self._clock.now())

    def health(self, node: FleetNode, now: datetime | None = None) -> Health:
        """Return a node's health, with every reason why it is not healthy; `now` None is this moment."""
        now = now or self._clock.now()
        state, fleet = node.state, self._fleet
        live_since = fleet.live_since(now)
        return Health(
            node=node,
            at=now,
            status=state.status(live_since),
            has_stopped=state.has_stopped(live_since),
            uptime_seconds=_uptime_seconds(fleet, node, now),
            in_flight=fleet.in_flight(state.id),
            is_drained=fleet.is_drained(node),
            reasons=() if self.is_healthy(node, now) else health_reasons(state, now),
        )

    async def statistics(self, nodes: Sequence[FleetNode]) -> dict[str, JobStatistics]:
        """Return the statistics of the jobs that this service routed to each node, by node id."""
        return await self._statistics([node.state.id for node in nodes])

    # --- changing

    async def declare(
        self, actor: Actor, passport_id: str, models: Sequence[DeclaredModel], *, visible_owner: str | None
    ) -> None:
        """Replace the node's complete declaration. One that is the same changes nothing, and is not recorded.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
            NodeDeregistered: it was deregistered or revoked.
        """
        declared = [{"id": m.id, "maxTokens": m.max_tokens, "quantization": m.quantization} for m in models]
        async with self._database.transaction() as connection:
            row = await lock_registered_node(connection, passport_id, visible_owner)
            if row["declared_models"] == declared:
                self._show(row)
                return
            changed = await change_node(connection, passport_id, declared_models=declared)
            details = _difference(row["declared_models"], declared)
            await record_event(connection, passport_id, EventType.MODELS_DECLARED, details=details)
            change = Change("compute.declare", "compute", passport_id, row["declared_models"], declared)
            await record_change(connection, actor, change)
            await announce(connection)
        self._show(changed)

    async def drain(self, actor: Actor, passport_id: str, *, visible_owner: str | None) -> None:
        """Start no more requests on the node; running ones finish. Draining a draining node changes nothing.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
            NodeDeregistered: it was deregistered or revoked.
        """
        async with self._database.transaction() as connection:
            row = await lock_registered_node(connection, passport_id, visible_owner)
            if row["draining_since"] is not None:
                return
            changed = await drain_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.DRAINING, reason="drained by its operator")
            await record_change(connection, actor, Change("compute.drain", "compute", passport_id))
            await announce(connection)
        self._show(changed)

    async def resume(self, actor: Actor, passport_id: str, *, visible_owner: str | None) -> None:
        """End the operator's drain. A drain that the node reports itself ends when the node reports otherwise.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
            NodeDeregistered: it was deregistered or revoked.
        """
        async with self._database.transaction() as connection:
            row = await lock_registered_node(connection, passport_id, visible_owner)
            if row["draining_since"] is None:
                return
            changed = await resume_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.RESUMED)
            await record_change(connection, actor, Change("compute.resume", "compute", passport_id))
            await announce(connection)
        self._show(changed)

    async def deregister(
        self, actor: Actor, passport_id: str, *, visible_owner: str | None, force: bool, wait_seconds: float
    ) -> None:
        """End the node, which is final, as soon as no replica runs a request on it. No more requests are started.

        With `force` it ends at once, with its requests. Deregistering a deregistered node changes nothing.

        Raises:
            NodeNotFound: there is no such node, or it is another owner's.
            RequestsInFlight: requests still run after `wait_seconds`; the node goes on as before.
        """
        if force:
            await self._end(actor, passport_id, visible_owner, None, force=True)
        else:
            departure = Departure(actor, passport_id, visible_owner, "deregistering", wait_seconds)
            await self._departures.run(
                departure, lambda drain: self._end(actor, passport_id, visible_owner, drain, force=False)
            )

    async def _end(
        self, actor: Actor, passport_id: str, visible_owner: str | None, drain: Drain | None, *, force: bool
    ) -> None:
        async with self._database.transaction() as connection:
            row = await lock_node(connection, passport_id, visible_owner)
            if row["deregistered_at"] is not None:
                return
            ended = await self._departures.end_drain(connection, drain)
            passport = await end_node(connection, passport_id)
            await record_event(connection, passport_id, EventType.DEREGISTERED, details={"force": force})
            await record_change(connection, actor, Change("compute.deregister", "compute", passport_id))
            await announce(connection)
        self._fleet.apply_passport(passport)
        self._departures.apply(ended)

    async def _read_passport(self, passport_id: str, visible_owner: str | None) -> Passport:
        try:
            async with self._database.transaction() as connection:
                passport = await get_passport(connection, passport_id, visible_owner)
        except PassportNotFound:
            raise NodeNotFound(passport_id) from None
        if passport.type is not PassportType.COMPUTE:
            raise NodeNotFound(passport_id)
        return passport

    def _show(self, row: RowMapping) -> None:
        self._fleet.apply_lifecycle(read_lifecycle(row))


def _difference(previous: Sequence[Mapping[str, Any]], declared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what an event says of a declaration: counts, and a few ids. The complete lists would fill disks."""
    old, new = ({model["id"]: model for model in models} for models in (previous, declared))
    added, removed = [id_ for id_ in new if id_ not in old], [id_ for id_ in old if id_ not in new]
    return {
        "count": len(new),
        "addedCount": len(added),
        "removedCount": len(removed),
        "changedCount": sum(id_ in old and old[id_] != model for id_, model in new.items()),
        "added": added[:IDS_IN_EVENT],
        "removed": removed[:IDS_IN_EVENT],
    }


def _uptime_seconds(fleet: Fleet, node: FleetNode, now: datetime) -> float:
    """Return the seconds since the first heartbeat after the node was last unhealthy, without our own outages."""
    receipt = node.state.last_heartbeat
    if receipt is None or receipt.up_since is None or not node.state.is_live(fleet.live_since(now)):
        return 0.0
    lost = seconds_lost(receipt.up_since, now, fleet.outages_until(now))
    return round(max((now - receipt.up_since).total_seconds() - lost, 0.0), 3)
