"""Requests that were refused before any node was asked: added up in memory, and flushed as sums, each sum once.

Such a request is no job, so no ledger hears of it. It may cost next to nothing, for most are refused when there is too
much to do: a kill of this replica loses those of the last seconds.
"""

from __future__ import annotations

import json
from datetime import datetime
from uuid import uuid4

from lucid_compute.accounting.exactly_once import ONCE, ExactlyOnceFlushes
from lucid_compute.accounting.rollup_columns import UPSTREAM
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.dedicated_connection import Purpose

FLUSH_SECONDS = 5.0
MAX_KINDS = 5000
NOBODY = ""
"""Stands for the owner of a request whose key is not known."""

NO_MODEL = UPSTREAM
"""Stands for the model of a request that names none that is known."""

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
    """Counts what one replica refuses, by hour, cause, the owner who asked and the model.

    In an hour it tells at most `MAX_KINDS` apart; of those beyond only the cause is kept.
    """

    def __init__(self, url: str, clock: DatabaseClock, *, timeout_seconds: float = 2.0) -> None:
        """Flush to the database at `url`, whose clock says what hour it is."""
        self._clock = clock
        self._counts: dict[Kind, int] = {}  # of this hour; what is flushed stays, at 0, so that kinds can be told
        self._hour = _hour_of(clock.now())
        self._flushes = ExactlyOnceFlushes(
            url,
            Purpose.REFUSALS,
            FLUSH_REFUSALS,
            writer_id=str(uuid4()),
            of="refused requests",
            timeout_seconds=timeout_seconds,
        )

    def note(self, cause: str, owner: str = NOBODY, model_id: str = NO_MODEL) -> None:
        """Count a request that was refused."""
        kind = (cause, owner, model_id)
        try:
            self._counts[kind] += 1
        except KeyError:
            self._begin(kind)

    async def run(self) -> None:
        """Flush every five seconds, and when an hour ends, while this task runs; once more when it is cancelled."""
        await self._flushes.run(self.flush, self._pause_seconds)

    async def flush(self) -> None:
        """Write what is held, as far as the database takes it now.

        While an earlier flush waits nothing more of its hour is taken, so that a long outage fills no memory.
        """
        hour = _hour_of(self._clock.now())
        if hour != self._hour or not self._flushes:
            self._take()
        if hour != self._hour:
            self._counts.clear()
            self._hour = hour
        await self._flushes.write()

    def _begin(self, kind: Kind) -> None:
        if len(self._counts) >= MAX_KINDS:
            kind = (kind[0], NOBODY, NO_MODEL)
        self._counts[kind] = self._counts.get(kind, 0) + 1

    def _take(self) -> None:
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
