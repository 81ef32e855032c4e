"""Transactions of up to a minute, few at a time and on dedicated connections, so that requests keep the pool.

Payout reports and the closing of a period use them. Reports that several ask for at once are read once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

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


Value = TypeVar("Value")


class SharedReads:
    """Reads that simultaneous callers share: those of one key run one after the other, and at most one of them waits.

    A caller gets a read that begins after its call, so that it sees what was written before.
    """

    def __init__(self) -> None:
        self._running: dict[Hashable, asyncio.Task[Any]] = {}
        self._next: dict[Hashable, asyncio.Task[Any]] = {}

    async def get(self, key: Hashable, read: Callable[[], Awaitable[Value]]) -> Value:
        """Return what `read` returns, or what that of another caller with this key does; raise what it raises."""
        task: asyncio.Task[Value] | None = self._next.get(key)
        if task is None:
            task = self._next[key] = asyncio.create_task(self._run(key, read))
            task.add_done_callback(_take_error)
        return await asyncio.shield(task)  # a caller that leaves ends nobody else's

    async def _run(self, key: Hashable, read: Callable[[], Awaitable[Value]]) -> Value:
        if (previous := self._running.get(key)) is not None:
            await asyncio.wait([previous])
        self._running[key] = self._next.pop(key)
        try:
            return await read()
        finally:
            del self._running[key]


def _take_error(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # or it is logged when every caller has left


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
