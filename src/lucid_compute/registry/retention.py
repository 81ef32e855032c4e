"""Deletes old events, boots and audit rows in small batches."""

from __future__ import annotations

from sqlalchemy import text

from lucid_compute.postgres.batch_deletion import BATCH, BatchDeletion
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.periodic import run_periodically

EVERY_SECONDS = 60.0
BOOT_BATCHES = 50  # a minute: a million boots are inspected in ten minutes
_BEFORE_ALL_BOOTS = ("00000000-0000-0000-0000-000000000000", "")

# Ids grow with time. So only the oldest rows are inspected, and no index on `at` is needed.
_REMOVE_EVENTS = text("""
    WITH oldest AS (
        SELECT id, at FROM node_events ORDER BY id LIMIT :batch
    ), gone AS (
        DELETE FROM node_events e USING oldest o
        WHERE e.id = o.id AND o.at < now() - make_interval(days => :days) RETURNING 1
    )
    SELECT count(*) FROM gone
""")
_REMOVE_AUDIT_ROWS = text("""
    WITH permission AS MATERIALIZED (
        SELECT set_config('lucid.retention', 'on', true) AS given
    ), oldest AS MATERIALIZED (
        SELECT id, at FROM audit_log ORDER BY id LIMIT :batch
    ), gone AS (
        DELETE FROM audit_log a USING oldest o, permission
        WHERE a.id = o.id AND o.at < now() - make_interval(days => :days) AND permission.given = 'on' RETURNING 1
    )
    SELECT count(*) FROM gone
""")
# Boots are inspected in the order of their key, some each minute. The boot of a node's newest heartbeat stays, however
# old, and so do its previous ones until they are old: heartbeats of previous boots are refused.
_REMOVE_BOOTS = text("""
    WITH inspected AS (
        SELECT * FROM node_boots WHERE (passport_id, boot_id) > (CAST(:passport_id AS uuid), CAST(:boot_id AS text))
        ORDER BY passport_id, boot_id LIMIT :batch
    ), gone AS (
        DELETE FROM node_boots b USING inspected i
            JOIN passports p ON p.id = i.passport_id LEFT JOIN heartbeats h ON h.passport_id = i.passport_id
        WHERE b.passport_id = i.passport_id AND b.boot_id = i.boot_id AND (
            p.deregistered_at IS NOT NULL OR p.status = 'revoked'
            OR (i.first_seen_at < now() - make_interval(days => :days) AND h.boot_id IS DISTINCT FROM i.boot_id)
        )
        RETURNING 1
    )
    SELECT (SELECT count(*) FROM gone), passport_id::text, boot_id FROM inspected
    ORDER BY inspected.passport_id DESC, boot_id DESC LIMIT 1
""")


class HistoryRetention:
    """Removes events and boots older than `event_days`, and audit rows older than `audit_days`; 0 keeps all."""

    def __init__(self, database: Database, *, event_days: int, audit_days: int) -> None:
        self._events = BatchDeletion(database, "events", _REMOVE_EVENTS)
        self._boots = BatchDeletion(database, "boots", _REMOVE_BOOTS)
        self._audit = BatchDeletion(database, "audit rows", _REMOVE_AUDIT_ROWS)
        self._event_days = event_days
        self._audit_days = audit_days
        self._inspected = _BEFORE_ALL_BOOTS

    async def run(self) -> None:
        """Remove old rows once a minute, until this task is cancelled."""
        await run_periodically(self.remove_all, every_seconds=EVERY_SECONDS, failed="old events could not be removed")

    async def remove_all(self, batch: int = BATCH) -> int:
        """Remove what is too old; return the number of rows: 0 while another replica removes them."""
        removed = 0
        if self._event_days:
            removed += await self._events.run(batch, days=self._event_days) + await self._remove_boots(batch)
        if self._audit_days:
            removed += await self._audit.run(batch, days=self._audit_days)
        return removed

    async def _remove_boots(self, batch: int) -> int:
        """Inspect some boots and remove those that are too old; the next call continues behind them."""
        removed = 0
        for _ in range(BOOT_BATCHES):
            passport_id, boot_id = self._inspected
            row = await self._boots.delete_some(batch, days=self._event_days, passport_id=passport_id, boot_id=boot_id)
            if row is None:  # all are inspected: begin again
                self._inspected = _BEFORE_ALL_BOOTS
                break
            removed += row[0]
            self._inspected = row.passport_id, row.boot_id
        return removed
