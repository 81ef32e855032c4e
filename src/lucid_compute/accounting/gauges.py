"""Records samples of heartbeats (load, queue depth, GPUs): sums in memory, flushed to Postgres exactly once.

A heartbeat needs no statement of its own. A kill of this replica loses the samples of the last seconds, but no jobs:
those are counted from the job ledger.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from datetime import datetime
from itertools import islice
from typing import Any

from lucid_compute.accounting.exactly_once import ExactlyOnceFlushes
from lucid_compute.accounting.rollup_columns import GAUGES
from lucid_compute.accounting.rollups import FLUSH_GAUGES
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.registry.domain.node_state import GpuReading, Heartbeat
from lucid_compute.registry.fleet.fleet import Fleet

FLUSH_SECONDS = 20.0
NODES_A_FLUSH = 500  # a few milliseconds of this process's time

_MINUTE = 60
SMALLEST_STORED = 1e-30


class _Samples:
    """One node's samples of one minute: for each gauge its sum, its highest value and how many there were."""

    __slots__ = ("counts", "highest", "samples", "sums")

    def __init__(self) -> None:
        self.samples = 0
        self.sums = [0.0] * len(GAUGES)
        self.highest: list[float | None] = [None] * len(GAUGES)
        self.counts = [0] * len(GAUGES)

    def add(self, values: Iterable[float | None]) -> None:
        """Add one heartbeat's values, in the order of `GAUGES`. None and missing ones are unknown."""
        self.samples += 1
        for gauge, value in enumerate(values):
            if value is not None:
                if value < SMALLEST_STORED:  # Postgres's `real` refuses numbers that are nearly, but not exactly, 0
                    value = 0.0  # noqa: PLW2901 - the value itself is not needed
                self.sums[gauge] += value
                self.counts[gauge] += 1
                highest = self.highest[gauge]
                if highest is None or value > highest:
                    self.highest[gauge] = value

    def row(self, node_id: str, minute: int) -> dict[str, Any]:
        """Return a row for `FLUSH_GAUGES`; gauges that no heartbeat reported are left out."""
        row: dict[str, Any] = {"node_id": node_id, "second": minute * _MINUTE, "samples": self.samples}
        for name, total, highest, count in zip(GAUGES, self.sums, self.highest, self.counts, strict=True):
            if count:
                row[f"{name}_sum"], row[f"{name}_max"], row[f"{name}_count"] = total, highest, count
        return row


class GaugeRecorder:
    """Adds up the samples of the heartbeats that one replica has received."""

    def __init__(
        self,
        url: str,
        fleet: Fleet,
        *,
        replica_id: str,
        timeout_seconds: float = 2.0,
        connection: DedicatedConnection | None = None,
    ) -> None:
        """Flush to the database at `url`, or over `connection`. A flush is tried again after `timeout_seconds`."""
        self._replicas = fleet.replicas
        self._samples: dict[tuple[str, int], _Samples] = {}
        self._minute_of: datetime | None = None
        self._minute = 0
        self._flushes = ExactlyOnceFlushes(
            connection or DedicatedConnection(url, Purpose.SAMPLES),
            FLUSH_GAUGES,
            writer_id=replica_id,
            of="samples of heartbeats",
            timeout_seconds=timeout_seconds,
        )

    def record(self, heartbeat: Heartbeat, received_at: datetime) -> None:
        """Add the samples of a committed heartbeat."""
        if received_at is not self._minute_of:  # that of all heartbeats of a group commit
            self._minute_of, self._minute = received_at, int(received_at.timestamp()) // _MINUTE
        key = (heartbeat.passport_id, self._minute)
        samples = self._samples.get(key)
        if samples is None:
            samples = self._samples[key] = _Samples()
        running = self._replicas.in_flight(heartbeat.passport_id)
        values = (heartbeat.load, heartbeat.queue_depth, running, heartbeat.in_flight)
        samples.add(values + _read_gpus(heartbeat.gpus) if heartbeat.gpus else values)

    async def run(self) -> None:
        """Flush every 20 seconds until this task is cancelled, and then once more."""
        await self._flushes.run(self.flush, lambda: FLUSH_SECONDS)

    async def flush(self) -> None:
        """Write all samples. What the database can't store now is kept for the next call."""
        samples, self._samples = self._samples, {}
        keys = iter(sorted(samples))
        while part := list(islice(keys, NODES_A_FLUSH)):
            rows = [samples[key].row(*key) for key in part]
            self._flushes.add(json.dumps(rows, separators=(",", ":")))
            await asyncio.sleep(0)  # a large fleet's samples must not delay requests
        await self._flushes.write()


def _read_gpus(gpus: Iterable[GpuReading]) -> tuple[float | None, float | None, float | None]:
    """Return a node's average GPU utilisation, and its GPU memory in MB: used and total. None is unknown."""
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
