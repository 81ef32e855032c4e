"""Flushes sums from memory to Postgres exactly once, also when the reply to a commit is lost.

Each flush has a number. The statement that adds its rows also raises the writer's number in `gauge_flushes`: when it is
sent again, it finds its number there and adds nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection

LAST_FLUSH_SECONDS = 2.0

_log = logging.getLogger(__name__)

# $1 is the writer, $2 the growing number of its flush, $3 the rows to add, as JSON. A number that is stored already was
# committed, though its reply was lost: it adds nothing. If its first try still runs, the statement waits for it.
ONCE = """once AS (
    INSERT INTO gauge_flushes AS held (replica_id, number) VALUES ($1, $2)
    ON CONFLICT (replica_id) DO UPDATE SET number = excluded.number, at = now() WHERE held.number < excluded.number
    RETURNING number
)"""


class ExactlyOnceFlushes:
    """A queue of one writer's flushes. Each is kept unchanged until it is known to be committed.

    `statement` adds the rows and contains `ONCE`. Two queues may not share a writer's id.
    """

    def __init__(
        self, connection: DedicatedConnection, statement: str, *, writer_id: str, of: str, timeout_seconds: float
    ) -> None:
        """A flush that takes longer than `timeout_seconds` is tried again. `of` names the rows in the log."""
        self._statement = statement
        self._writer_id = writer_id
        self._of = of
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[tuple[int, str]] = deque()
        self._connection = connection
        self.number = 0

    def __len__(self) -> int:
        """Return how many flushes are not known to be committed."""
        return len(self._waiting)

    def add(self, rows: str) -> None:
        """Queue one flush."""
        self.number += 1
        self._waiting.append((self.number, rows))

    async def run(self, flush: Callable[[], Awaitable[None]], pause_seconds: Callable[[], float]) -> None:
        """Call `flush` after each pause until this task is cancelled, and then once more."""
        try:
            while True:
                await asyncio.sleep(pause_seconds())
                await flush()
        finally:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH_SECONDS):
                    await flush()
            self.close()

    async def write(self) -> None:
        """Write queued flushes until one fails; the rest is kept for the next call."""
        while self._waiting and await self._write(*self._waiting[0]):
            self._waiting.popleft()

    def close(self) -> None:
        """Drop the connection; the next flush opens a new one."""
        self._connection.terminate()

    async def _write(self, number: int, rows: str) -> bool:
        """Write one flush; return whether it can leave the queue."""
        try:
            async with self._connection.within(self._timeout_seconds) as connection:
                await connection.execute(self._statement, self._writer_id, number, rows)
        except Exception as error:  # noqa: BLE001 - after any failure the sums are kept, or left out with a line in the log
            if is_transient(error):
                return False
            _log.error("%s were refused and are left out", self._of, exc_info=error)
        return True
