"""The feed: keeps this replica's fleet and keys in step with Postgres, and this replica's lease alive.

NOTIFY wakes it within milliseconds of a registration, a drain or a new key; a poll twice a second brings what
notifications do not tell (heartbeats that other replicas took) and whatever a lost notification would have told.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any

import asyncpg

from lucid_compute.fleet.fleet import Fleet
from lucid_compute.fleet.key_ring import KeyRing
from lucid_compute.fleet.outages import Outage
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import CHANGES_CHANNEL, connect, is_passing
from lucid_compute.storage.feed_sql import CHANGES, EVERYTHING, RENEW_LEASE
from lucid_compute.storage.rows import read_key, read_lifecycle, read_passport, read_receipt, read_replica

POLL_SECONDS = 0.5
LEASE_RENEWAL_SECONDS = 1.0
OUTAGE_AFTER = timedelta(seconds=3)
QUERY_TIMEOUT_SECONDS = 10.0
LOAD_TIMEOUT_SECONDS = 60.0
RECONNECT_SECONDS = 0.2
CURRENT_WITHIN = timedelta(seconds=5)
CATCH_UP_TIMEOUT_SECONDS = 1.0
CATCH_UP_INTERVAL_SECONDS = 0.05

_log = logging.getLogger(__name__)
_EMPTY_SNAPSHOT = "3:3:"
_ROWS_A_TURN = 100  # a millisecond or two


class Feed:
    """Follows Postgres for one replica. `listens` off leaves the poll alone to do it."""

    def __init__(
        self, url: str, fleet: Fleet, keys: KeyRing, clock: DatabaseClock, *, replica_id: str, listens: bool = True
    ) -> None:
        """Follow the database at `url` into `fleet` and `keys`."""
        self._url = url
        self._fleet = fleet
        self._keys = keys
        self._clock = clock
        self._replica_id = replica_id
        self._listens = listens
        self.loaded = asyncio.Event()
        self._wake = asyncio.Event()
        self._caught_up = asyncio.Event()
        self._snapshot: str | None = None
        self._renewed_at: datetime | None = None
        self._renewal_due = 0.0
        self._recorded: list[Outage] = []
        self._last_catch_up = 0.0

    def is_current(self) -> bool:
        """Whether the fleet is loaded and no more than five seconds behind Postgres."""
        followed_at = self._keys.followed_at
        return followed_at is not None and self._clock.now() - followed_at <= CURRENT_WITHIN

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
            connection = None
            try:
                connection = await connect(self._url, application="lucid feed")
                await self._follow(connection)
            except Exception as error:  # noqa: BLE001 - a replica without its feed would serve what was, for good
                if not is_passing(error):
                    _log.exception("the feed stumbled and starts over")
                self._note_open_outage()
                await asyncio.sleep(RECONNECT_SECONDS)
            finally:
                if connection is not None:
                    connection.terminate()

    async def _follow(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if self._listens:
            await connection.add_listener(CHANGES_CHANNEL, lambda *_: self._wake.set())
        self._snapshot = None
        while True:
            self._wake.clear()
            caught_up, self._caught_up = self._caught_up, asyncio.Event()
            await self._read(connection)
            caught_up.set()
            if time.monotonic() >= self._renewal_due:
                async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
                    await self._renew_lease(connection)
            with suppress(TimeoutError):
                # wait_for would lose a cancellation that comes together with the wake-up, and the replica never stop
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _read(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        if self._snapshot is None:
            async with asyncio.timeout(LOAD_TIMEOUT_SECONDS):
                rows = await connection.fetch(EVERYTHING)
        else:
            async with asyncio.timeout(QUERY_TIMEOUT_SECONDS):
                rows = await connection.fetch(CHANGES, self._snapshot, self._replica_id)
        found: dict[str, list[str]] = {}
        for kind, body in rows:
            found.setdefault(kind, []).append(body)
        self._clock.set(datetime.fromisoformat(json.loads(found["now"][0])))
        await self._apply(found)
        self._snapshot = json.loads(found["snapshot"][0])
        self._keys.followed_at = self._clock.now()
        self.loaded.set()

    async def _apply(self, found: dict[str, list[str]]) -> None:
        """Show the fleet what was found, passports before what belongs to them, giving way to requests in between."""
        self._recorded = [
            Outage(*map(datetime.fromisoformat, (o["started_at"], o["ended_at"])))
            for o in map(json.loads, found.get("outage", ()))
        ]
        self._fleet.apply_outages(self._recorded)
        replicas = [read_replica(json.loads(body)) for body in found.get("replica", ())]
        self._fleet.replicas.apply(self._replica_id, replicas, self._clock.now())
        self._keys.apply(read_key(json.loads(body)) for body in found.get("key", ()))
        await _apply_each(found.get("passport", []), lambda row: self._fleet.apply_passport(read_passport(row)))
        await _apply_each(found.get("node", []), lambda row: self._fleet.apply_lifecycle(read_lifecycle(row)))
        await _apply_each(found.get("heartbeat", []), self._apply_heartbeat)

    def _apply_heartbeat(self, row: dict[str, Any]) -> None:
        if receipt := read_receipt(row):
            self._fleet.apply_receipt(row["passport_id"], receipt)

    async def _renew_lease(self, connection: asyncpg.Connection[asyncpg.Record]) -> None:
        outage = await connection.fetchrow(
            RENEW_LEASE,
            self._replica_id,
            self._clock.now(),
            self._snapshot or _EMPTY_SNAPSHOT,
            json.dumps({node: count for node, count in self._fleet.replicas.own_in_flight.items() if count}),
            OUTAGE_AFTER,
        )
        if outage is not None:
            _log.warning("no replica could take heartbeats from %s to %s", outage["started_at"], outage["ended_at"])
        self._renewed_at = self._clock.now()
        self._renewal_due = time.monotonic() + LEASE_RENEWAL_SECONDS

    def _note_open_outage(self) -> None:
        """Count the time since the lease was last renewed as ours, until Postgres can record it."""
        now = self._clock.now()
        if self._renewed_at is not None and now - self._renewed_at > OUTAGE_AFTER:
            self._fleet.apply_outages([*self._recorded, Outage(self._renewed_at, now)])


async def _apply_each(bodies: list[str], apply: Callable[[Any], None]) -> None:
    """Apply each row; its JSON is read just before, so that no more than one row is held twice.

    A row that can't be read (written by a newer version, or by hand) is logged and left out, and holds up no other.
    """
    for position, body in enumerate(bodies):
        try:
            apply(json.loads(body))
        except (ValueError, KeyError, TypeError):
            _log.exception("a row could not be read and is left out: %.200s", body)
        if position % _ROWS_A_TURN == _ROWS_A_TURN - 1:
            await asyncio.sleep(0)
