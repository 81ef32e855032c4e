"""Deletion of old rows in small batches, by one replica at a time, so that a busy table keeps working.

Each batch is a short transaction. The replica that deletes rests as long as each batch took. A batch that takes too
long is tried again with fewer rows, so that a slow disk delays the deletion and does not end it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from sqlalchemy import Row, TextClause, text

from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.postgres.database import Database

BATCH = 2000  # rows: about 30 ms
SMALLEST_BATCH = 20
RETENTION_LOCK = 0x6A6F6273  # an advisory lock of our own: "jobs"
_log = logging.getLogger(__name__)


class BatchDeletion:
    """Runs one statement until it deletes no more rows. It has the parameter `:batch`, and returns their number."""

    def __init__(self, database: Database, what: str, statement: TextClause) -> None:
        """`what` names the rows in the log, such as "jobs"."""
        self._database = database
        self._what = what
        self._statement = statement

    async def run(self, batch: int = BATCH, **parameters: Any) -> int:
        """Delete every row that the statement selects; return their number: 0 while another replica deletes.

        Raises:
            DatabaseUnavailable: not even a small batch could be deleted in time; the log says so.
        """
        deleted = 0
        while (row := await self.delete_some(batch, **parameters)) and row[0]:
            deleted += row[0]
        return deleted

    async def delete_some(self, batch: int = BATCH, **parameters: Any) -> Row[Any] | None:
        """Delete one batch and rest; return the statement's row, None while another replica deletes.

        Raises:
            DatabaseUnavailable: not even a small batch could be deleted in time; the log says so.
        """
        while True:
            began = time.monotonic()
            try:
                row = await self._execute({"batch": batch, **parameters})
            except DatabaseUnavailable:
                if batch <= SMALLEST_BATCH:
                    _log.warning("old %s could not be deleted: the database did not answer in time", self._what)
                    raise
                batch = max(batch // 10, SMALLEST_BATCH)
            else:
                await asyncio.sleep(time.monotonic() - began)
                return row

    async def _execute(self, parameters: dict[str, Any]) -> Row[Any] | None:
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({RETENTION_LOCK})")):
                return None
            return (await connection.execute(self._statement, parameters)).first()
