"""Small fleets for tests of dispatch: nodes that serve a model, and a clock that moves only when the test says so."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from random import Random
from typing import Any

from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.domain.passports import ModelPassport, PassportType
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from tests.factories import NOW, compute_passport, passport, receipt


class Clock:
    """A monotonic clock that stands still until the test moves it."""

    def __init__(self) -> None:
        self._now = 5000.0

    def monotonic(self) -> float:
        """Return the clock's instant, in seconds."""
        return self._now

    def pass_seconds(self, seconds: float) -> None:
        """Let time pass."""
        self._now += seconds


class SmallFleet:
    """A fleet of nodes that all report the models, with one replica's dispatcher."""

    def __init__(self, models: Iterable[str] = ("model",), chance: Random | None = None) -> None:
        self.fleet = Fleet()
        self.clock = Clock()
        self.stats = FleetStats(self.fleet, self.clock.monotonic)
        self.dispatcher = Dispatcher(self.fleet, self.stats, chance)
        self.now: datetime = NOW
        self._revision = 1
        for name in models:
            metadata = {"format": "safetensors"}
            self.fleet.apply_passport(passport(PassportType.MODEL, metadata, id=f"id-of-{name}", name=name))

    @property
    def model(self) -> ModelPassport:
        """The first of the models."""
        return self.fleet.models_newest_first()[0]

    def criteria(self, policy: RoutingPolicy = NO_POLICY, **changes: Any) -> Criteria:
        """A request of the model."""
        return Criteria(self.model, policy, **changes)

    def add_node(
        self, node_id: str = "", *, serves: Iterable[str] = ("model",), metadata: Any = None, **beat: Any
    ) -> FleetNode:
        """Register a node that beats now."""
        self._revision += 1
        record = compute_passport(metadata, id=node_id or f"node-{self._revision:05}")
        self.fleet.apply_passport(record)
        self.beat(record.id, serves=serves, **beat)
        return self.fleet.get_node(record.id, owner=None)

    def add_nodes(self, count: int, **changes: Any) -> list[FleetNode]:
        """Register so many nodes that look alike."""
        return [self.add_node(**changes) for _ in range(count)]

    def beat(self, node_id: str, *, serves: Iterable[str] = ("model",), age_seconds: float = 0, **changes: Any) -> None:
        """Let the node beat now, or so long ago; without load or queue unless said otherwise."""
        self._revision += 1
        beat = {"load": 0.0, "queueDepth": 0, "availableModels": sorted(serves), **changes}
        newest = receipt(age_seconds=age_seconds, now=self.now, revision=self._revision, passport_id=node_id, **beat)
        self.fleet.apply_receipt(node_id, newest)

    def fail(self, node: FleetNode) -> bool:
        """Send the node a request, which it fails; return whether that opened its breaker."""
        return self.stats.record_failure(node, self.stats.record_start(node.state.id))

    def wait(self, seconds: float) -> None:
        """Let the database's clock go on."""
        self.now += timedelta(seconds=seconds)

    async def choose(self, criteria: Criteria) -> FleetNode | None:
        """Choose as the gateway does."""
        return self.dispatcher.find_quickly(criteria, self.now) or await self.dispatcher.find(criteria, self.now)
