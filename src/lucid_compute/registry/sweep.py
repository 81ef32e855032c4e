"""The sweep: records transitions of nodes as events, by one replica at a time. It never decides a node's state.

- The brake: while many nodes fall silent at once, the fault is more likely ours, so events of silence wait.
- The damping: within ten minutes a node that flaps gets two `unhealthy` events at most, one `stopped` event, and no
  `stale` event after three events about its health. A recovery never waits, so there is at most one for each of these.

Neither changes routing or status. Source: the reliability page, "Decisions taken from the failure model".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import NamedTuple, Protocol

from sqlalchemy import text

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.changes import announce
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.node_state import FRESH_WINDOW, LIVE_WINDOW, NodeStatus
from lucid_compute.registry.events import ENQUEUE_NODE_EVENTS
from lucid_compute.registry.fleet.change_feed import ENDED_NODES_KEPT
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.replicas import silence_since
from lucid_compute.registry.keys.store import KeyStore
from lucid_compute.web.turns import in_batches, in_turns

UPKEEP_SECONDS = 60.0
STALE_EVENT_AFTER = FRESH_WINDOW + timedelta(seconds=5)
SWEEP_LOCK = 0x73776570  # an advisory lock of our own: "swep"
MAX_UNHEALTHY_EVENTS = 2  # of a node in ten minutes
HEALTH_EVENTS_BEFORE_STALE_WAITS = 3  # of a node in ten minutes
BRAKE_FLEET = 10
BRAKE_SHARE = 0.3
BRAKE_WINDOW = timedelta(seconds=60)
BRAKE_LIMIT = timedelta(minutes=5)

_log = logging.getLogger(__name__)
_NODES_A_TURN = 1000

# The passport is locked before its node, as departures do. A passport that is locked now may be about to end: its node
# waits for the next sweep. So no state is recorded after the end, and neither waits for the other.
_RECORD = text(f"""
    WITH living AS (
        SELECT id FROM passports
        WHERE id = ANY(CAST(:ids AS uuid[])) AND status <> 'revoked' AND deregistered_at IS NULL
        FOR KEY SHARE SKIP LOCKED
    ), due AS (
        SELECT * FROM unnest(CAST(:ids AS uuid[]), CAST(:previous AS text[]), CAST(:states AS text[]),
                             CAST(:reasons AS text[])) AS w (passport_id, previous, state, reason)
        WHERE w.state IN ('{EventType.HEALTHY}', '{EventType.DRAINING}', '{EventType.DRAINED}') OR (
            SELECT CASE w.state
                WHEN '{EventType.UNHEALTHY}' THEN count(*) FILTER (WHERE e.type = w.state) < {MAX_UNHEALTHY_EVENTS}
                WHEN '{EventType.STOPPED}' THEN count(*) FILTER (WHERE e.type = w.state) = 0
                ELSE count(*) FILTER (WHERE e.type <> '{EventType.STOPPED}') < {HEALTH_EVENTS_BEFORE_STALE_WAITS}
            END
            FROM node_events e
            WHERE e.passport_id = w.passport_id AND e.at > now() - interval '10 minutes' AND e.type IN (
                '{EventType.HEALTHY}', '{EventType.STALE}', '{EventType.UNHEALTHY}', '{EventType.STOPPED}'
            )
        )
    ), changed AS (
        UPDATE nodes n SET recorded_state = w.state, revision = n.revision + 1, changed_xid = pg_current_xact_id()
        FROM due w JOIN living l ON l.id = w.passport_id
        WHERE n.passport_id = w.passport_id AND n.recorded_state = w.previous
        RETURNING n.passport_id, w.previous, w.state, w.reason
    ), recorded AS (
        INSERT INTO node_events (passport_id, type, reason, details)
        SELECT passport_id, state, reason, jsonb_build_object('from', previous) FROM changed
        WHERE state <> '{EventType.DRAINING}' OR reason IS NOT NULL
        RETURNING passport_id, type, at, reason, details
    )
    {ENQUEUE_NODE_EVENTS}
""")


class Transition(NamedTuple):
    """A state that a node is in and that is not recorded as an event yet; `previous` is the recorded one."""

    passport_id: str
    previous: str
    state: str
    reason: str | None
    is_silence: bool


class Brake:
    """Holds events of silence back while more than 30 % of a fleet of ten or more nodes fell silent within a minute."""

    def __init__(self) -> None:
        self.held_since: datetime | None = None

    def watch(self, ages: Iterable[timedelta], now: datetime) -> bool:
        """Apply the brake or release it, and return whether it is on; `ages` are how long each node has been silent.

        The registry's own outages are not in the ages.

        It is released when the nodes send heartbeats again, when their silence is a minute old and no more nodes
        follow, and after five minutes at the latest.
        """
        ages = list(ages)
        fell_silent = sum(STALE_EVENT_AFTER < age <= STALE_EVENT_AFTER + self._window(now) for age in ages)
        if len(ages) < BRAKE_FLEET or fell_silent <= BRAKE_SHARE * len(ages):
            self.held_since = None
        elif self.held_since is None:
            self.held_since = now
            _log.error("%d of %d nodes fell silent at once; the fault may be ours: events wait", fell_silent, len(ages))
        return self.is_on(now)

    def is_on(self, now: datetime) -> bool:
        """Return whether `watch` last applied it, less than five minutes ago."""
        return self.held_since is not None and now - self.held_since <= BRAKE_LIMIT

    def _window(self, now: datetime) -> timedelta:
        return BRAKE_WINDOW + (now - self.held_since if self.held_since else timedelta(0))


def find_transition(
    fleet: Fleet, node: FleetNode, now: datetime, *, live_since: datetime, silence: timedelta
) -> Transition | None:
    """Return the transition that the node's next event records; None when its last event still holds.

    `silence` is how long the node has been silent, outages of the registry left out.
    """
    receipt = node.state.last_heartbeat
    if node.record.has_ended or (receipt is None and not node.state.is_draining):
        return None
    age = now - receipt.received_at if receipt else timedelta(0)
    is_silence = False
    reason: str | None = None
    if node.state.is_draining and not _is_drain_over(node, live_since):
        state = EventType.DRAINED if fleet.is_drained(node) else EventType.DRAINING
        reason = "reported by the node" if node.state.draining_since is None else None
    elif node.state.has_stopped(live_since):
        state, is_silence = EventType.STOPPED, True
        reason = f"it said that it stops; no heartbeat for {age.total_seconds():.0f} s"
    elif node.state.status(live_since) is NodeStatus.UNHEALTHY:
        state, is_silence = EventType.UNHEALTHY, not node.state.is_live(live_since)
        reason = f"no heartbeat for {age.total_seconds():.0f} s" if is_silence else "reported by the node"
    elif silence > STALE_EVENT_AFTER:
        state, is_silence = EventType.STALE, True
        reason = f"no heartbeat for {age.total_seconds():.0f} s"
    else:
        state = EventType.HEALTHY
    if state == node.recorded_state or (state is EventType.HEALTHY and age > FRESH_WINDOW):
        return None
    return Transition(node.state.id, node.recorded_state, state.value, reason, is_silence)


def _is_drain_over(node: FleetNode, live_since: datetime) -> bool:
    """Return whether the drain of a silent node is recorded to its end, so that its silence is the next to record.

    A node that was silent before its operator drained it has no further event: its silence is recorded already.
    """
    state, receipt = node.state, node.state.last_heartbeat
    if receipt is None or state.is_live(live_since):
        return False
    if state.has_stopped(live_since):
        return node.recorded_state in {EventType.DRAINED, EventType.STOPPED}
    since = state.draining_since
    if since is not None and receipt.received_at + LIVE_WINDOW < since:
        return False
    return node.recorded_state in {EventType.DRAINED, EventType.UNHEALTHY}


class SweepFollower(Protocol):
    """A writer of what the fleet shows, called after each sweep."""

    async def refresh(self) -> None:
        """Read what other replicas wrote; called once a minute."""

    async def follow(self, now: datetime, *, is_doubtful: bool) -> None:
        """Write the changes that are due. `is_doubtful` is true while the brake is on: the fault may be ours."""


class Sweep:
    """Inspects the fleet every `interval_seconds`, unless another replica does, and then calls its followers."""

    def __init__(
        self,
        database: Database,
        fleet: Fleet,
        clock: DatabaseClock,
        keys: KeyStore,
        followers: Sequence[SweepFollower],
        *,
        interval_seconds: float = 2.0,
    ) -> None:
        self._database = database
        self._fleet = fleet
        self._clock = clock
        self._keys = keys
        self.followers = followers
        self.interval_seconds = interval_seconds
        self.brake = Brake()
        self._failing: set[str] = set()

    async def run(self) -> None:
        """Sweep for as long as this task runs. A step that fails holds no other up, and is tried again."""
        upkeep_due = 0.0
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(self.interval_seconds)
            await self._attempt("events", self.sweep)
            if loop.time() >= upkeep_due:
                upkeep_due = loop.time() + UPKEEP_SECONDS
                await self.keep_up()
            now = self._clock.now()
            for follower in self.followers:
                follow = partial(follower.follow, now, is_doubtful=self.brake.is_on(now))
                await self._attempt(type(follower).__name__, follow)

    async def keep_up(self) -> None:
        """Do what is due once a minute."""
        await self._attempt("ended nodes and keys", self._forget_ended)
        await self._attempt("last use of keys", self._keys.record_used)
        for follower in self.followers:
            await self._attempt(f"refresh of {type(follower).__name__}", follower.refresh)

    async def sweep(self) -> None:
        """Record every transition that is due."""
        async for batch in in_batches(await self.find_transitions(), _NODES_A_TURN):
            await self.record(batch)

    async def _attempt(self, name: str, step: Callable[[], Awaitable[object]]) -> None:
        """Run a step, and log its failure: a database that does not respond once, until the step succeeds again."""
        try:
            await step()
            self._failing.discard(name)
        except DatabaseUnavailable as error:
            if name not in self._failing:
                _log.warning("the sweep could not do its step %r: %r", name, error.__cause__ or error)
            self._failing.add(name)
        except Exception:  # noqa: BLE001 - a fault must end neither the sweep nor the service; its trace is logged
            _log.exception("the sweep stumbled in its step %r and goes on", name)

    async def find_transitions(self) -> list[Transition]:
        """Return every transition that is due; the event loop serves requests in between."""
        now = self._clock.now()
        live_since, outages = self._fleet.live_since(now), self._fleet.outages_until(now)
        transitions, silences = [], []
        async for node in in_turns(self._fleet.nodes(), _NODES_A_TURN):
            receipt, silence = node.state.last_heartbeat, timedelta(0)
            if receipt is not None and not node.record.has_ended:
                silence = silence_since(receipt.received_at, now, outages)
                silences.append(silence)
            if transition := find_transition(self._fleet, node, now, live_since=live_since, silence=silence):
                transitions.append(transition)
        if self.brake.watch(silences, now):
            return [transition for transition in transitions if not transition.is_silence]
        return transitions

    async def record(self, transitions: Sequence[Transition]) -> None:
        """Write an event for each, unless another replica sweeps now or has written it already."""
        if not transitions:
            return
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({SWEEP_LOCK})")):
                return
            await connection.execute(
                _RECORD,
                {
                    "ids": [t.passport_id for t in transitions],
                    "previous": [t.previous for t in transitions],
                    "states": [t.state for t in transitions],
                    "reasons": [t.reason for t in transitions],
                },
            )
            await announce(connection)

    async def _forget_ended(self) -> None:
        now = self._clock.now()
        self._keys.forget_ended(now)
        async for node in in_turns(self._fleet.nodes(), _NODES_A_TURN):
            if node.record.has_ended and now - node.record.updated_at > ENDED_NODES_KEPT:
                self._fleet.forget_node(node)
