"""How many active passports an owner may have. Counting them for each registration would take longer than the rest."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import InvalidRequest

COUNT_AGAIN_SECONDS = 60.0
CAREFUL_SHARE = 100  # a replica that has just counted registers a hundredth of what is left without counting again
MAX_OWNERS = 10_000
_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('lucid passports of ' || :owner, 0))")
_COUNT = text("SELECT count(*) FROM passports WHERE owner = :owner AND status <> 'revoked' AND deregistered_at IS NULL")


class _Room(NamedTuple):
    left: int
    counted_at: float


class Excess(NamedTuple):
    """How many new passports are too many, and the error for each of them."""

    passports: int
    error: InvalidRequest


class PassportQuota:
    """Refuses a passport that is one too many for its owner; a quota of 0 refuses none.

    Replicas count separately, and each trusts a count for a small part of what was left. So they do not exceed the
    quota together. An owner near its quota is counted each time, one registration after another.
    """

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._rooms: dict[str, _Room] = {}

    async def check(self, connection: AsyncConnection, owner: str) -> None:
        """Check the owner's passports, the new one among them, in the transaction that has inserted it.

        Raises:
            InvalidRequest: they are too many.
        """
        if excess := await self.find_excess(connection, owner, 1):
            raise excess.error

    async def find_excess(self, connection: AsyncConnection, owner: str, added: int) -> Excess | None:
        """Return how many of the owner's passports that this transaction `added` are too many; None if none is."""
        if not self._most:
            return None
        room, now = self._rooms.get(owner), self._clock()
        if room is not None and room.left >= added and now - room.counted_at < COUNT_AGAIN_SECONDS:
            self._rooms[owner] = room._replace(left=room.left - added)
            return None
        self._rooms.pop(owner, None)
        await connection.execute(_LOCK, {"owner": owner})
        count = await connection.scalar(_COUNT, {"owner": owner}) or 0
        if count > self._most:
            kept = max(count - added, self._most)
            message = (
                f"{owner!r} has {kept:,} active passports, and {self._most:,} are allowed. Revoke or deregister "
                "those that are not used, or ask the operator for a larger LUCID_PASSPORTS_PER_OWNER."
            )
            return Excess(min(count - self._most, added), InvalidRequest.at("owner", message))
        if len(self._rooms) >= MAX_OWNERS:
            self._rooms.clear()
        self._rooms[owner] = _Room((self._most - count) // CAREFUL_SHARE, now)
        return None
