"""Deletes old rows: one list says which, and a task of its own deletes them in batches, one replica at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import text

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.periodic import run_periodically
from lucid_compute.registry.idempotency import KEPT_HOURS

EVERY_SECONDS = 60.0
CLEANING_LOCK = 0x636C656E  # an advisory lock of our own: "clen"
_log = logging.getLogger(__name__)


class Rule(NamedTuple):
    """Which rows of `table` are old: those that meet `condition`, in SQL; `oldest_first` is an indexed column.

    A batch is one short transaction. `batch` rows of a narrow table take about 30 ms.
    """

    table: str
    condition: str
    oldest_first: str
    batch: int = 2000


RULES = (
    Rule("heartbeat_batches", "at < now() - interval '5 minutes'", "id"),
    Rule("key_shares", "changed_at < now() - interval '5 minutes'", "key_id"),
    Rule("idempotency_keys", f"created_at < now() - interval '{KEPT_HOURS} hours'", "created_at"),
    Rule(
        "replicas",
        "seen_at < now() - interval '1 hour' AND seen_at < (SELECT max(seen_at) FROM replicas)",
        "id",
    ),
)


class Cleaner:
    """Deletes what each rule calls old, for half of the time at most. A rule that fails holds no other up."""

    def __init__(self, database: Database, rules: Sequence[Rule]) -> None:
        self._database = database
        self._rules = rules
        self._batches = {rule.table: rule.batch for rule in rules}

    async def run(self) -> None:
        """Clean once a minute, until this task is cancelled."""
        await run_periodically(self.clean, every_seconds=EVERY_SECONDS, failed="old rows could not be deleted")

    async def clean(self) -> int:
        """Delete all old rows and return their number. Another replica that cleans is left alone."""
        return sum([await self._apply(rule) for rule in self._rules])

    async def _apply(self, rule: Rule) -> int:
        """Delete by one rule until no batch is full; what was deleted before a failure stays deleted.

        After a failure the next try has a smaller batch, in case this one took too long.
        """
        deleted = 0
        try:
            while True:
                began, batch = time.monotonic(), self._batches[rule.table]
                count = await self._delete_some(rule, batch)
                deleted += count
                if count < batch:
                    self._batches[rule.table] = rule.batch
                    return deleted
                await asyncio.sleep(time.monotonic() - began)
        except Exception as error:  # noqa: BLE001 - of any kind: the other rules are applied, and the next run tries again
            self._batches[rule.table] = max(self._batches[rule.table] // 4, 1)
            _log.warning("old rows of %s could not be deleted: %r", rule.table, error.__cause__ or error)
            return deleted

    async def _delete_some(self, rule: Rule, batch: int) -> int:
        statement = text(f"""
            DELETE FROM {rule.table} WHERE ctid = ANY(ARRAY(
                SELECT ctid FROM {rule.table} WHERE {rule.condition}
                ORDER BY {rule.oldest_first} LIMIT {batch} FOR UPDATE SKIP LOCKED
            ))
        """)
        async with self._database.transaction() as connection:
            if not await connection.scalar(text(f"SELECT pg_try_advisory_xact_lock({CLEANING_LOCK})")):
                return 0
            return (await connection.execute(statement)).rowcount
