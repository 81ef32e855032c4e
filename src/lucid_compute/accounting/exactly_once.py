"""Sums that a replica holds in memory, written now and then, each once: whatever becomes of an answer.

Each flush has a number, and the statement that adds it also raises the writer's number in `gauge_flushes`: sent again,
it finds its number there and adds nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress

from lucid_compute.postgres.database import is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

LAST_FLUSH_SECONDS = 2.0

_log = logging.getLogger(__name__)

# $1 the writer, $2 the number of what it flushes, which grows. A number that is there already was committed, though its
# answer was lost, and adds nothing; one whose first try still runs is waited for. What is to be added is $3, as JSON.
ONCE = """once AS (
    INSERT INTO gauge_flushes AS held (replica_id, number) VALUES ($1, $2)
    ON CONFLICT (replica_id) DO UPDATE SET number = excluded.number, at = now() WHERE held.number < excluded.number
    RETURNING number
)"""


class ExactlyOnceFlushes:
    """What one writer has to flush by `statement`, which adds `ONCE`; kept as it is until it is known to be written.

    No two things that are flushed may share a writer's id.
    """

    def __init__(
        self, url: str, purpose: Purpose, statement: str, *, writer_id: str, of: str, timeout_seconds: float
    ) -> None:
        """Flush to the database at `url`; a flush that takes longer than `timeout_seconds` is tried again.

        `of` is what is flushed, to be named in the log.
        """
        self._statement = statement
        self._writer_id = writer_id
        self._of = of
        self._timeout_seconds = timeout_seconds
        self._waiting: deque[tuple[int, str]] = deque()
        self._connection = DedicatedConnection(url, purpose)
        self.number = 0

    def __len__(self) -> int:
        """Return how many flushes are not known to be written."""
        return len(self._waiting)

    def add(self, rows: str) -> None:
        """Take one flush more."""
        self.number += 1
        self._waiting.append((self.number, rows))

    async def run(self, flush: Callable[[], Awaitable[None]], pause_seconds: Callable[[], float]) -> None:
        """Flush after each pause for as long as this task runs, and once more when it is cancelled."""
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
        """Write what waits, as far as the database takes it now; the rest is kept for the next time."""
        while self._waiting and await self._write(*self._waiting[0]):
            self._waiting.popleft()

    def close(self) -> None:
        """Drop the connection; the next flush opens another."""
        self._connection.terminate()

    async def _write(self, number: int, rows: str) -> bool:
        """Return whether this flush is done with."""
        try:
            async with self._connection.within(self._timeout_seconds) as connection:
                await connection.execute(self._statement, self._writer_id, number, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, the sums are kept or left out, and it is said
            if is_transient(error):
                return False
            _log.error("%s were refused and are left out", self._of, exc_info=error)
        return True
