"""Transactions of up to a minute, few at a time and on dedicated connections, so that requests keep the pool.

Payout reports and the closing of a period use them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.dedicated_connection import Purpose

LONGEST_SECONDS = 60.0  # a step of closing a period, or a report of very many lines
RENEWED_SECONDS = 30.0  # a connection that is older is replaced before its next use, so none is found dead for long
_PURPOSE = Purpose.LONG_TRANSACTIONS
_ONE_SNAPSHOT = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
# From the sixth call on, Postgres would plan a report without its owner, and read the lines of everyone.
_PLAN_EACH = text("SET LOCAL plan_cache_mode = force_custom_plan")


class LongTransactions:
    """Opens long transactions on the database at `url`: two at a time, further ones wait for up to a minute."""

    def __init__(self, url: str) -> None:
        self._database = Database(
            url,
            application=_PURPOSE.application,
            pool_size=_PURPOSE.most,
            timeout_seconds=LONGEST_SECONDS,
            renewed_seconds=RENEWED_SECONDS,
        )

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncConnection]:
        """Open a transaction as soon as fewer than two are open.

        Raises:
            DatabaseUnavailable: the transaction or the wait for it took more than a minute, or Postgres cannot be
                reached.
        """
        async with self._database.transaction() as connection:
            yield connection

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncConnection]:
        """Open a read-only transaction in which every statement sees the database as of the same instant.

        Raises:
            DatabaseUnavailable: as for `transaction`.
        """
        async with self.transaction() as connection:
            await connection.execute(_ONE_SNAPSHOT)
            await connection.execute(_PLAN_EACH)
            yield connection

    async def close(self) -> None:
        """Close every connection."""
        await self._database.close()
