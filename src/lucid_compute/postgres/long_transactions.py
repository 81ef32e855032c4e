"""Transactions of up to a minute, few at a time and on dedicated connections, so that requests keep the pool.

Payout reports and the closing of a period use them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.dedicated_connection import Purpose

LONGEST_SECONDS = 60.0  # closing 300,000 lines takes about 3 s
_PURPOSE = Purpose.LONG_TRANSACTIONS
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")


class LongTransactions:
    """Opens long transactions on the database at `url`: two at a time, further ones wait."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turns = asyncio.Semaphore(_PURPOSE.most)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction as soon as fewer than two are open.

        Raises:
            DatabaseUnavailable: the transaction took more than a minute, or Postgres cannot be reached.
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
        """Open a read-only transaction in which every statement sees the database as of the same instant.

        Raises:
            DatabaseUnavailable: the transaction took more than a minute, or Postgres cannot be reached.
        """
        async with self.transaction() as connection:
            await connection.execute(_ONE_SNAPSHOT)
            yield connection
