"""Filters and orders of lists of nodes and models, over the fleet in memory. `passport_store` lists passports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport, Passport, normalise_runtime
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import (
    has_available_compute,
    has_serving_compute,
    minimum_vram_gb,
    serves,
    wanted_runtimes,
)
from lucid_compute.web.lists import Order
from lucid_compute.wire import ModelSortBy, NodeSortBy, SortBy, SortOrder

Listed = TypeVar("Listed", FleetNode, ModelPassport)

_SORT_KEYS: dict[SortBy, Callable[[Passport], Any]] = {
    SortBy.CREATED_AT: lambda passport: passport.created_at,
    SortBy.UPDATED_AT: lambda passport: passport.updated_at,
    SortBy.NAME: lambda passport: passport.name,
}
_STOPPED, _DRAINING, _STALE, _UNHEALTHY = range(1, 5)  # how severe a node's state is
_MIN_ID_CHARACTERS = 8  # an id's first block; a shorter text is probably part of a name


def sorted_by(order: Order[SortBy], items: Iterable[Listed]) -> list[Listed]:
    """Return the items in this order; equal ones by ascending id, as in lists from Postgres."""
    key, is_descending = _SORT_KEYS[order.by], order.direction is SortOrder.DESCENDING
    by_id = sorted(items, key=lambda item: item.record.id)
    return sorted(by_id, key=lambda item: key(item.record), reverse=is_descending)


def sort_nodes(fleet: Fleet, order: Order[NodeSortBy], nodes: Iterable[FleetNode], now: datetime) -> list[FleetNode]:
    """Return the nodes in this order; nodes whose value is unknown come last, in both directions."""
    if order.by.value in _SORT_KEYS:
        return sorted_by(Order(SortBy(order.by.value), order.direction), nodes)
    if order.by is NodeSortBy.SEVERITY:
        live_since = fleet.live_since(now)
        return _by_severity(order.direction, nodes, lambda node: _severity_of_node(node, now, live_since))
    by_id = sorted(nodes, key=lambda node: node.record.id)
    values = [(_sort_value(fleet, order.by, node), node) for node in by_id]
    known = [(value, node) for value, node in values if value is not None]
    known.sort(key=lambda pair: pair[0], reverse=order.direction is SortOrder.DESCENDING)
    return [node for _, node in known] + [node for value, node in values if value is None]


def sort_models(
    fleet: Fleet, order: Order[ModelSortBy], models: Iterable[ModelPassport], now: datetime
) -> list[ModelPassport]:
    """Return the models in this order; by severity, those that no node can run, then those that no node serves."""
    if order.by is not ModelSortBy.SEVERITY:
        return sorted_by(Order(SortBy(order.by.value), order.direction), models)
    return _by_severity(order.direction, models, lambda model: _severity_of_model(fleet, model, now))


def _by_severity(direction: SortOrder, items: Iterable[Listed], severity: Callable[[Listed], int]) -> list[Listed]:
    """Return the items by severity, equally severe ones by name: an order that changes with states alone."""
    by_name = sorted(items, key=lambda item: (item.record.name, item.record.id))
    return sorted(by_name, key=severity, reverse=direction is SortOrder.DESCENDING)


def _severity_of_node(node: FleetNode, now: datetime, live_since: datetime) -> int:
    """Return how much a node needs attention: 4 is unhealthy, then stale, draining, stopped, and 0 is healthy."""
    state = node.state
    status = state.status(live_since)
    if status is NodeStatus.UNHEALTHY:
        return _STOPPED if state.has_stopped(live_since) else _UNHEALTHY
    if status is NodeStatus.HEALTHY and not state.is_fresh(now):
        return _STALE
    return _DRAINING if status is NodeStatus.DRAINING else 0


def _severity_of_model(fleet: Fleet, model: ModelPassport, now: datetime) -> int:
    """Return 2 for a model that no node can run right now, 1 for one that no node serves, else 0."""
    if not has_available_compute(model, fleet.candidates(model, now), now):
        return 2
    return 0 if has_serving_compute(model, fleet.serving_candidates(model, now), now) else 1


def _sort_value(fleet: Fleet, by: NodeSortBy, node: FleetNode) -> float | None:
    """Return the value that the node is sorted by; None when no heartbeat reported it."""
    if by is NodeSortBy.IN_FLIGHT:
        return fleet.in_flight(node.state.id)
    if (receipt := node.state.last_heartbeat) is None:
        return None
    if by is NodeSortBy.HEARTBEAT_AT:
        return receipt.received_at.timestamp()
    return receipt.heartbeat.load if by is NodeSortBy.LOAD else receipt.heartbeat.queue_depth


@dataclass(frozen=True, slots=True)
class StatusFilter:
    """Matches nodes of one status; None matches all that have not ended."""

    status: NodeStatus | None
    live_since: datetime

    def matches(self, node: FleetNode) -> bool:
        """Return whether the node has the status."""
        if self.status is None:
            return not node.record.has_ended
        return node.state.status(self.live_since) is self.status


@dataclass(frozen=True, slots=True)
class NodeSearch:
    """The criteria of a list of nodes; None matches all."""

    region: str | None
    runtime: str | None
    min_vram_gb: float | None
    gpu: str | None
    model: str | None
    text: str | None

    def matches(self, fleet: Fleet, node: FleetNode) -> bool:
        """Return whether the node meets all criteria."""
        passport = node.state.passport
        return (
            (self.region is None or passport.region == self.region)
            and (self.runtime is None or normalise_runtime(self.runtime) in node.state.runtimes)
            and (self.min_vram_gb is None or passport.vram_gb >= self.min_vram_gb)
            and (self.gpu is None or self.gpu.casefold() in (passport.gpu or "").casefold())
            and (self.model is None or self._serves(fleet, node))
            and _mentions(node.record, self.text)
        )

    def _serves(self, fleet: Fleet, node: FleetNode) -> bool:
        id_or_name = self.model or ""
        if id_or_name in node.capability_class.named_models:
            return True
        model = fleet.find_model(id_or_name)
        return model is not None and serves(model, node.state)


@dataclass(frozen=True, slots=True)
class ModelSearch:
    """The criteria of a list of models; None matches all. A model must have all of `tags`."""

    format: ModelFormat | None
    runtime: str | None
    max_vram_gb: float | None
    owner: str | None
    tags: tuple[str, ...]
    text: str | None

    def matches(self, model: ModelPassport) -> bool:
        """Return whether the model meets all criteria."""
        return (
            (self.format is None or model.format is self.format)
            and (self.runtime is None or normalise_runtime(self.runtime) in wanted_runtimes(model))
            and (self.max_vram_gb is None or minimum_vram_gb(model, None) <= self.max_vram_gb)
            and (self.owner is None or model.record.owner == self.owner)
            and (not self.tags or set(self.tags) <= set(model.record.tags))
            and _mentions(model.record, self.text)
        )

    @property
    def is_empty(self) -> bool:
        """Return whether every model matches."""
        return self == ModelSearch(None, None, None, None, (), None)


def _mentions(passport: Passport, text: str | None) -> bool:
    if not text:
        return True
    text = text.casefold()
    return (
        text in passport.name.casefold()
        or text in (passport.description or "").casefold()
        or (len(text) >= _MIN_ID_CHARACTERS and passport.id.startswith(text))
    )
