"""Connections outside the pool. Each belongs to one part of a replica, so that a full pool never delays that part."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum

import asyncpg

from lucid_compute.postgres.database import connect, is_transient


class Purpose(Enum):
    """Every use of a connection outside the pool.

    The value is the `application_name` in `pg_stat_activity`, and how many such connections may be open at a time.
    """

    FEED = "lucid feed", 1
    HEARTBEATS = "lucid heartbeats", 1
    JOBS = "lucid jobs", 1
    SAMPLES = "lucid samples", 1
    REFUSALS = "lucid refusals", 1
    IN_FLIGHT = "lucid in-flight news", 1
    LIMITS = "lucid limits", 1
    ROLLUP_KEEPER = "lucid record keeper", 1
    LONG_TRANSACTIONS = "lucid long transactions", 2

    def __init__(self, application: str, most: int) -> None:
        self.application = application
        self.most = most


DEDICATED_CONNECTIONS = sum(purpose.most for purpose in Purpose)
"""How many connections a replica may have open outside its pool."""


class DedicatedConnection:
    """One connection, opened at its first use and again after it was lost or closed. Only one task may use it."""

    def __init__(
        self,
        url: str,
        purpose: Purpose,
        *,
        session: str = "",
        connect: Callable[..., Awaitable[asyncpg.Connection[asyncpg.Record]]] = connect,
    ) -> None:
        """`session` is SQL that is run whenever the connection is opened, by `connect`."""
        self._connect = connect
        self._url = url
        self._purpose = purpose
        self._session = session
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    @asynccontextmanager
    async def within(self, seconds: float | None) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
        """Yield the open connection for at most `seconds`; None sets no bound.

        When the block raises, the connection is cut, because a statement may be half done. Only an error that Postgres
        reported for a statement leaves it open.

        Raises:
            TimeoutError: `seconds` have passed.
        """
        try:
            async with asyncio.timeout(seconds):
                yield await self._open()
        except BaseException as error:
            if not isinstance(error, asyncpg.PostgresError) or is_transient(error):
                self.terminate()
            raise

    def terminate(self) -> None:
        """Drop the connection at once, without a goodbye to Postgres."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(asyncpg.InterfaceError):
                connection.terminate()

    async def close(self) -> None:
        """Close the connection, and wait a moment for Postgres to release its locks."""
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    async def _open(self) -> asyncpg.Connection[asyncpg.Record]:
        if self._connection is None or self._connection.is_closed():
            self._connection = await self._connect(
                self._url, application=self._purpose.application, session=self._session
            )
        return self._connection
