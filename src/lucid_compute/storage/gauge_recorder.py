"""Samples of heartbeats: added up in memory as they are committed, and flushed as sums, each sum once.

A heartbeat costs no statement of its own. A kill of this replica loses the samples of the last seconds, and no count:
counts are taken from the job ledger.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime
from itertools import islice
from typing import Any

import asyncpg

from lucid_compute.fleet.fleet import Fleet
from lucid_compute.node_state import GpuReading, Heartbeat
from lucid_compute.storage.database import connect, is_passing
from lucid_compute.storage.record_columns import GAUGES
from lucid_compute.storage.record_sql import FLUSH_GAUGES

FLUSH_SECONDS = 20.0
LAST_FLUSH_SECONDS = 2.0
NODES_A_FLUSH = 500  # a few milliseconds of this process's time

_log = logging.getLogger(__name__)
_MINUTE = 60
LEAST_KEPT = 1e-30


class _Samples:
    """One node's samples of one minute: for each gauge its sum, its highest value and how many there were."""

    __slots__ = ("counts", "highest", "samples", "sums")

    def __init__(self) -> None:
        self.samples = 0
        self.sums = [0.0] * len(GAUGES)
        self.highest: list[float | None] = [None] * len(GAUGES)
        self.counts = [0] * len(GAUGES)

    def add(self, values: Iterable[float | None]) -> None:
        """Add one heartbeat's values, in the order of `GAUGES`; None and what is left out are unknown."""
        self.samples += 1
        for place, value in enumerate(values):
            if value is not None:
                value = _kept(value)  # noqa: PLW2901 - what is not kept is not of interest either
                self.sums[place] += value
                self.counts[place] += 1
                highest = self.highest[place]
                if highest is None or value > highest:
                    self.highest[place] = value

    def row(self, node_id: str, minute: int) -> dict[str, Any]:
        """Answer them as `FLUSH_GAUGES` reads them; what no heartbeat told of is left out."""
        row: dict[str, Any] = {"node_id": node_id, "second": minute * _MINUTE, "samples": self.samples}
        for name, total, highest, count in zip(GAUGES, self.sums, self.highest, self.counts, strict=True):
            if count:
                row[f"{name}_sum"], row[f"{name}_max"], row[f"{name}_count"] = total, highest, count
        return row


class GaugeRecorder:
    """Keeps the samples of the heartbeats that one replica took."""

    def __init__(self, url: str, fleet: Fleet, *, replica_id: str, timeout_seconds: float = 2.0) -> None:
        """Flush to the database at `url`; a flush that takes longer than `timeout_seconds` is tried again."""
        self._url = url
        self._replicas = fleet.replicas
        self._replica_id = replica_id
        self._timeout_seconds = timeout_seconds
        self._held: dict[tuple[str, int], _Samples] = {}
        self._flushes: deque[tuple[int, str]] = (
            deque()
        )  # taken and not known to be written, kept as they are until then
        self._number = 0
        self._connection: asyncpg.Connection[asyncpg.Record] | None = None

    def note(self, heartbeat: Heartbeat, received_at: datetime) -> None:
        """Count a heartbeat that was committed."""
        key = (heartbeat.passport_id, int(received_at.timestamp()) // _MINUTE)
        samples = self._held.get(key)
        if samples is None:
            samples = self._held[key] = _Samples()
        running = self._replicas.in_flight(heartbeat.passport_id)
        told = (heartbeat.load, heartbeat.queue_depth, running, heartbeat.in_flight)
        samples.add(told + _read_gpus(heartbeat.gpus) if heartbeat.gpus else told)

    async def run(self) -> None:
        """Flush every 20 seconds for as long as this task runs, and once more when it is cancelled."""
        try:
            while True:
                await asyncio.sleep(FLUSH_SECONDS)
                await self.flush()
        finally:
            self._drop_connection()  # a statement may have been broken off on it
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_FLUSH_SECONDS):
                    await self.flush()
            self._drop_connection()

    async def flush(self) -> None:
        """Write what is held, as far as the database takes it now; the rest is kept for the next time."""
        held, self._held = self._held, {}
        keys = iter(sorted(held))
        while part := list(islice(keys, NODES_A_FLUSH)):
            self._number += 1
            rows = [held[key].row(*key) for key in part]
            self._flushes.append((self._number, json.dumps(rows, separators=(",", ":"))))
            await asyncio.sleep(0)  # a large fleet's samples must not hold requests up
        while self._flushes and await self._write(*self._flushes[0]):
            self._flushes.popleft()

    async def _write(self, number: int, rows: str) -> bool:
        """Answer whether these samples are done with."""
        try:
            async with asyncio.timeout(self._timeout_seconds):
                if self._connection is None or self._connection.is_closed():
                    self._connection = await connect(self._url, application="lucid records")
                await self._connection.execute(FLUSH_GAUGES, self._replica_id, number, rows)
        except Exception as error:  # noqa: BLE001 - whatever it is, the samples are kept or left out, and it is said
            self._drop_connection()
            if is_passing(error):
                return False
            _log.error("samples of heartbeats were refused and are left out", exc_info=error)
        return True

    def _drop_connection(self) -> None:
        if self._connection is not None:
            with suppress(asyncpg.InterfaceError):
                self._connection.terminate()
            self._connection = None


def _kept(value: float) -> float:
    """Answer a value as Postgres's `real` can keep it: it refuses one that is not 0 and nearly so."""
    return 0.0 if value < LEAST_KEPT else value


def _read_gpus(gpus: Iterable[GpuReading]) -> tuple[float | None, float | None, float | None]:
    """Answer a node's utilisation, over its GPUs that tell it, and its memory in MB, used and in all."""
    utilization = used = total = 0.0
    utilizations = uses = totals = 0
    for gpu in gpus:
        if gpu.utilization is not None:
            utilization += gpu.utilization
            utilizations += 1
        if gpu.memory_used_mb is not None:
            used += gpu.memory_used_mb
            uses += 1
        if gpu.memory_total_mb is not None:
            total += gpu.memory_total_mb
            totals += 1
    return utilization / utilizations if utilizations else None, used if uses else None, total if totals else None
