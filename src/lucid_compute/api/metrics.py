"""Prometheus metrics of one replica, with a bounded number of series: routes, codes, states, few models' names."""

from __future__ import annotations

import asyncio
import time
from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lucid_compute.api.heartbeat_lane import HeartbeatLane
from lucid_compute.api.inference_lane import InferenceLane
from lucid_compute.api.request_metrics import RequestCollector, WebhookCollector
from lucid_compute.api.service import Service
from lucid_compute.node_state import NodeStatus

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """The registry of one replica, its own rather than the process's."""

    def __init__(self, service: Service, lane: HeartbeatLane, inference: InferenceLane) -> None:
        """Count for `service`; the lanes' tallies are read when they are asked for."""
        disable_created_metrics()  # type: ignore[no-untyped-call] # a second series for each, which nobody asks for
        self.registry = CollectorRegistry()
        labels = ["method", "route", "status"]
        self.requests = Counter(
            "lucid_http_requests", "Requests answered, heartbeats apart", labels, registry=self.registry
        )
        self.seconds = Histogram(
            "lucid_http_request_duration_seconds",
            "Time from the request to the end of its answer",
            ["route"],
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_FleetCollector(service, lane))
        self.registry.register(_GatewayCollector(service, inference))
        self.registry.register(RequestCollector(service.gateway.tools.tally))
        self.registry.register(WebhookCollector(service.webhooks.sender))


class _FleetCollector(Collector):
    """Reads the fleet when Prometheus asks."""

    def __init__(self, service: Service, lane: HeartbeatLane) -> None:
        self._service = service
        self._lane = lane

    def collect(self) -> Iterator[Metric]:
        """Yield what the fleet is like right now."""
        now, fleet = self._service.clock.now(), self._service.fleet
        beats = CounterMetricFamily("lucid_heartbeats", "Heartbeats answered, by outcome", labels=["outcome"])
        for outcome, count in self._lane.outcomes.items():
            beats.add_metric([outcome.lower()], count)
        yield beats
        yield CounterMetricFamily("lucid_express_heartbeats", "Heartbeats taken without a task", self._lane.express)
        yield self._nodes()
        available = Tally(fleet.are_available(fleet.models_newest_first(), now))
        models = GaugeMetricFamily("lucid_models", "Models, by whether they can be run right now", labels=["available"])
        for verdict in (True, False):
            models.add_metric([str(verdict).lower()], available[verdict])
        yield models
        yield GaugeMetricFamily("lucid_capability_classes", "Kinds of node", fleet.class_count())
        yield GaugeMetricFamily("lucid_replicas", "Replicas that are alive", fleet.replicas.count())
        followed_at = self._service.keys.followed_at
        age = (now - followed_at).total_seconds() if followed_at else float("nan")
        yield GaugeMetricFamily("lucid_feed_age_seconds", "How far this replica is behind Postgres at most", age)
        ours = sum((outage.ended_at - outage.started_at).total_seconds() for outage in fleet.outages)
        yield GaugeMetricFamily(
            "lucid_registry_outage_seconds", "Time of 30 days in which no replica took heartbeats", ours
        )
        held = self._service.sweep.brake.held_since is not None
        yield GaugeMetricFamily("lucid_silence_brake", "1 while events wait because many nodes fell silent", held)

    def _nodes(self) -> GaugeMetricFamily:
        fleet = self._service.fleet
        live_since = fleet.live_since(self._service.clock.now())
        states = Tally(node.state.status(live_since) for node in fleet.nodes())
        nodes = GaugeMetricFamily("lucid_nodes", "Nodes, by status", labels=["status"])
        for status in NodeStatus:
            nodes.add_metric([status.value], states[status])
        return nodes


class _GatewayCollector(Collector):
    """Reads the gateway's tallies when Prometheus asks."""

    def __init__(self, service: Service, lane: InferenceLane) -> None:
        self._service = service
        self._lane = lane

    def collect(self) -> Iterator[Metric]:
        """Yield what requests for inference came to."""
        gateway, tools = self._service.gateway, self._service.gateway.tools
        requests = CounterMetricFamily("lucid_inference_requests", "Requests below /v1, by outcome", labels=["outcome"])
        for outcome, count in self._lane.outcomes.items():
            requests.add_metric([outcome.lower()], count)
        yield requests
        faults = CounterMetricFamily("lucid_node_faults", "Attempts that nodes failed, by reason", labels=["reason"])
        for reason, count in gateway.faults.items():
            faults.add_metric([reason], count)
        yield faults
        yield CounterMetricFamily("lucid_inference_retries", "Second and third attempts", gateway.retries)
        yield CounterMetricFamily("lucid_inference_express", "Requests begun without a task", self._lane.express)
        yield GaugeMetricFamily("lucid_inference_running", "Requests below /v1 under way", self._lane.running)
        yield GaugeMetricFamily("lucid_breakers_open", "Nodes that are blocked or on trial", tools.traffic.open_count())
        yield GaugeMetricFamily("lucid_jobs_waiting", "Jobs not known to be written", self._service.jobs.waiting)
        lag = self._service.watchdog.lag_seconds
        yield GaugeMetricFamily("lucid_loop_lag_seconds", "How late the event loop was at the last look", lag)
        yield GaugeMetricFamily("lucid_loop_tasks", "Tasks of the event loop", len(asyncio.all_tasks()))


class MeasuredApp:
    """ASGI middleware that counts requests by route, and times them."""

    def __init__(self, app: ASGIApp) -> None:
        """Stand before `app`."""
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, and count it when it is answered."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        status = 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            metrics: Metrics = scope["app"].state.metrics
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            metrics.requests.labels(method, route, status).inc()
            metrics.seconds.labels(route).observe(time.perf_counter() - began)
