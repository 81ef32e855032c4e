"""How replicas share the limits of keys: Postgres has one row for each limit, with the share that each replica holds.

The shares of a limit never add up to more than the limit. A replica uses its own share without asking, gets more when
it has used it up, and returns what it does not use. So a key may spend its limit at once, on any replica.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

MAX_ASKS = 500  # of one statement: some 20 ms
TIMEOUT_SECONDS = 1.0
# A share counts for a minute after it was last confirmed, since what its replica spent counts for as long.
_SHARE_OUT = """
    SELECT granted, elsewhere, free_in_seconds
    FROM share_out_limits($1, $2::text[], $3::text[], $4::int8[], $5::int8[], $6::int8[], $7::float8[])
"""


class Ask(NamedTuple):
    """What a replica holds of a key's limit and wants: `used` within the last minute, and up to `wanted`.

    `free_in_seconds` is when its next use comes back; None without one.
    """

    key_id: str
    unit: str
    most: int
    used: int
    wanted: int
    free_in_seconds: float | None


class Grant(NamedTuple):
    """The share that a replica holds from now on, what others hold, and when one of them gets a use back, if known."""

    share: int
    elsewhere: int
    free_in_seconds: float | None


class LimitShares:
    """One replica's connection to the shares."""

    def __init__(self, url: str, *, replica_id: str) -> None:
        self._connection = DedicatedConnection(url, Purpose.LIMITS)
        self._replica_id = replica_id

    async def exchange(self, asks: Sequence[Ask]) -> list[Grant]:
        """Return what is granted, in the order of `asks`, which are sorted so that no replicas block each other.

        Raises:
            Exception: Postgres did not respond in time, or refused; no share has changed as far as this replica knows.
        """
        columns = [list(column) for column in zip(*asks, strict=True)]
        async with self._connection.within(TIMEOUT_SECONDS) as connection:
            return [Grant(*row) for row in await connection.fetch(_SHARE_OUT, self._replica_id, *columns)]

    def close(self) -> None:
        """Drop the connection."""
        self._connection.terminate()
