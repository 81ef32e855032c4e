"""Prometheus metrics of the whole service: every worker of one `lucid serve`, whichever of them is asked.

Each worker writes what it counted to the board once a second and whenever it is asked; who is asked answers what is on
the board, all places together, and never what was not written there first. So counters never get less, not even when a
worker is killed: it takes along what it counted since it last wrote, which nobody has seen.

The number of series is bounded: routes, codes, states, and few models' names.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import replace

from prometheus_client import CollectorRegistry, generate_latest

from lucid_compute.gateway.lane import InferenceLane
from lucid_compute.gateway.request_metrics import OTHER
from lucid_compute.registry.heartbeat_lane import HeartbeatLane
from lucid_compute.server.metrics.exposition import FleetCollector, WorkerCollector, model_numbers
from lucid_compute.server.metrics.http_middleware import HttpMetrics
from lucid_compute.server.metrics.shared_memory import Slot, WorkerSlot
from lucid_compute.server.metrics.worker_counts import MODELS, Tally, WorkerCounts, merge
from lucid_compute.server.replica import Replica
from lucid_compute.webhooks.outbox import Backlog

WRITE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class ServiceMetrics:
    """What one worker counts, and what all of them answer."""

    def __init__(self, service: Replica, heartbeats: HeartbeatLane, inference: InferenceLane, seat: WorkerSlot) -> None:
        """Count on from what a former worker at this seat left; the lanes' tallies are read when they are asked for."""
        self.http = HttpMetrics()
        self._service = service
        self._heartbeats = heartbeats
        self._inference = inference
        self._seat = seat
        left = _read(seat.own)
        self._left = WorkerCounts(0.0) if left is None else replace(left, gauges={})
        self._named_at: dict[str, float] = {}
        self._registry = CollectorRegistry()
        self._registry.register(FleetCollector(service))

    async def run(self) -> None:
        """Write to the board for as long as this task runs."""
        while True:
            try:
                self.write()
            except Exception:  # noqa: BLE001 - a fault in counting must not end the task; its trace is logged
                _log.exception("what this worker counted could not be shown")
            await asyncio.sleep(WRITE_SECONDS)

    def write(self) -> None:
        """Show the other workers what this one counted."""
        now = time.monotonic()
        self._seat.own.write(merge([self._left, self._count(now)], now).to_bytes())

    def answer(self) -> bytes:
        """Return what all workers counted, as text for Prometheus."""
        self.write()
        shown = [counts for place in self._seat.places if (counts := _read(place)) is not None]
        registry = CollectorRegistry()
        registry.register(WorkerCollector(merge(shown, time.monotonic())))
        return generate_latest(self._registry) + generate_latest(registry)

    def _count(self, now: float) -> WorkerCounts:
        """Return what this worker counted since it began, and what it measures now."""
        gateway, sender = self._service.gateway, self._service.webhooks.sender
        models: Tally = {}
        for tally in gateway.context.metrics.models():
            models[tally.model_name,] = model_numbers(tally)
            if tally.model_name != OTHER:
                self._named_at.setdefault(tally.model_name, now)
        tallies: dict[str, Tally] = {
            MODELS: models,
            "heartbeats": _by_label(self._heartbeats.outcomes),
            "requests": _by_label(self._inference.outcomes),
            "faults": _by_label(gateway.faults),
            "retries": {(): [float(gateway.retries)]},
            "express": {(): [float(self._inference.express)]},
            "express_heartbeats": {(): [float(self._heartbeats.express)]},
            "webhook_attempts": _by_label(sender.outcomes),
            "http_requests": self.http.requests,
            "http_statuses": self.http.statuses,
            "http_durations": self.http.durations,
        }
        return WorkerCounts(now, tallies, self._measure(), self._named_at)

    def _measure(self) -> dict[str, float]:
        service = self._service
        synced_at = service.keys.synced_at
        age = (service.clock.now() - synced_at).total_seconds() if synced_at else float("nan")
        return {
            "lucid_workers": 1,
            "lucid_inference_running": self._inference.running_count,
            "lucid_breakers_open": service.gateway.context.stats.open_count(),
            "lucid_jobs_waiting": service.jobs.waiting,
            "lucid_feed_age_seconds": age,
            "lucid_loop_lag_seconds": service.watchdog.lag_seconds,
            "lucid_loop_tasks": len(asyncio.all_tasks()),
            "lucid_silence_brake": float(service.sweep.brake.held_since is not None),
            "lucid_webhook_deliveries_running": service.webhooks.sender.running,
            **_backlog(service.webhooks.sender.backlog),
        }


def _backlog(counted: Backlog | None) -> dict[str, float]:
    if counted is None:
        return {}
    return {
        "lucid_webhook_deliveries_waiting": counted.waiting,
        "lucid_webhook_oldest_waiting_seconds": counted.oldest_seconds,
        "lucid_webhooks_failing": counted.failing,
        "lucid_webhooks_disabled": counted.disabled,
    }


def _read(place: Slot) -> WorkerCounts | None:
    text = place.read()
    return None if text is None else WorkerCounts.from_bytes(text)


def _by_label(counts: Mapping[str, int]) -> Tally:
    return {(name.lower(),): [float(count)] for name, count in counts.items()}
