"""Prometheus metrics of the fleet, the same whichever worker is asked."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lucid_compute import __version__
from lucid_compute.api.service import Service
from lucid_compute.matching_engine import has_available_compute
from lucid_compute.node_state import NodeStatus


class FleetCollector(Collector):
    """Reads the fleet when Prometheus asks."""

    def __init__(self, service: Service) -> None:
        """Read the fleet of `service`."""
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """Yield what the fleet is like right now."""
        now, fleet = self._service.clock.now(), self._service.fleet
        yield self._nodes()
        available = Tally(
            has_available_compute(model, fleet.candidates(model, now), now) for model in fleet.models_newest_first()
        )
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
        build = GaugeMetricFamily("lucid_build_info", "1, with the version of the service", labels=["version"])
        build.add_metric([__version__], 1)
        yield build

    def _nodes(self) -> GaugeMetricFamily:
        fleet = self._service.fleet
        live_since = fleet.live_since(self._service.clock.now())
        states = Tally(node.state.status(live_since) for node in fleet.nodes())
        nodes = GaugeMetricFamily("lucid_nodes", "Nodes, by status", labels=["status"])
        for status in NodeStatus:
            nodes.add_metric([status.value], states[status])
        return nodes
