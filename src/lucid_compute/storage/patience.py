"""Long readings of payouts: on connections of their own, few at a time, so that nothing else waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.storage.database import Database

PATIENT_SECONDS = 60.0  # closing three hundred thousand lines takes some three
AT_A_TIME = 2
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


class Patience:
    """Opens transactions that may take a while; others have the pool meanwhile."""

    def __init__(self, database: Database) -> None:
        """Open them on `database`."""
        self._database = database
        self._turns = asyncio.Semaphore(AT_A_TIME)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open one when it is its turn, on a connection of its own.

        Raises:
            DatabaseUnavailable: it took a minute, or the database is away.
        """
        async with self._turns:
            database = Database(self._database.url, pool_size=1, timeout_seconds=PATIENT_SECONDS)
            try:
                async with database.transaction() as connection:
                    yield connection
            finally:
                await database.close()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Open one in which every statement sees the same instant, and none writes."""
        async with self.transaction() as connection:
            await connection.execute(_ONE_SNAPSHOT)
            yield connection
