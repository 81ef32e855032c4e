"""Transactions that may take a minute, few at a time and on connections of their own: requests keep the pool.

The reports of payouts and the closing of a period use them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.dedicated_connection import Purpose

LONGEST_SECONDS = 60.0  # closing three hundred thousand lines takes some three
_PURPOSE = Purpose.LONG_TRANSACTIONS
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


class LongTransactions:
    """Opens long transactions on the database at `url`, two at a time; further ones wait for their turn."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turns = asyncio.Semaphore(_PURPOSE.most)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction when it is its turn.

        Raises:
            DatabaseUnavailable: it took more than a minute, or Postgres cannot be reached.
        """
        async with self._turns:
            database = Database(
                self._url, application=_PURPOSE.application, pool_size=1, timeout_seconds=LONGEST_SECONDS
            )
            try:
                async with database.transaction() as connection:
                    yield connection
            finally:
                await database.close()

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction in which every statement reads the database as of one instant, and none may write.

        Raises:
            DatabaseUnavailable: it took more than a minute, or Postgres cannot be reached.
        """
        async with self.transaction() as connection:
            await connection.execute(_ONE_SNAPSHOT)
            yield connection
