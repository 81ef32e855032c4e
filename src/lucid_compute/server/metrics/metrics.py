"""Prometheus metrics of all workers of one `lucid serve`; each worker can return them.

Each worker publishes what it counted in shared memory, once a second and before it responds to a scrape. A response
contains only what is published, so counters never decrease, not even when a worker is killed: counts that it had not
published were never shown.

The number of series is bounded: routes, codes, states, and a limited number of model names.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import replace

from lucid_compute.accounting.payouts.closer import PayoutCloser
from lucid_compute.gateway.lane import InferenceLane
from lucid_compute.gateway.request_metrics import OTHER, ModelMetrics
from lucid_compute.registry.heartbeat_lane import HeartbeatLane
from lucid_compute.server.metrics.http_middleware import HttpMetrics
from lucid_compute.server.metrics.shared_memory import Slot, WorkerSlot
from lucid_compute.server.metrics.worker_counts import MODEL_OUTCOMES, MODELS, Counts, WorkerCounts, merge
from lucid_compute.server.replica import Replica
from lucid_compute.webhooks.outbox import Backlog

WRITE_SECONDS = 1.0

_log = logging.getLogger(__name__)


class ServiceMetrics:
    """What this worker counts, and the sums of all workers. It adds to what an earlier worker left in `slot`."""

    def __init__(self, replica: Replica, heartbeats: HeartbeatLane, inference: InferenceLane, slot: WorkerSlot) -> None:
        self.http = HttpMetrics()
        self._replica = replica
        self._heartbeats = heartbeats
        self._inference = inference
        self._slot = slot
        left = _read(slot.own)
        self._left = WorkerCounts(0.0) if left is None else replace(left, gauges={})
        self._named_at: dict[str, float] = {}

    async def run(self) -> None:
        """Publish what this worker counted, once a second."""
        while True:
            try:
                self.write()
            except Exception:  # noqa: BLE001 - a fault in counting must not end the task; its trace is logged
                _log.exception("the metrics of this worker could not be published")
            await asyncio.sleep(WRITE_SECONDS)

    def write(self) -> None:
        """Publish what this worker backlog."""
        now = time.monotonic()
        self._slot.own.write(merge([self._left, self._count(now)], now).to_bytes())

    def exposition(self) -> bytes:
        """Return the metrics of all workers as text for Prometheus."""
        from lucid_compute.server.metrics.exposition import expose  # noqa: PLC0415 - 2 MB that only scrapes need

        self.write()
        published = [counts for slot in self._slot.all if (counts := _read(slot)) is not None]
        return expose(self._replica, merge(published, time.monotonic()))

    def _count(self, now: float) -> WorkerCounts:
        """Return what this worker counted since its start, and what it measures now."""
        gateway, sender = self._replica.gateway, self._replica.webhooks.sender
        models: Counts = {}
        for model in gateway.context.metrics.models():
            models[model.model_name,] = _model_numbers(model)
            if model.model_name != OTHER:
                self._named_at.setdefault(model.model_name, now)
        counts: dict[str, Counts] = {
            MODELS: models,
            "heartbeats": _by_label(self._heartbeats.outcomes),
            "requests": _by_label(self._inference.outcomes),
            "faults": _by_label(gateway.faults),
            "retries": {(): [float(gateway.retries)]},
            "express": {(): [float(self._inference.express)]},
            "queue_waits": {} if gateway.queue is None else {(): [*gateway.queue.waits, gateway.queue.waited_seconds]},
            "express_heartbeats": {(): [float(self._heartbeats.express)]},
            "webhook_attempts": _by_label(sender.outcomes),
            "webhook_failed_looks": {(): [float(sender.failed_looks)]},
            "webhook_dropped": {(): [float(sender.dropped)]},
            "http_requests": self.http.requests,
            "http_statuses": self.http.statuses,
            "http_durations": self.http.durations,
        }
        return WorkerCounts(now, counts, self._measure(), self._named_at)

    def _measure(self) -> dict[str, float]:
        replica = self._replica
        read_at = replica.feed.read_at
        age = (replica.clock.now() - read_at).total_seconds() if read_at else float("nan")
        return {
            "lucid_workers": 1,
            "lucid_inference_running": self._inference.running_count,
            "lucid_inference_waiting": 0 if replica.gateway.queue is None else replica.gateway.queue.depth,
            "lucid_breakers_open": replica.gateway.context.stats.open_count(),
            "lucid_tunnels": len(replica.tunnel_watch.tunnels),
            "lucid_tunnel_streams": replica.tunnel_watch.tunnels.stream_count,
            "lucid_jobs_waiting": replica.jobs.waiting,
            "lucid_feed_age_seconds": age,
            "lucid_loop_lag_seconds": replica.watchdog.lag_seconds,
            "lucid_loop_tasks": len(asyncio.all_tasks()),
            "lucid_silence_brake": float(replica.sweep.brake.held_since is not None),
            "lucid_webhook_deliveries_running": replica.webhooks.sender.running,
            **_backlog(replica.webhooks.sender.backlog),
            **_accounting(replica),
        }


def _accounting(replica: Replica) -> dict[str, float]:
    """Return what shows that accounts are overdue; not a number until it is known."""
    closer, until = replica.background.get("payouts"), replica.rollup_keeper.hours_until
    open_days = closer.open_days if isinstance(closer, PayoutCloser) else None
    behind = math.nan if until is None else (replica.clock.now() - until).total_seconds()
    return {
        "lucid_payouts_open_seconds": math.nan if open_days is None else open_days * 86_400,
        "lucid_records_behind_seconds": behind,
    }


def _backlog(backlog: Backlog | None) -> dict[str, float]:
    if backlog is None:
        return {}
    return {
        "lucid_webhook_deliveries_waiting": backlog.waiting,
        "lucid_webhook_oldest_waiting_seconds": backlog.oldest_seconds,
        "lucid_webhooks_failing": backlog.failing,
        "lucid_webhooks_disabled": backlog.disabled,
    }


def _read(slot: Slot) -> WorkerCounts | None:
    text = slot.read()
    return None if text is None else WorkerCounts.from_bytes(text)


def _by_label(counts: Mapping[str, int]) -> Counts:
    return {(name.lower(),): [float(count)] for name, count in counts.items()}


def _model_numbers(model: ModelMetrics) -> list[float]:
    """Return the counts of a model in the order in which `WorkerCollector` reads them."""
    ended = [model.outcomes[outcome] for outcome in MODEL_OUTCOMES]
    durations = [*model.durations, model.duration_ms / 1000]
    first_tokens = [*model.first_tokens, model.first_token_ms / 1000]
    return [*ended, model.tokens_in, model.tokens_out, *durations, *first_tokens]
