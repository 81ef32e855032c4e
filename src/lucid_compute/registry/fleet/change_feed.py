"""The feed: keeps this replica's fleet and keys in step with Postgres, and this replica's lease alive.

NOTIFY wakes it within milliseconds of a registration, a drain or a new key; a poll twice a second brings what
notifications do not tell (heartbeats that other replicas took) and whatever a lost notification would have told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar
from uuid import uuid4

import asyncpg

from lucid_compute.postgres.changes import CHANGES_CHANNEL, announce
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.domain.node_state import FRESH_WINDOW
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.in_flight_broadcast import IN_FLIGHT_CHANNEL, hear
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.registry.fleet.replicas import LEASE, OUTAGE_AFTER, Outage, Snapshot, live_since
from lucid_compute.registry.fleet.rows import read_key, read_lifecycle, read_passport, read_receipt, read_replica
from lucid_compute.web.turns import in_turns


class OwnHeartbeats:
    """Which heartbeats of Postgres this replica need not read back: its own, but those it is unsure of.

    After a commit that failed, or may have, the writer goes on under another id, so that one which commits late is read
    as another's; `unsure_of` names the nodes of those that committed before that.
    """

    def __init__(self) -> None:
        self.writer_id = str(uuid4())
        self.unsure_of: set[str] = set()

    def doubt(self, passport_ids: Iterable[str]) -> None:
        """Read these nodes' heartbeats back, and whatever the former id still commits."""
        self.writer_id = str(uuid4())
        self.unsure_of.update(passport_ids)


ENDED_NODES_KEPT = timedelta(hours=24)
"""How long nodes that were deregistered or revoked still stand in explanations."""
_MIRRORED = f"""
    p.type IN ('compute', 'model')
    AND (p.status <> 'revoked' AND p.deregistered_at IS NULL
         OR p.updated_at > now() - interval '{ENDED_NODES_KEPT.total_seconds()} seconds')
"""
_SERVICE = """
    SELECT 'snapshot' AS kind, to_jsonb(pg_current_snapshot()::text)::text AS body
    UNION ALL SELECT 'now', to_jsonb(clock_timestamp())::text
    UNION ALL SELECT 'replica', to_jsonb(r)::text FROM replicas r
    UNION ALL SELECT 'outage', to_jsonb(o)::text FROM outages o WHERE o.ended_at > now() - interval '30 days'
"""
# Beside the row of the passport, whose revision is theirs: one that comes without them has none.
_SECRETS = """
    SELECT 'secrets', jsonb_build_object('id', p.id, 'secrets', p.secrets)::text FROM passports p
    WHERE p.secrets <> '{}' AND p.type IN ('compute', 'model') AND p.status <> 'revoked' AND p.deregistered_at IS NULL
"""
EVERYTHING = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {_MIRRORED}
    UNION ALL {_SECRETS} AND {_MIRRORED}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n JOIN passports p ON p.id = n.passport_id WHERE {_MIRRORED}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h JOIN passports p ON p.id = h.passport_id
        WHERE h.received_at IS NOT NULL AND {_MIRRORED}
"""
_UNSEEN = (
    "changed_xid >= pg_snapshot_xmin($1::text::pg_snapshot) "
    "AND NOT pg_visible_in_snapshot(changed_xid, $1::text::pg_snapshot)"
)
CHANGES = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k WHERE {_UNSEEN}
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {_UNSEEN}
    UNION ALL {_SECRETS} AND {_UNSEEN}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n WHERE {_UNSEEN}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h WHERE h.passport_id IN (
        SELECT unnest(b.passport_ids) FROM heartbeat_batches b WHERE {_UNSEEN} AND b.replica_id <> $2
        UNION ALL SELECT unnest($3::uuid[])
    )
"""
# How long no replica could renew its lease, in one statement with the renewal: an outage of ours when it is longer
# than $5. A replica's lease is renewed only by a loop that runs and a database that commits, as heartbeats need.
RENEW_LEASE = """
WITH silent AS (
    SELECT max(seen_at) AS since FROM replicas
), renewed AS (
    INSERT INTO replicas (id, seen_at, applied_at, applied_snapshot, in_flight)
    VALUES ($1, clock_timestamp(), $2, $3, $4::jsonb)
    ON CONFLICT (id) DO UPDATE SET
        seen_at = clock_timestamp(), applied_at = $2, applied_snapshot = $3, in_flight = $4::jsonb
)
INSERT INTO outages (started_at, ended_at)
SELECT since, clock_timestamp() FROM silent WHERE clock_timestamp() - since > $5::interval
RETURNING started_at, ended_at
"""
POLL_SECONDS = 0.5
LEASE_RENEWAL_SECONDS = 1.0
QUERY_TIMEOUT_SECONDS = 10.0
LOAD_TIMEOUT_SECONDS = 60.0
RECONNECT_SECONDS = 0.2
CURRENT_WITHIN = timedelta(seconds=5)
CATCH_UP_TIMEOUT_SECONDS = 1.0
CATCH_UP_INTERVAL_SECONDS = 0.05
Value = TypeVar("Value")
Rows = dict[str, list[str]]
_log = logging.getLogger(__name__)
_NOTHING_APPLIED = "3:3:"
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)
_ROWS_A_TURN = 100  # a millisecond or two


class ChangeFeed:
    """Follows Postgres for one replica. `listens` off leaves the poll alone to do it."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        keys: KeyRing,
        clock: DatabaseClock,
        *,
        replica_id: str,
        own: OwnHeartbeats,
        listens: bool = True,
    ) -> None:
        """Follow the database at `url` into `fleet` and `keys`; `own` are the heartbeats that need not be read back."""
        self._connection = DedicatedConnection(url, Purpose.FEED)
        self._fleet = fleet
        self._keys = keys
        self._clock = clock
        self.replica_id = replica_id
        self._own = own
        self._listens = listens
        self.lease_renewal_seconds = LEASE_RENEWAL_SECONDS
        self.loaded = asyncio.Event()
        self._wake = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._snapshot: str | None = None
        self._applied, self._applied_at = _NOTHING_APPLIED, _NEVER
        self._renewal_due = 0.0
        self._drains_seen = False
        self._last_catch_up = 0.0

    def is_current(self) -> bool:
        """Return whether the fleet is loaded and no more than five seconds behind Postgres."""
        followed_at = self._keys.followed_at
        return followed_at is not None and self._clock.now() - followed_at <= CURRENT_WITHIN

    def knows_replica(self, replica_id: str) -> bool:
        """Return whether that is this replica, or another one that is alive."""
        return replica_id == self.replica_id or any(o.id == replica_id for o in self._fleet.replicas.others())

    async def catch_up(self) -> None:
        """Read Postgres now, for what another replica may have just written; callers at one time share one read."""
        pause = self._last_catch_up + CATCH_UP_INTERVAL_SECONDS - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        caught_up = self._caught_up  # of the next read: one that runs already may have looked too early
        self._wake.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(caught_up.wait(), CATCH_UP_TIMEOUT_SECONDS)
        self._last_catch_up = time.monotonic()

    async def run(self) -> None:
        """Follow for as long as this task runs, through any outage of the database."""
        while True:
            try:
                async with self._connection.within(None) as connection:
                    await self._follow(connection)
            except Exception as error:  # noqa: BLE001 - a replica without its feed would serve what was, for good
                if not is_transient(error):
                    _log.exception("the feed stumbled and starts over")
                self._connection.terminate()  # its listeners are added again
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _follow(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if self._listens:
            await connection.add_listener(CHANGES_CHANNEL, lambda *_: self._wake.set())
            await connection.add_listener(IN_FLIGHT_CHANNEL, lambda *told: hear(self._fleet.replicas, str(told[-1])))
        self._snapshot, self._renewal_due = None, 0.0
        self._clock.set(await connection.fetchval("SELECT clock_timestamp()"))
        while True:
            self._wake.clear()
            caught_up, self._caught_up = self._caught_up, asyncio.Event()
            # First the lease: an outage that it records is read right after, and no node is called dead for our sake.
            await self._keep_lease(connection)
            await self._read(connection)
            caught_up.set()
            with suppress(TimeoutError):
                # wait_for would lose a cancellation that comes together with the wake-up, and the replica never stop
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _read(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        found: Rows = {}
        for kind, body in await self._fetch(connection):
            found.setdefault(kind, []).append(body)
        now = datetime.fromisoformat(json.loads(found["now"][0]))
        self._clock.set(now)
        await self._apply(found, now, connection)
        if self._snapshot is None:
            ids = {json.loads(body)["id"] for body in found.get("passport", ())}
            self._fleet.forget_all_but(ids, made_before=now)
        self._snapshot = self._applied = json.loads(found["snapshot"][0])
        self._applied_at = self._keys.followed_at = now
        self._fleet.replicas.note_read(Snapshot.parse(self._applied))
        self.loaded.set()
        if self._drains_seen:
            await self._tell_of_drains(connection)

    async def _fetch(self, connection: asyncpg.Connection[asyncpg.Record]) -> list[asyncpg.Record]:
        if self._snapshot is None:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                return await connection.fetch(EVERYTHING)
        unsure_of = list(self._own.unsure_of)
        async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
            rows = await connection.fetch(CHANGES, self._snapshot, self._own.writer_id, unsure_of)
        self._own.unsure_of.difference_update(unsure_of)
        return rows

    async def _apply(self, found: Rows, now: datetime, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Show the fleet what was found, passports before what belongs to them, giving way to requests in between.

        A load of a large fleet takes seconds, and the lease is kept up meanwhile.
        """
        self._fleet.apply_outages([outage async for outage in _readable("outage", found, _read_outage)])
        alive_since = live_since(now, self._fleet.outages, LEASE)
        replicas = [replica async for replica in _readable("replica", found, read_replica)]
        self._fleet.replicas.apply(self.replica_id, replicas, alive_since)
        self._keys.apply([key async for key in _readable("key", found, read_key)])
        secrets = dict([entry async for entry in _readable("secrets", found, _read_secrets)])
        for kind, show in (
            ("passport", lambda row: self._apply_passport(row, secrets)),
            ("node", self._apply_lifecycle),
            ("heartbeat", self._apply_heartbeat),
        ):
            async for _ in _readable(kind, found, show):
                await self._keep_lease(connection)

    def _apply_passport(self, row: dict[str, Any], secrets: Mapping[str, Mapping[str, Any]]) -> None:
        """Show a passport and its secrets in one turn: no request meets a new URL with the former URL's key."""
        passport = read_passport(row)
        self._fleet.apply_passport(passport)
        self._fleet.secrets.apply(passport.id, passport.revision, secrets.get(passport.id, {}))

    def _apply_lifecycle(self, row: dict[str, Any]) -> None:
        lifecycle = read_lifecycle(row)
        self._fleet.apply_lifecycle(lifecycle)
        if lifecycle.drain_xid is not None and lifecycle.drain_xid not in Snapshot.parse(self._applied):
            self._drains_seen = True

    def _apply_heartbeat(self, row: dict[str, Any]) -> None:
        if receipt := read_receipt(row):
            self._fleet.apply_receipt(row["passport_id"], receipt)

    async def _tell_of_drains(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Renew the lease at once, and wake whoever waits for this replica to have applied a drain."""
        self._drains_seen = False
        if self._fleet.replicas.count() > 1:
            self._renewal_due = 0.0
            await self._keep_lease(connection)
            async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
                await announce(connection)

    async def _keep_lease(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if time.monotonic() < self._renewal_due:
            return
        running = self._fleet.replicas.tell_all()  # after `_applied` was: see `Replica`
        async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
            lease = (self.replica_id, self._applied_at, self._applied, json.dumps(running), OUTAGE_AFTER)
            outage = await connection.fetchrow(RENEW_LEASE, *lease)
        if outage is not None:
            self._note(Outage(outage["started_at"], outage["ended_at"]))
        self._fleet.lease_renewed_at = self._clock.now()
        self._renewal_due = time.monotonic() + self.lease_renewal_seconds

    def _note(self, outage: Outage) -> None:
        """Hold an outage that is recorded; a restart too short for any node to go stale by it is not worth a word."""
        is_short = outage.ended_at - outage.started_at <= FRESH_WINDOW
        level = logging.DEBUG if is_short else logging.WARNING
        _log.log(level, "no replica could take heartbeats from %s to %s", *outage)
        self._fleet.apply_outages([*self._fleet.outages, outage])


async def _readable(kind: str, found: Rows, read: Callable[[Any], Value]) -> AsyncIterator[Value]:
    """Yield what `read` makes of each row of a kind, giving way to requests in between; its JSON is read just before.

    A row that can't be read (written by a newer version, or by hand) is logged and left out, and holds up no other.
    """
    async for body in in_turns(found.get(kind, ()), _ROWS_A_TURN):
        row = json.loads(body)
        try:
            value = read(row)
        except Exception as error:  # noqa: BLE001 - as above; neither the row nor the trace is logged: they hold secrets
            id_, fault = row.get("id") or row.get("passport_id"), type(error).__name__
            _log.error("a %s could not be read and is left out: %s (%s)", kind, id_, fault)
        else:
            yield value


def _read_secrets(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["id"], dict(row["secrets"])


def _read_outage(row: dict[str, Any]) -> Outage:
    return Outage(datetime.fromisoformat(row["started_at"]), datetime.fromisoformat(row["ended_at"]))
