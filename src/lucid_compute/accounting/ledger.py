"""The job ledger: every attempt of a request on a node becomes a row in Postgres, and a part of its node's sums.

Rows wait in memory and are committed in groups, on a connection of the ledger's own. What a kill of this replica can
lose is the last groups, some tens of milliseconds; nothing else is lost and nothing counts twice, whatever breaks.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import deque
from contextlib import suppress
from datetime import datetime
from itertools import islice

from sqlalchemy import text

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.accounting.ledger_sql import COMMIT_JOBS, MARK_LOST
from lucid_compute.accounting.rollups import JOIN_BY_HASH
from lucid_compute.postgres.database import Database, is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

MAX_TEXTS = 10_000  # remembered with their quotes
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_./:@+-]+")


class _Quoted(dict[str | None, str]):
    """Texts as they stand in a row: the same few models, owners and endpoints come again and again."""

    def __missing__(self, text: str | None) -> str:
        if len(self) >= MAX_TEXTS:
            self.clear()
        quoted = self[text] = _quote(text)
        return quoted


class RowWriter:
    """Writes the rows of one replica."""

    __slots__ = ("_quoted", "_replica_id")

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._quoted = _Quoted()

    def write(self, job: Job) -> str:
        """Return the job's row, in the order of the type's fields; one expression, for this is on every request's way.

        Instants are exact to the microsecond until the year 2106, when a float no longer tells them apart.

        Raises:
            ValueError, OverflowError: a duration is not a number, or has no end.
        """
        text = self._quoted
        status, tokens_in, tokens_out, price = job.status, job.tokens_in, job.tokens_out, job.price_usd
        first_byte, latency = job.first_byte_ms, job.latency_ms
        return (
            f'"({job.id},{job.attempt},{self._replica_id},{job.model_id},{text[job.model_name]},'
            f"{job.node_id or ''},{text[job.node_owner]},{text[job.key_id]},{text[job.consumer]},{text[job.endpoint]},"
            f"{'t' if job.is_stream else 'f'},{int(job.started_at.timestamp() * 1e6 + 0.5)},{job.outcome._value_},"
            f"{text[job.reason]},{'' if status is None else status},"
            f"{'' if first_byte is None else int(first_byte * 1000)},{'' if latency is None else int(latency * 1000)},"
            f"{'' if tokens_in is None else tokens_in},{'' if tokens_out is None else tokens_out},"
            f'{"t" if job.are_tokens_counted else "f"},{"" if price is None else str(price)})"'
        )


def _quote(text: str | None) -> str:
    """Return a text as it stands in a row that stands in an array: both have quotes, and both escape.

    What Postgres can't keep (a NUL, half a surrogate pair) is replaced, so that no text costs a job its row.
    """
    if text is None:
        return ""
    if _NEEDS_NO_QUOTES.fullmatch(text):
        return text
    kept = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return _escape(f'"{_escape(kept)}"')


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


MAX_WAITING = 200_000  # some 70 MB
MAX_BATCH = 500  # half a millisecond of this process's time
GROUP_SECONDS = 0.01
RECONNECT_SECONDS = 0.1
FLUSH_SECONDS = 2.0
_log = logging.getLogger(__name__)
# Classes of SQLSTATE that say "not this row": cardinality, data, integrity, a program's limits.
_ROW_SQLSTATES = ("21", "22", "23", "54")


class JobLedger:
    """Writes the jobs of one replica. `begin` and `finish` only queue; `run` writes."""

    def __init__(self, url: str, *, replica_id: str, timeout_seconds: float = 2.0) -> None:
        """Write to the database at `url`; a commit that takes longer than `timeout_seconds` is tried again."""
        self._timeout_seconds = timeout_seconds
        self._write_row = RowWriter(replica_id).write
        self._begun: dict[Job, str] = {}
        self._waiting: deque[str] = deque()
        self._batches: deque[list[str]] = deque()  # taken and not known to be written; kept as they are until then
        self._work = asyncio.Event()
        self._is_failing = False
        self._connection = DedicatedConnection(url, Purpose.JOBS, session=JOIN_BY_HASH)

    def begin(self, job: Job) -> None:
        """Have the job written as running, so that it is known of if this replica dies; one that ended is not."""
        if job.outcome is Outcome.RUNNING and not job.is_written:
            job.is_written = True
            self._begun[job] = self._write_row(job)
            self._work.set()

    def finish(self, job: Job) -> None:
        """Have the job written as it ended. Call it once, when nothing of the job changes any more."""
        if job.is_written:
            self._begun.pop(job, None)  # if it waits still; both in one batch would be the same row twice
        try:
            self._waiting.append(self._write_row(job))
        except (ArithmeticError, AttributeError, TypeError, ValueError):  # the request it belongs to must not suffer
            _log.exception("job %s, attempt %s, can't be written and is left out", job.id, job.attempt)
        self._work.set()

    def has_room(self) -> bool:
        """Return whether further jobs can be kept; without room a request had better be refused than go unrecorded."""
        return len(self._waiting) < MAX_WAITING

    @property
    def waiting(self) -> int:
        """Return how many rows are not known to be written."""
        return len(self._begun) + len(self._waiting) + sum(map(len, self._batches))

    async def run(self) -> None:
        """Write what waits, for as long as this task runs; when it is cancelled it writes the rest, and then ends."""
        clock = asyncio.get_running_loop().time
        try:
            while True:
                await self._work.wait()
                due_at = clock() + GROUP_SECONDS
                await self._write_next()
                if len(self._waiting) < MAX_BATCH:
                    await asyncio.sleep(max(due_at - clock(), 0.0))
        finally:
            await self._flush()
            self._connection.terminate()

    async def _flush(self) -> None:
        """Write all that waits, for two seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                while self.waiting:
                    await self._write_next()
        if self.waiting:
            _log.critical("%d jobs could not be written before the end", self.waiting)

    async def _write_next(self) -> None:
        """Write one batch, or keep it for the next time."""
        if not self._batches:
            self._batches.append(self._take_batch())
        batch = self._batches[0]
        try:
            await self._execute(batch)
        except Exception as error:  # noqa: BLE001 - whatever it is, the batch is kept, and tried again or divided
            await self._explain(batch, error)
        else:
            self._is_failing = False
            self._batches.popleft()
        if not (self._batches or self._waiting or self._begun):
            self._work.clear()

    def _take_batch(self) -> list[str]:
        batch = [self._begun.pop(job) for job in list(islice(self._begun, MAX_BATCH))]
        waiting = self._waiting
        batch += [waiting.popleft() for _ in range(min(len(waiting), MAX_BATCH - len(batch)))]
        return batch

    async def _execute(self, batch: list[str]) -> None:
        async with self._connection.within(self._timeout_seconds) as connection:
            await connection.execute(COMMIT_JOBS, f"{{{','.join(batch)}}}")

    async def _explain(self, batch: list[str], error: Exception) -> None:
        """Wait for the database to come back, or find the row that it refuses by halving the batch."""
        if (getattr(error, "sqlstate", None) or "").startswith(_ROW_SQLSTATES):
            self._batches.popleft()
            if len(batch) == 1:
                id_and_attempt = batch[0][2:].split(",")[:2]
                _log.error("job %s, attempt %s, was refused and is left out", *id_and_attempt, exc_info=error)
            else:
                middle = len(batch) // 2
                self._batches.extendleft((batch[middle:], batch[:middle]))
            return
        if not (is_transient(error) or self._is_failing):
            _log.error("jobs could not be written, and wait", exc_info=error)
        self._is_failing = True
        await asyncio.sleep(RECONNECT_SECONDS)


class LostJobs:
    """Closes the jobs of replicas that died: the sweep's follower that needs nothing of the fleet."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def refresh(self) -> None:
        """Close the jobs of replicas that have been silent for a minute, outages of the registry left out."""
        async with self._database.transaction() as connection:
            await connection.execute(text(MARK_LOST))

    async def follow(self, now: datetime, *, is_doubtful: bool) -> None:
        """Do nothing between two minutes."""
