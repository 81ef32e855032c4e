"""Prometheus collectors for the merged metrics of all workers, and for the fleet. The first scrape imports this."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lucid_compute import __version__
from lucid_compute.compilation import FORM, PYTHON
from lucid_compute.gateway.request_metrics import DURATION_BOUNDS, FIRST_TOKEN_BOUNDS
from lucid_compute.gateway.request_queue import WAIT_BOUNDS
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.variants import is_available
from lucid_compute.server.metrics.http_middleware import BOUNDS
from lucid_compute.server.metrics.worker_counts import MODEL_OUTCOMES, MODELS, Labels, WorkerCounts
from lucid_compute.server.replica import Replica

_MODEL = ["model_name"]  # as vLLM and the Gateway API Inference Extension call it
_DURATIONS = slice(len(MODEL_OUTCOMES) + 2, len(MODEL_OUTCOMES) + 2 + len(DURATION_BOUNDS) + 2)
_FIRST_TOKENS = slice(_DURATIONS.stop, None)
# By the name in WorkerCounts: the metric's name, its help text, its labels.
_COUNTERS = {
    "heartbeats": ("lucid_heartbeats", "Heartbeats answered, by outcome", ["outcome"]),
    "requests": ("lucid_inference_requests", "Requests below /v1, by outcome", ["outcome"]),
    "faults": ("lucid_node_faults", "Attempts that nodes failed, by reason", ["reason"]),
    "retries": ("lucid_inference_retries", "Second and third attempts", []),
    "express": ("lucid_inference_express", "Requests begun without a task", []),
    "express_heartbeats": ("lucid_express_heartbeats", "Heartbeats taken without a task", []),
    "webhook_attempts": ("lucid_webhook_attempts", "Attempts to deliver to webhooks, by outcome", ["outcome"]),
    "webhook_failed_looks": ("lucid_webhook_failed_looks", "Looks at the webhooks' outbox that failed", []),
    "webhook_dropped": ("lucid_webhook_deliveries_dropped", "Deliveries given up because too many waited", []),
    "http_requests": (
        "lucid_http_requests",
        "Requests answered, heartbeats and /v1 apart, by class of status",
        ["method", "route", "status"],
    ),
    "http_statuses": ("lucid_http_statuses", "The same requests, by status", ["status"]),
}
_GAUGES = {
    "lucid_workers": "Workers of this service that were heard in the last five seconds",
    "lucid_inference_running": "Requests below /v1 under way",
    "lucid_inference_waiting": "Requests in the queue, which wait for a node that is not at its capacity",
    "lucid_breakers_open": "Nodes that are blocked or on trial, of the worker that blocks most",
    "lucid_tunnels": "Connections of outbound nodes: a node counts once for each worker that it reached",
    "lucid_tunnel_streams": "Requests under way through these connections",
    "lucid_jobs_waiting": "Jobs not known to be written",
    "lucid_feed_age_seconds": "How far the slowest worker is behind Postgres at most",
    "lucid_loop_lag_seconds": "How late the slowest worker's event loop was at its last look",
    "lucid_loop_tasks": "Tasks of the event loops",
    "lucid_silence_brake": "1 while events wait because many nodes fell silent",
    "lucid_webhook_deliveries_running": "Deliveries under way",
    "lucid_webhook_deliveries_waiting": "Deliveries that wait, of all replicas",
    "lucid_webhook_oldest_waiting_seconds": "Age of the oldest event that waits for a webhook that is not failing",
    "lucid_webhooks_failing": "Webhooks that are active and whose last delivery failed, of all replicas",
    "lucid_payouts_open_seconds": "Seconds since the start of the first day that is in no closed period of payouts",
    "lucid_records_behind_seconds": "Time since the end of the last hour of records that was added up",
    "lucid_webhooks_disabled": "Webhooks that are disabled, of all replicas",
}


def expose(replica: Replica, merged: WorkerCounts) -> bytes:
    """Return the fleet's metrics and what all workers have counted, as text for Prometheus."""
    text = b""
    for collector in (FleetCollector(replica), WorkerCollector(merged)):
        registry = CollectorRegistry()
        registry.register(collector)
        text += generate_latest(registry)
    return text


class WorkerCollector(Collector):
    """Shows merged counts and gauges."""

    def __init__(self, merged: WorkerCounts) -> None:
        self._merged = merged

    def collect(self) -> Iterator[Metric]:
        """Yield every metric, also those without a count yet."""
        for count_name, (name, text, labels) in _COUNTERS.items():
            family = CounterMetricFamily(name, text, labels=labels)
            for values, (count,) in self._merged.counts.get(count_name, {}).items():
                family.add_metric(values, count)
            yield family
        for name, text in _GAUGES.items():
            if (value := self._merged.gauges.get(name)) is not None:
                yield GaugeMetricFamily(name, text, value)
        yield self._http_durations()
        yield from self._queue_waits(self._merged.counts.get("queue_waits", {}))
        yield from self._of_models(self._merged.counts.get(MODELS, {}))

    def _http_durations(self) -> Metric:
        name = "lucid_http_request_duration_seconds"
        durations = HistogramMetricFamily(name, "Time from the request to the end of its answer", labels=["route"])
        for route, numbers in self._merged.counts.get("http_durations", {}).items():
            _add_histogram(durations, route, BOUNDS, numbers)
        return durations

    @staticmethod
    def _queue_waits(counts: dict[Labels, list[float]]) -> Iterator[Metric]:
        """Yield the waits in the queue; nothing where it is off."""
        for numbers in counts.values():
            waits = HistogramMetricFamily("lucid_inference_queue_seconds", "Time in the queue, served or not")
            _add_histogram(waits, (), WAIT_BOUNDS, numbers)
            yield waits

    @staticmethod
    def _of_models(models: dict[Labels, list[float]]) -> Iterator[Metric]:
        jobs = CounterMetricFamily(
            "lucid_inference_attempts", "Attempts that ended, by outcome", labels=[*_MODEL, "outcome"]
        )
        tokens_in = CounterMetricFamily("lucid_inference_prompt_tokens", "Tokens read", labels=_MODEL)
        tokens_out = CounterMetricFamily("lucid_inference_generation_tokens", "Tokens written", labels=_MODEL)
        durations = HistogramMetricFamily(
            "lucid_inference_request_duration_seconds",
            "From the dispatch of a request that completed to the end of its answer",
            labels=_MODEL,
        )
        first_tokens = HistogramMetricFamily(
            "lucid_inference_time_to_first_token_seconds",
            "From the dispatch of a stream that completed to its first event",
            labels=_MODEL,
        )
        for name, numbers in models.items():
            for outcome, count in zip(MODEL_OUTCOMES, numbers, strict=False):
                jobs.add_metric([*name, outcome.value], count)
            tokens_in.add_metric(name, numbers[len(MODEL_OUTCOMES)])
            tokens_out.add_metric(name, numbers[len(MODEL_OUTCOMES) + 1])
            _add_histogram(durations, name, DURATION_BOUNDS, numbers[_DURATIONS])
            _add_histogram(first_tokens, name, FIRST_TOKEN_BOUNDS, numbers[_FIRST_TOKENS])
        yield from (jobs, tokens_in, tokens_out, durations, first_tokens)


def _add_histogram(
    family: HistogramMetricFamily, labels: Sequence[str], bounds: Sequence[float], numbers: Sequence[float]
) -> None:
    """Add counts by bucket, which Prometheus wants cumulative; the last number is the sum of the values."""
    *counts, total = numbers
    family.add_metric(labels, list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True)), total)


class FleetCollector(Collector):
    """Reads the fleet at each scrape."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the fleet now."""
        now, fleet = self._replica.clock.now(), self._replica.fleet
        yield from self._nodes()
        available = Counter(is_available(fleet, model, now) for model in fleet.models_newest_first())
        models = GaugeMetricFamily("lucid_models", "Models, by whether they can be run right now", labels=["available"])
        for verdict in (True, False):
            models.add_metric([str(verdict).lower()], available[verdict])
        yield models
        yield GaugeMetricFamily("lucid_capability_classes", "Kinds of node", fleet.class_count())
        yield GaugeMetricFamily("lucid_replicas", "Replicas that are alive", fleet.replicas.count())
        ours = sum((outage.ended_at - outage.started_at).total_seconds() for outage in fleet.outages)
        yield GaugeMetricFamily(
            "lucid_registry_outage_seconds", "Time of 30 days in which no replica took heartbeats", ours
        )
        build = GaugeMetricFamily(
            "lucid_build_info",
            "1, with the version of the service and of Python, and whether it is compiled",
            labels=["version", "python", "compiled"],
        )
        build.add_metric([__version__, PYTHON, str(FORM.is_compiled).lower()], 1)
        yield build

    def _nodes(self) -> Iterator[Metric]:
        fleet = self._replica.fleet
        live_since = fleet.live_since(self._replica.clock.now())
        states = Counter(node.state.status(live_since) for node in fleet.nodes())
        stopped = sum(node.state.has_stopped(live_since) and not node.record.has_ended for node in fleet.nodes())
        nodes = GaugeMetricFamily("lucid_nodes", "Nodes, by status", labels=["status"])
        for status in NodeStatus:
            nodes.add_metric([status.value], states[status])
        yield nodes
        help_text = "Unhealthy nodes that said that they stop, and are silent since"
        yield GaugeMetricFamily("lucid_nodes_stopped", help_text, stopped)
