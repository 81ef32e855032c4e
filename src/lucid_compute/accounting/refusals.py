"""Counts requests that were refused before they reached a node: sums in memory, flushed to Postgres exactly once.

Such a request is no job, so it is not in the ledger. Counting must cost almost nothing, because most requests are
refused under overload: a kill of this replica loses the counts of the last seconds.
"""

from __future__ import annotations

import json
from datetime import datetime
from uuid import uuid4

from lucid_compute.accounting.exactly_once import ONCE, ExactlyOnceFlushes
from lucid_compute.accounting.rollup_columns import UPSTREAM
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

FLUSH_SECONDS = 5.0
MAX_KINDS = 5000
NOBODY = ""
"""The owner of a request whose key is unknown."""

NO_MODEL = UPSTREAM
"""The model of a request that names no known model."""

_HOUR = 3600
Kind = tuple[str, str, str]

FLUSH_REFUSALS = f"""
WITH {ONCE}
INSERT INTO refusals AS held (hour, consumer, model_id, cause, requests)
SELECT to_timestamp(r.second), r.consumer, r.model_id, r.cause, r.requests
FROM json_to_recordset($3::text::json) AS r (
    second bigint, consumer text, model_id uuid, cause text, requests bigint
)
WHERE EXISTS (SELECT FROM once)
ORDER BY 1, 2, 3, 4
ON CONFLICT (hour, consumer, model_id, cause) DO UPDATE SET requests = held.requests + excluded.requests
"""


class RefusalRecorder:
    """Counts the requests that one replica refuses, by hour, cause, owner of the key, and model.

    It keeps at most `MAX_KINDS` combinations an hour; beyond them it counts by cause alone.
    """

    def __init__(self, url: str, clock: DatabaseClock, *, timeout_seconds: float = 2.0) -> None:
        """Flush to the database at `url`. `clock` decides which hour a request counts in."""
        self._clock = clock
        self._counts: dict[
            Kind, int
        ] = {}  # of this hour; flushed ones stay, at 0, so that they count towards MAX_KINDS
        self._hour = _hour_of(clock.now())
        self._flushes = ExactlyOnceFlushes(
            DedicatedConnection(url, Purpose.REFUSALS),
            FLUSH_REFUSALS,
            writer_id=str(uuid4()),
            of="refused requests",
            timeout_seconds=timeout_seconds,
        )

    def count(self, cause: str, owner: str = NOBODY, model_id: str = NO_MODEL) -> None:
        """Count a request that was refused."""
        kind = (cause, owner, model_id)
        try:
            self._counts[kind] += 1
        except KeyError:
            self._count_new(kind)

    async def run(self) -> None:
        """Flush every five seconds and at the end of each hour until this task is cancelled, and then once more."""
        await self._flushes.run(self.flush, self._pause_seconds)

    async def flush(self) -> None:
        """Write the counts that the database takes now.

        While an earlier flush waits, nothing more of its hour is queued: a long outage must not fill the memory.
        """
        hour = _hour_of(self._clock.now())
        if hour != self._hour or not self._flushes:
            self._queue_counts()
        if hour != self._hour:
            self._counts.clear()
            self._hour = hour
        await self._flushes.write()

    def _count_new(self, kind: Kind) -> None:
        if len(self._counts) >= MAX_KINDS:
            kind = (kind[0], NOBODY, NO_MODEL)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def _queue_counts(self) -> None:
        rows = [
            {"second": self._hour, "consumer": owner, "model_id": model_id, "cause": cause, "requests": requests}
            for (cause, owner, model_id), requests in self._counts.items()
            if requests
        ]
        if rows:
            self._flushes.add(json.dumps(rows, separators=(",", ":")))
            self._counts = dict.fromkeys(self._counts, 0)

    def _pause_seconds(self) -> float:
        return min(FLUSH_SECONDS, _HOUR - self._clock.now().timestamp() % _HOUR)


def _hour_of(instant: datetime) -> int:
    return int(instant.timestamp()) // _HOUR * _HOUR
