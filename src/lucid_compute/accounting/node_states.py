"""Records each change of a node's state in `node_states`: uptime is computed from these rows.

Each replica watches the fleet, and the first that sees a change writes it, with an instant that all replicas know.
Events can't be used for uptime: they are damped and delayed, and include staleness.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.accounting.measured import STOPPED
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.node_state import LIVE_WINDOW, NodeStatus, ReportedStatus
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.replicas import seconds_lost
from lucid_compute.web.turns import in_batches, in_turns

SETTLE_TIME = timedelta(seconds=5)
"""A state is written when it has lasted this long: by then all replicas know the heartbeats of each other."""

STATES_LOCK = 0x73746174  # an advisory lock of our own: "stat"
_NODES_A_TURN = 1000

_LAST = text("""
    SELECT n.id::text, held.since, held.state
    FROM unnest(CAST(:ids AS uuid[])) AS n (id)
    JOIN LATERAL (
        SELECT since, state FROM node_states s WHERE s.node_id = n.id ORDER BY since DESC LIMIT 1
    ) held ON true
""")

# A change that is older than the last written one comes from a replica that is behind: it is ignored.
_RECORD = text("""
    INSERT INTO node_states (node_id, since, state, owner)
    SELECT c.node_id, c.since, c.state, c.owner
    FROM unnest(CAST(:ids AS uuid[]), CAST(:since AS timestamptz[]), CAST(:states AS text[]), CAST(:owners AS text[]))
        AS c (node_id, since, state, owner)
    LEFT JOIN LATERAL (
        SELECT since, state FROM node_states s WHERE s.node_id = c.node_id ORDER BY since DESC LIMIT 1
    ) AS held ON true
    WHERE held.since IS NULL OR (held.since < c.since AND held.state <> c.state)
""")

# $1: how many days are kept. The state of each node at the start of that time is kept too.
CLEAN_STATES = """
    DELETE FROM node_states s USING (SELECT now() - $1 * interval '1 day' AS kept_since) k
    WHERE s.since < k.kept_since AND EXISTS (
        SELECT FROM node_states n WHERE n.node_id = s.node_id AND n.since > s.since AND n.since <= k.kept_since
    )
"""


class StateChange(NamedTuple):
    """A node's new status, and since when it has it."""

    node_id: str
    since: datetime
    state: str
    owner: str


class NodeStateRecorder:
    """Records changes of nodes' states, as one replica sees the fleet. The sweep calls it."""

    def __init__(self, database: Database, fleet: Fleet) -> None:
        self._database = database
        self._fleet = fleet
        self._written: dict[str, StateChange] = {}
        self._seen: dict[str, StateChange] = {}

    async def refresh(self) -> None:
        """Read the last states in the database, which other replicas write too. It is called once a minute.

        Raises:
            DatabaseUnavailable: the database can't be reached.
        """
        written: dict[str, StateChange] = {}
        node_ids = [node.state.id for node in self._fleet.nodes()]
        async for batch in in_batches(node_ids, _NODES_A_TURN):
            async with self._database.transaction() as connection:
                rows = await connection.execute(_LAST, {"ids": batch})
                written |= {node_id: StateChange(node_id, since, state, "") for node_id, since, state in rows}
        self._written = written
        known = set(node_ids)
        self._seen = {node_id: seen for node_id, seen in self._seen.items() if node_id in known}

    async def follow(self, now: datetime, *, is_doubtful: bool = False) -> None:  # noqa: ARG002 - uptimes need no brake
        """Write every change that has lasted five seconds and is not written yet.

        Raises:
            DatabaseUnavailable: the database can't be reached; the next call writes what this one did not.
        """
        changes = await self.find_changes(now)
        async for batch in in_batches(changes, _NODES_A_TURN):
            await self._record(batch)

    async def find_changes(self, now: datetime) -> list[StateChange]:
        """Return the changes that are due: first seen in an earlier call, and settled now."""
        live_since = self._fleet.live_since(now)
        due = []
        async for node in in_turns(self._fleet.nodes(), _NODES_A_TURN):
            if node.state.last_heartbeat is None:
                continue
            node_id, state = node.state.id, state_of(node, live_since)
            written = self._written.get(node_id)
            if written is not None and written.state == state:
                self._seen.pop(node_id, None)
                continue
            seen = self._seen.get(node_id)
            if seen is None or seen.state != state:
                seen = self._seen[node_id] = StateChange(node_id, now, state, node.record.owner)
            if now - seen.since >= SETTLE_TIME:
                due.append(seen._replace(since=self._since(node, state, seen.since, written)))
        return due

    def _since(self, node: FleetNode, state: str, seen_at: datetime, written: StateChange | None) -> datetime:
        """Return since when the node has its state: an instant that all replicas know, else when this one saw it."""
        since = _known_since(node, state, self._fleet)
        if since is None or since > seen_at or (written is not None and since <= written.since):
            return seen_at
        return since

    async def _record(self, changes: Sequence[StateChange]) -> None:
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({STATES_LOCK})")):
                return  # another replica writes them; this one reads them next time
            await _insert(connection, changes)
        for change in changes:
            self._written[change.node_id] = change
            self._seen.pop(change.node_id, None)


async def _insert(connection: AsyncConnection, changes: Iterable[StateChange]) -> None:
    node_ids, since, states, owners = zip(*changes, strict=True)
    values = {"ids": list(node_ids), "since": list(since), "states": list(states), "owners": list(owners)}
    await connection.execute(_RECORD, values)


def state_of(node: FleetNode, live_since: datetime) -> str:
    """Return the node's state in `node_states`: its status, or `STOPPED`."""
    status = node.state.status(live_since)
    has_stopped = status is NodeStatus.UNHEALTHY and node.state.is_draining and not node.state.is_live(live_since)
    return STOPPED if has_stopped else status.value


def _known_since(node: FleetNode, state: str, fleet: Fleet) -> datetime | None:
    heartbeat = node.state.last_heartbeat
    if heartbeat is None:
        return None
    if state == NodeStatus.HEALTHY:
        return heartbeat.up_since
    if state == NodeStatus.DRAINING:
        return node.state.draining_since or heartbeat.received_at
    is_silence = state == NodeStatus.UNHEALTHY and heartbeat.heartbeat.status is ReportedStatus.HEALTHY
    if is_silence or state == STOPPED:
        silent_at = heartbeat.received_at + LIVE_WINDOW
        for _ in range(8):  # an outage within the window extends it, which may add another outage
            lost = seconds_lost(heartbeat.received_at, silent_at, fleet.outages)
            if (longer := heartbeat.received_at + LIVE_WINDOW + timedelta(seconds=lost)) == silent_at:
                break
            silent_at = longer
        return silent_at
    return heartbeat.received_at if state == NodeStatus.UNHEALTHY else None
