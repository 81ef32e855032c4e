"""The job ledger: writes every attempt of a request as a row in Postgres, and adds it to the sums of its node.

Rows wait in memory and are committed in groups, on a connection of the ledger's own. A kill of this replica loses the
last groups, some tens of milliseconds. Nothing else is lost and nothing counts twice, whatever fails.
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
from lucid_compute.accounting.measured import BUCKETS, FIRST_MS, GROWTH
from lucid_compute.accounting.rollup_columns import JOB_COLUMNS, NARROW, UPSTREAM, add_to_held, add_up, names
from lucid_compute.accounting.rollups import JOIN_BY_HASH
from lucid_compute.postgres.database import Database, is_transient
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose

# The element of a job in its histograms: the bucket (as `measured.estimate_ms` reads it), after 0 for latency or 1 for
# the first byte.
_ELEMENT = f"""
    CASE WHEN {{ms}} IS NOT NULL THEN ({{kind}} * {BUCKETS} + CASE WHEN {{ms}} > {FIRST_MS}
        THEN least(ceil(ln({{ms}} / {FIRST_MS}) / ln({GROWTH}::float8)), {BUCKETS - 1})::integer ELSE 0
    END) << {NARROW.bits} | 1 END"""
_SPREAD = ", ".join(_ELEMENT.format(kind=kind, ms=ms) for kind, ms in enumerate(("latency_ms", "first_byte_ms")))

# What one ended job adds to the rollup of its minute.
_ENDED_JOB = f"""
    SELECT date_trunc('minute', started_at) AS bucket, coalesce(node_id, '{UPSTREAM}') AS node_id, model_id,
        coalesce(node_owner, '') AS node_owner,
        (outcome = 'completed')::integer AS completed, (outcome = 'failed')::integer AS failed,
        (outcome = 'rejected')::integer AS rejected, (outcome = 'cancelled')::integer AS cancelled,
        (price_usd IS NOT NULL)::integer AS priced,
        CASE WHEN outcome = 'completed' THEN round(latency_ms * 1000)::bigint END AS latency_us,
        CASE WHEN outcome = 'completed' THEN round(first_byte_ms * 1000)::bigint END AS first_byte_us,
        tokens_in, tokens_out, price_usd AS revenue_usd,
        CASE WHEN outcome = 'completed' THEN array_remove(ARRAY[{_SPREAD}], NULL) END AS spread,
        CASE WHEN outcome <> 'completed' THEN jsonb_build_object(outcome || ':' || coalesce(reason, 'unknown'), 1) END
            AS faults
    FROM {{written}} WHERE outcome NOT IN ('running', 'lost')
"""

# $1 is the rows, as the text of an array of `job_row`: one f-string a job builds it. COPY took 1.25 times as long in
# this process, and arrays of columns twice as long (docs/adr/0011-job-ledger.md). Instants and durations are
# microseconds.
#
# A job is written as running, and again when it has ended. A batch whose commit is in doubt is written again unchanged.
# A row changes only from `running` or `lost`, and sums are taken of the rows that this very statement wrote. So nothing
# counts twice, and rows and sums always agree. `lost` is a guess: the true outcome replaces it.
# Sums are written in the order of node ids, so that two replicas never wait for each other.
# `job_open` holds the minutes that are not moved yet (docs/adr/0012-records.md); its few rows are updated in place.
# Every writer of a job bills it: a trigger of `jobs` adds it to `payout_open` (docs/adr/0015-payouts.md).
COMMIT_JOBS = f"""
WITH written AS (
    INSERT INTO jobs AS held (
        id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint, is_stream,
        started_at, outcome, reason, status, first_byte_ms, latency_ms, tokens_in, tokens_out, are_tokens_counted,
        price_usd
    )
    SELECT id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint, is_stream,
        timestamptz 'epoch' + started_us * interval '1 microsecond', outcome, reason, status,
        first_byte_us / 1000.0::float8, latency_us / 1000.0::float8, tokens_in, tokens_out, are_tokens_counted,
        price_usd
    FROM unnest($1::text::job_row[])
    ON CONFLICT (id, attempt) DO UPDATE SET
        outcome = excluded.outcome, reason = excluded.reason, status = excluded.status,
        first_byte_ms = excluded.first_byte_ms, latency_ms = excluded.latency_ms,
        tokens_in = excluded.tokens_in, tokens_out = excluded.tokens_out,
        are_tokens_counted = excluded.are_tokens_counted, price_usd = excluded.price_usd
    WHERE held.outcome IN ('running', 'lost') AND excluded.outcome NOT IN ('running', 'lost')
    RETURNING node_id, node_owner, model_id, started_at, outcome, reason, latency_ms, first_byte_ms, tokens_in,
        tokens_out, price_usd
), ended AS ({_ENDED_JOB.format(written="written")}),
{add_up(JOB_COLUMNS, "bucket, node_id, model_id, node_owner", source="ended", into="summed", from_=NARROW, to=NARROW)},
opened AS (
    INSERT INTO job_open AS held (bucket, node_id, model_id, node_owner, {names(JOB_COLUMNS)})
    SELECT bucket, node_id, model_id, node_owner, {names(JOB_COLUMNS)} FROM summed
    ORDER BY node_id, bucket, model_id, node_owner
    ON CONFLICT (node_id, bucket, model_id, node_owner) DO UPDATE SET {add_to_held(JOB_COLUMNS, NARROW)}
)
INSERT INTO job_totals AS held (node_id, node_owner, completed, failed, rejected, cancelled)
SELECT node_id, min(node_owner), sum(completed), sum(failed), sum(rejected), sum(cancelled)
FROM summed WHERE node_id <> '{UPSTREAM}' GROUP BY node_id ORDER BY node_id
ON CONFLICT (node_id) DO UPDATE SET
    completed = held.completed + excluded.completed, failed = held.failed + excluded.failed,
    rejected = held.rejected + excluded.rejected, cancelled = held.cancelled + excluded.cancelled
"""

LOST_AFTER_SECONDS = 60
"""A replica's running jobs are lost when it has been silent for this long; its lease ended long before."""

# No job is marked while no replica can write, nor in the minute after that, in which all replicas may come back. An
# outage is recorded in the statement that ends it, so a replica that was seen just now has recorded it.
MARK_LOST = f"""
UPDATE jobs SET outcome = 'lost' WHERE (id, attempt) IN (
    SELECT id, attempt FROM jobs j
    WHERE outcome = 'running' AND started_at < now() - interval '{LOST_AFTER_SECONDS} seconds'
        AND NOT EXISTS (
            SELECT FROM replicas r
            WHERE r.id = j.replica_id AND r.seen_at > now() - interval '{LOST_AFTER_SECONDS} seconds'
        )
        AND EXISTS (SELECT FROM replicas WHERE seen_at > now() - interval '3 seconds')
        AND NOT EXISTS (SELECT FROM outages WHERE ended_at > now() - interval '{LOST_AFTER_SECONDS} seconds')
    LIMIT 5000 FOR UPDATE SKIP LOCKED
)
"""

MAX_TEXTS = 2000  # cached with their quotes
_NEEDS_NO_QUOTES = re.compile(r"[A-Za-z0-9_./:@+-]+")


class _Quoted(dict[str | None, str]):
    """A cache of quoted texts: the same few models, owners and endpoints are in most rows."""

    def __missing__(self, text: str | None) -> str:
        if len(self) >= MAX_TEXTS:
            self.clear()
        quoted = self[text] = _quote(text)
        return quoted


class RowWriter:
    """Formats the rows of one replica's jobs."""

    __slots__ = ("_quoted", "_replica_id")

    def __init__(self, replica_id: str) -> None:
        self._replica_id = replica_id
        self._quoted = _Quoted()

    def write(self, job: Job) -> str:
        """Return the job's row, in the order of the fields of `job_row`.

        It is one expression because every request runs it. Instants are exact to the microsecond until the year 2106,
        when floats become too coarse.

        Raises:
            ValueError, OverflowError: a duration is not a number, or infinite.
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
    """Return a text quoted twice: as a field of a row, and that as an element of an array.

    What Postgres can't store (a NUL, half a surrogate pair) is replaced, so that every job gets its row.
    """
    if text is None:
        return ""
    if _NEEDS_NO_QUOTES.fullmatch(text):
        return text
    kept = text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
    return _escape(f'"{_escape(kept)}"')


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


MAX_WAITING = 200_000  # about 70 MB
MAX_BATCH = 500  # half a millisecond of this process's time
GROUP_SECONDS = 0.03  # a commit of a few rows costs Postgres as much as a hundred more rows do
RECONNECT_SECONDS = 0.1
FLUSH_SECONDS = 2.0
_log = logging.getLogger(__name__)
# Classes of SQLSTATE that blame a row: cardinality, data, integrity, a program's limits.
_ROW_SQLSTATES = ("21", "22", "23", "54")


def connect_ledger(url: str) -> DedicatedConnection:
    """Return the connection that a ledger writes over; it is opened when it is first used."""
    return DedicatedConnection(url, Purpose.JOBS, session=JOIN_BY_HASH)


class JobLedger:
    """Writes the jobs of one replica. `begin` and `finish` only queue; `run` writes."""

    def __init__(
        self,
        url: str,
        *,
        replica_id: str,
        timeout_seconds: float = 2.0,
        flush_seconds: float = FLUSH_SECONDS,
        connection: DedicatedConnection | None = None,
    ) -> None:
        """Write to the database at `url`, or over `connection`.

        A commit that takes longer than `timeout_seconds` is tried again. When `run` is cancelled, it writes the rest
        for `flush_seconds` at most.
        """
        self._timeout_seconds = timeout_seconds
        self._flush_seconds = flush_seconds
        self._write_row = RowWriter(replica_id).write
        self._begun: dict[Job, str] = {}
        self._waiting: deque[str] = deque()
        self._batches: deque[list[str]] = deque()  # sent and not known to be committed: kept unchanged until then
        self._work = asyncio.Event()
        self._is_failing = False
        self._connection = connection or connect_ledger(url)

    def begin(self, job: Job) -> None:
        """Queue the job as running, so that it has a row if this replica dies. Ignore it if it has ended already."""
        if job.outcome is Outcome.RUNNING and not job.is_written:
            job.is_written = True
            self._begun[job] = self._write_row(job)
            self._work.set()

    def finish(self, job: Job) -> None:
        """Queue the job as it ended. Call this once, when the job does not change any more."""
        if job.is_written:
            self._begun.pop(job, None)  # if it still waits: one batch can't have the same row twice
        try:
            self._waiting.append(self._write_row(job))
        except (ArithmeticError, AttributeError, TypeError, ValueError):  # its request must not fail
            _log.exception("job %s, attempt %s, can't be written and is left out", job.id, job.attempt)
        self._work.set()

    def has_room(self) -> bool:
        """Return whether further jobs can be queued. Without room, refuse requests: they would not be recorded."""
        return len(self._waiting) < MAX_WAITING

    @property
    def waiting(self) -> int:
        """Return how many rows are not known to be committed."""
        return len(self._begun) + len(self._waiting) + sum(map(len, self._batches))

    async def run(self) -> None:
        """Write queued jobs until this task is cancelled, then write the rest and end."""
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
        """Write everything that is queued, for `flush_seconds` at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self._flush_seconds):
                while self.waiting:
                    await self._write_next()
        if self.waiting:
            _log.critical("%d jobs could not be written before the end", self.waiting)

    async def _write_next(self) -> None:
        """Write one batch; if that fails, keep it for the next call."""
        if not self._batches:
            self._batches.append(self._next_batch())
        batch = self._batches[0]
        try:
            await self._execute(batch)
        except Exception as error:  # noqa: BLE001 - after any failure the batch is kept, and tried again or divided
            await self._handle_failure(batch, error)
        else:
            self._is_failing = False
            self._batches.popleft()
        if not (self._batches or self._waiting or self._begun):
            self._work.clear()

    def _next_batch(self) -> list[str]:
        batch = [self._begun.pop(job) for job in list(islice(self._begun, MAX_BATCH))]
        waiting = self._waiting
        batch += [waiting.popleft() for _ in range(min(len(waiting), MAX_BATCH - len(batch)))]
        return batch

    async def _execute(self, batch: list[str]) -> None:
        async with self._connection.within(self._timeout_seconds) as connection:
            await connection.execute(COMMIT_JOBS, f"{{{','.join(batch)}}}")

    async def _handle_failure(self, batch: list[str], error: Exception) -> None:
        """Wait until the database may be back, or halve the batch to find the row that it refuses."""
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
    """Marks the running jobs of dead replicas as lost. The sweep calls it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def refresh(self) -> None:
        """Mark jobs of replicas that have been silent for a minute; outages of the registry do not count."""
        async with self._database.transaction() as connection:
            await connection.execute(text(MARK_LOST))

    async def follow(self, now: datetime, *, is_doubtful: bool) -> None:
        """Do nothing: `refresh`, once a minute, is enough."""
