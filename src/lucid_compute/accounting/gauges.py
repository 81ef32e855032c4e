"""Samples of heartbeats: added up in memory as they are committed, and flushed as sums, each sum once.

A heartbeat costs no statement of its own. A kill of this replica loses the samples of the last seconds, and no count:
counts are taken from the job ledger.
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
from lucid_compute.postgres.dedicated_connection import Purpose
from lucid_compute.registry.domain.node_state import GpuReading, Heartbeat
from lucid_compute.registry.fleet.fleet import Fleet

FLUSH_SECONDS = 20.0
NODES_A_FLUSH = 500  # a few milliseconds of this process's time

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
        """Return them as `FLUSH_GAUGES` reads them; what no heartbeat told of is left out."""
        row: dict[str, Any] = {"node_id": node_id, "second": minute * _MINUTE, "samples": self.samples}
        for name, total, highest, count in zip(GAUGES, self.sums, self.highest, self.counts, strict=True):
            if count:
                row[f"{name}_sum"], row[f"{name}_max"], row[f"{name}_count"] = total, highest, count
        return row


class GaugeRecorder:
    """Keeps the samples of the heartbeats that one replica took."""

    def __init__(self, url: str, fleet: Fleet, *, replica_id: str, timeout_seconds: float = 2.0) -> None:
        """Flush to the database at `url`; a flush that takes longer than `timeout_seconds` is tried again."""
        self._replicas = fleet.replicas
        self._held: dict[tuple[str, int], _Samples] = {}
        self._flushes = ExactlyOnceFlushes(
            url,
            Purpose.SAMPLES,
            FLUSH_GAUGES,
            writer_id=replica_id,
            of="samples of heartbeats",
            timeout_seconds=timeout_seconds,
        )

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
        await self._flushes.run(self.flush, lambda: FLUSH_SECONDS)

    async def flush(self) -> None:
        """Write what is held, as far as the database takes it now; the rest is kept for the next time."""
        held, self._held = self._held, {}
        keys = iter(sorted(held))
        while part := list(islice(keys, NODES_A_FLUSH)):
            rows = [held[key].row(*key) for key in part]
            self._flushes.add(json.dumps(rows, separators=(",", ":")))
            await asyncio.sleep(0)  # a large fleet's samples must not hold requests up
        await self._flushes.write()


def _kept(value: float) -> float:
    """Return a value as Postgres's `real` can keep it: it refuses one that is not 0 and nearly so."""
    return 0.0 if value < LEAST_KEPT else value


def _read_gpus(gpus: Iterable[GpuReading]) -> tuple[float | None, float | None, float | None]:
    """Return a node's utilisation, over its GPUs that tell it, and its memory in MB, used and in all."""
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
