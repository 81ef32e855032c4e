"""The change feed: keeps this replica's fleet and keys in step with Postgres, and renews this replica's lease.

NOTIFY wakes it within milliseconds of a registration, a drain or a new key. A poll twice a second reads what has no
notification (heartbeats that other replicas accepted), and makes up for lost notifications.
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

from lucid_compute.postgres.changes import CHANGES_CHANNEL, adopt_rows, announce
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.domain.node_state import FRESH_WINDOW, Receipt
from lucid_compute.registry.fleet.continuity import Identity, Progress, find_break, read_identity
from lucid_compute.registry.fleet.fleet import Fleet, clipped
from lucid_compute.registry.fleet.in_flight_broadcast import IN_FLIGHT_CHANNEL, receive
from lucid_compute.registry.fleet.key_ring import ENDED_KEYS_KEPT, KeyRing
from lucid_compute.registry.fleet.replicas import CLOCK_SLACK, LEASE, OUTAGE_AFTER, Outage, Snapshot, live_since
from lucid_compute.registry.fleet.rows import read_key, read_lifecycle, read_passport, read_receipt, read_replica
from lucid_compute.web.turns import in_turns


class OwnHeartbeats:
    """Tells the feed which heartbeats it need not read back: those that this replica wrote, except doubtful ones.

    After a commit that failed, or may have failed, the writer continues under another id. So a batch that commits late
    is read like another replica's. `unsure_of` names the nodes whose heartbeats have to be read back.
    """

    def __init__(self) -> None:
        self.writer_id = str(uuid4())
        self.unsure_of: set[str] = set()

    def mark_unsure(self, passport_ids: Iterable[str]) -> None:
        """Have these nodes' heartbeats read back, and all that is committed later under the previous id."""
        self.writer_id = str(uuid4())
        self.unsure_of.update(passport_ids)


_SLACK = f"interval '{CLOCK_SLACK.total_seconds()} seconds'"
ENDED_NODES_KEPT = timedelta(minutes=5)
"""How long nodes that were deregistered or revoked still appear in lists and explanations."""
_MIRRORED = f"""
    p.type IN ('compute', 'model')
    AND (p.status <> 'revoked' AND p.deregistered_at IS NULL
         OR p.updated_at > now() - interval '{ENDED_NODES_KEPT.total_seconds()} seconds')
"""
_SERVICE = """
    SELECT 'snapshot' AS kind, to_jsonb(pg_current_snapshot()::text)::text AS body
    UNION ALL SELECT 'now', to_jsonb(clock_timestamp())::text
    UNION ALL SELECT 'file', to_jsonb(pg_relation_filenode('passports'))::text
    UNION ALL SELECT 'replica', to_jsonb(r)::text FROM replicas r
    UNION ALL SELECT 'outage', to_jsonb(o)::text FROM outages o WHERE o.ended_at > now() - interval '30 days'
"""
# Secrets come with the row of their passport and have its revision. A passport that comes without them has none.
_SECRETS = """
    SELECT 'secrets', jsonb_build_object('id', p.id, 'secrets', p.secrets)::text FROM passports p
    WHERE p.secrets <> '{}' AND p.type IN ('compute', 'model') AND p.status <> 'revoked' AND p.deregistered_at IS NULL
"""
EVERYTHING = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k
        WHERE least(k.revoked_at, k.expires_at, 'infinity') > now() - interval '{ENDED_KEYS_KEPT.days} days'
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {_MIRRORED}
    UNION ALL {_SECRETS} AND {_MIRRORED}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n JOIN passports p ON p.id = n.passport_id WHERE {_MIRRORED}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h JOIN passports p ON p.id = h.passport_id
        WHERE h.received_at IS NOT NULL AND {_MIRRORED}
"""
# Exactly what the snapshot $1 did not show, by the index: what a long transaction anywhere holds open costs nothing.
UNSEEN = (
    "(changed_xid >= pg_snapshot_xmax($1::text::pg_snapshot) "
    "OR changed_xid = ANY(ARRAY(SELECT pg_snapshot_xip($1::text::pg_snapshot))))"
)
CHANGES = f"""
    {_SERVICE}
    UNION ALL SELECT 'key', to_jsonb(k)::text FROM api_keys k WHERE {UNSEEN}
    UNION ALL SELECT 'passport', (to_jsonb(p) - 'secrets')::text FROM passports p WHERE {UNSEEN}
    UNION ALL {_SECRETS} AND {UNSEEN}
    UNION ALL SELECT 'node', to_jsonb(n)::text FROM nodes n WHERE {UNSEEN}
    UNION ALL SELECT 'heartbeat', to_jsonb(h)::text FROM heartbeats h WHERE h.passport_id IN (
        SELECT unnest(b.passport_ids) FROM heartbeat_batches b WHERE {UNSEEN} AND b.replica_id <> $2
        UNION ALL SELECT unnest($3::uuid[])
    )
"""
# Renews the lease, and records an outage when no replica renewed its lease for longer than $5. Renewing needs what
# accepting heartbeats needs: a loop that runs and a database that commits. $6 is the last renewal that this replica
# knows of: a standby that was promoted may have lost it.
RENEW_LEASE = """
WITH silent AS (
    SELECT max(at) AS since FROM (
        SELECT seen_at AS at FROM replicas
        UNION ALL SELECT least($6, clock_timestamp()) WHERE $6::timestamptz IS NOT NULL
    ) known
), renewed AS (
    INSERT INTO replicas (id, seen_at, applied_at, applied_snapshot, in_flight)
    VALUES ($1, clock_timestamp(), $2, $3, $4::jsonb)
    ON CONFLICT (id) DO UPDATE SET
        seen_at = clock_timestamp(), applied_at = $2, applied_snapshot = $3, in_flight = $4::jsonb
    RETURNING seen_at
), recorded AS (
    INSERT INTO outages (started_at, ended_at)
    SELECT since, clock_timestamp() FROM silent WHERE clock_timestamp() - since > $5::interval
    RETURNING started_at, ended_at
)
SELECT seen_at, started_at, ended_at FROM renewed LEFT JOIN recorded ON true
"""
# When the clock stepped back: no lease was renewed later than now, and no outage ended later. A replica that died would
# else count as alive, and its outages as outages of ours, for as long as the step was.
CLIP_TO_NOW = f"""
WITH leases AS (
    UPDATE replicas SET seen_at = clock_timestamp() WHERE id IN (
        SELECT id FROM replicas WHERE seen_at > clock_timestamp() + {_SLACK} FOR UPDATE SKIP LOCKED
    )
), unborn AS (
    DELETE FROM outages WHERE started_at > clock_timestamp()
)
UPDATE outages SET ended_at = clock_timestamp()
WHERE ended_at > clock_timestamp() + {_SLACK} AND started_at <= clock_timestamp()
"""
POLL_SECONDS = 0.5
LEAST_SECONDS = 0.02  # from one read to the next, however many notifications come
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
    """Follows Postgres for one replica. With `listens` off it only polls."""

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
        """Apply changes in the database at `url` to `fleet` and `keys`; `own` says which heartbeats to leave out."""
        self._connection = DedicatedConnection(url, Purpose.FEED)
        self._fleet = fleet
        self._keys = keys
        self._clock = clock
        self.replica_id = replica_id
        self._own = own
        self._listens = listens
        self.lease_renewal_seconds = LEASE_RENEWAL_SECONDS
        self.least_seconds = LEAST_SECONDS
        self.loaded = asyncio.Event()
        self.read_at: datetime | None = None  # the fleet shows what was in Postgres then
        self.trouble: Exception | None = None  # why the last connection ended
        self._wake = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._snapshot: str | None = None
        self._identity: Identity = ()
        self._file: str | None = None
        self._progress: Progress | None = None
        self._progress_at = 0.0
        self._lease: datetime | None = None
        self._applied, self._applied_at = _NOTHING_APPLIED, _NEVER
        self._renewal_due = 0.0
        self._drains_seen = False
        self._last_catch_up = 0.0

    def is_current(self) -> bool:
        """Return whether the fleet is loaded and at most five seconds behind Postgres."""
        return self.read_at is not None and self._clock.now() - self.read_at <= CURRENT_WITHIN

    def knows_replica(self, replica_id: str) -> bool:
        """Return whether the id is that of a live replica, this one included."""
        return replica_id == self.replica_id or any(o.id == replica_id for o in self._fleet.replicas.others())

    async def catch_up(self) -> None:
        """Read Postgres now, for what another replica may have just written. Simultaneous callers share one read."""
        pause = self._last_catch_up + CATCH_UP_INTERVAL_SECONDS - time.monotonic()
        if pause > 0:
            await asyncio.sleep(pause)
        caught_up = self._caught_up  # of the next read: one under way may have begun too early
        self._wake.set()
        with suppress(TimeoutError):
            await asyncio.wait_for(caught_up.wait(), CATCH_UP_TIMEOUT_SECONDS)
        self._last_catch_up = time.monotonic()

    async def run(self) -> None:
        """Follow Postgres until this task is cancelled, through any outage of the database."""
        while True:
            try:
                async with self._connection.within(None) as connection:
                    await self._follow(connection)
            except Exception as error:  # noqa: BLE001 - a replica without its feed would serve stale data forever
                self.trouble = error
                if not is_transient(error):
                    _log.exception("the change feed failed and starts over")
                self._connection.terminate()  # the next one gets its listeners again
                await asyncio.sleep(RECONNECT_SECONDS)

    async def _follow(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if self._listens:
            await connection.add_listener(CHANGES_CHANNEL, lambda *_: self._wake.set())
            await connection.add_listener(IN_FLIGHT_CHANNEL, lambda *call: receive(self._fleet.replicas, str(call[-1])))
        await self._resume(connection)
        while True:
            self._wake.clear()
            began = time.monotonic()
            caught_up, self._caught_up = self._caught_up, asyncio.Event()
            # The lease first: an outage that it records is read right after, so no node counts as dead because of it.
            await self._renew_due_lease(connection)
            await self._read(connection)
            caught_up.set()
            with suppress(TimeoutError):
                # wait_for would lose a cancellation that comes together with the wake-up; the replica would not stop
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()
            await asyncio.sleep(began + self.least_seconds - time.monotonic())

    async def _resume(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Read on where the last connection stopped, or begin with a full load if that is not possible."""
        self._renewal_due, began = 0.0, time.monotonic()
        await self._set_clock(await connection.fetchval("SELECT clock_timestamp()"), began)
        identity, progress = await read_identity(connection), self._progress
        if progress is not None:
            away = timedelta(seconds=time.monotonic() - self._progress_at)
            if reason := await find_break(connection, self.replica_id, identity, progress, away=away):
                await self._start_over(connection, reason)
        self._identity = identity

    async def _start_over(self, connection: asyncpg.Connection[asyncpg.Record], reason: str) -> None:
        """Have the next read replace everything; transaction ids and snapshots of before mean nothing any more."""
        _log.warning("the database is loaded again as a whole: %s", reason)
        self._snapshot = self._progress = None
        self._applied, self._applied_at = _NOTHING_APPLIED, _NEVER
        await adopt_rows(connection)

    async def _set_clock(self, now: datetime, asked_at: float) -> None:
        """Set the clock to what was asked then; if it stepped back, let no heartbeat in memory be later than now."""
        took = timedelta(seconds=time.monotonic() - asked_at)
        stepped_back = self._clock.now() - now > took + CLOCK_SLACK
        self._clock.set(now)
        if stepped_back:
            async for node in in_turns(self._fleet.nodes(), _ROWS_A_TURN):
                self._fleet.clip(node, now)

    async def _read(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        is_load = self._snapshot is None
        if is_load:
            self._fleet.begin_load()
            self._keys.begin_load()
        unsure_of, self._own.unsure_of = self._own.unsure_of, set()
        try:
            rows = await self._fetch(connection, unsure_of)
            if rows["file"][0] != self._file and not is_load:
                await self._start_over(connection, "its passports were restored, or rewritten")
                self._wake.set()
                return
            await self._apply(rows, connection, is_load=is_load)
        except BaseException:  # the next read brings them
            self._own.unsure_of |= unsure_of
            raise
        self._snapshot, self._file = json.loads(rows["snapshot"][0]), rows["file"][0]
        self._applied = self._snapshot
        self._applied_at = self.read_at = datetime.fromisoformat(json.loads(rows["now"][0]))
        self._record_progress()
        self.loaded.set()
        if self._drains_seen:
            await self._publish_drains(connection)

    def _record_progress(self) -> None:
        snapshot = Snapshot.parse(self._applied)
        self._fleet.replicas.record_read(snapshot)
        if self._lease is not None:
            self._progress = Progress(self._identity, snapshot, self._applied_at, self._lease)
            self._progress_at = time.monotonic()

    async def _fetch(self, connection: asyncpg.Connection[asyncpg.Record], unsure_of: Iterable[str]) -> Rows:
        """Return the JSON of everything, or of what has changed, by kind; set the clock."""
        rows: Rows = {}
        asked_at = time.monotonic()
        if self._snapshot is None:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                found = await connection.fetch(EVERYTHING)
                asked_at = time.monotonic()
                now = await connection.fetchval("SELECT clock_timestamp()")  # the load's is as old as the load is long
        else:
            async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
                found = await connection.fetch(CHANGES, self._snapshot, self._own.writer_id, list(unsure_of))
                now = None
        for kind, body in found:
            rows.setdefault(kind, []).append(body)
        await self._set_clock(now or datetime.fromisoformat(json.loads(rows["now"][0])), asked_at)
        return rows

    async def _apply(self, rows: Rows, connection: asyncpg.Connection[asyncpg.Record], *, is_load: bool) -> None:
        """Apply the rows to fleet and keys, passports before what belongs to them; requests run in between.

        Loading a large fleet takes seconds, so the lease is renewed meanwhile. Keys come first: nobody waits for the
        nodes to be told that a key is valid.
        """
        now = datetime.fromisoformat(json.loads(rows["now"][0]))
        self._keys.apply([key async for key in _readable("key", rows, read_key)])
        if is_load:
            self._keys.end_load({json.loads(body)["id"] for body in rows.get("key", ())})
        self._keys.synced_at = now
        await self._apply_replicas(rows, now, connection)
        secrets = dict([entry async for entry in _readable("secrets", rows, _read_secrets)])
        apply_receipt = self._fleet.load_receipt if is_load else self._fleet.apply_receipt
        for kind, apply in (
            ("passport", lambda row: self._apply_passport(row, secrets)),
            ("node", self._apply_lifecycle),
            ("heartbeat", lambda row: _apply_heartbeat(row, now, apply_receipt)),
        ):
            async for _ in _readable(kind, rows, apply):
                await self._renew_due_lease(connection)
        if is_load:
            self._fleet.end_load({json.loads(body)["id"] for body in rows.get("passport", ())})

    async def _apply_replicas(self, rows: Rows, now: datetime, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Apply leases and outages. Those of a time that has not come are put right in the database."""
        outages = [outage async for outage in _readable("outage", rows, _read_outage)]
        replicas = [replica async for replica in _readable("replica", rows, read_replica)]
        self._fleet.apply_outages(Outage(o.started_at, min(o.ended_at, now)) for o in outages if o.started_at < now)
        self._fleet.replicas.apply(self.replica_id, replicas, live_since(now, self._fleet.outages, LEASE))
        latest = max(
            (*(outage.ended_at for outage in outages), *(replica.seen_at for replica in replicas)), default=now
        )
        if latest > now + CLOCK_SLACK:
            _log.warning("the database's clock stepped back by %s or more", latest - now)
            await connection.execute(CLIP_TO_NOW)
            self._wake.set()

    def _apply_passport(self, row: dict[str, Any], secrets: Mapping[str, Mapping[str, Any]]) -> None:
        """Apply a passport and its secrets in one turn, so no request uses a new URL with the previous URL's key."""
        passport = read_passport(row)
        self._fleet.apply_passport(passport)
        self._fleet.secrets.apply(passport.id, passport.revision, secrets.get(passport.id, {}))

    def _apply_lifecycle(self, row: dict[str, Any]) -> None:
        lifecycle = read_lifecycle(row)
        self._fleet.apply_lifecycle(lifecycle)
        if lifecycle.drain_xid is not None and lifecycle.drain_xid not in Snapshot.parse(self._applied):
            self._drains_seen = True

    async def _publish_drains(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        """Renew the lease at once, and wake the replicas that wait for this one to apply a drain."""
        self._drains_seen = False
        if self._fleet.replicas.count() > 1:
            self._renewal_due = 0.0
            await self._renew_due_lease(connection)
            async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
                await announce(connection)

    async def _renew_due_lease(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if time.monotonic() < self._renewal_due:
            return
        in_flight = self._fleet.replicas.counts_for_lease()  # after `_applied` was set: see `ReplicaRecord`
        async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
            lease = (self.replica_id, self._applied_at, self._applied, json.dumps(in_flight), OUTAGE_AFTER, self._lease)
            ((self._lease, *outage),) = await connection.fetch(RENEW_LEASE, *lease)
        if outage[0] is not None:
            self._record_outage(Outage(*outage))
        self._fleet.lease_renewed_at = self._clock.now()
        self._renewal_due = time.monotonic() + self.lease_renewal_seconds

    def _record_outage(self, outage: Outage) -> None:
        """Apply a recorded outage, and log it unless it was too short for any node to become stale."""
        is_short = outage.ended_at - outage.started_at <= FRESH_WINDOW
        level = logging.DEBUG if is_short else logging.WARNING
        _log.log(level, "no replica could take heartbeats from %s to %s", *outage)
        self._fleet.apply_outages([*self._fleet.outages, outage])


async def _readable(kind: str, rows: Rows, read: Callable[[Any], Value]) -> AsyncIterator[Value]:
    """Yield `read(row)` for each row of a kind; requests run in between, and each row's JSON is parsed when needed.

    A row that can't be read (written by a newer version, or by hand) is logged and left out, without harm to others.
    """
    async for body in in_turns(rows.get(kind, ()), _ROWS_A_TURN):
        row = json.loads(body)
        try:
            value = read(row)
        except Exception as error:  # noqa: BLE001 - as above; row and traceback are not logged: they hold secrets
            id_, fault = row.get("id") or row.get("passport_id"), type(error).__name__
            _log.error("a %s could not be read and is left out: %s (%s)", kind, id_, fault)
        else:
            yield value


def _apply_heartbeat(row: dict[str, Any], now: datetime, apply: Callable[[str, Receipt], None]) -> None:
    if receipt := read_receipt(row):
        apply(row["passport_id"], clipped(receipt, now))


def _read_secrets(row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    return row["id"], dict(row["secrets"])


def _read_outage(row: dict[str, Any]) -> Outage:
    return Outage(datetime.fromisoformat(row["started_at"]), datetime.fromisoformat(row["ended_at"]))
