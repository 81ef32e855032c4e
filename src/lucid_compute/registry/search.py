"""Filters and orders of lists of nodes and models, over the fleet in memory. `passport_store` lists passports."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, TypeVar

from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport, Passport, normalise_runtime
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import minimum_vram_gb, serves, wanted_runtimes
from lucid_compute.web.lists import Order
from lucid_compute.wire import NodeSortBy, SortBy, SortOrder

Listed = TypeVar("Listed", FleetNode, ModelPassport)

_SORT_KEYS: dict[SortBy, Callable[[Passport], Any]] = {
    SortBy.CREATED_AT: lambda passport: passport.created_at,
    SortBy.UPDATED_AT: lambda passport: passport.updated_at,
    SortBy.NAME: lambda passport: passport.name,
}
_MIN_ID_CHARACTERS = 8  # an id's first block; a shorter text is probably part of a name


def sorted_by(order: Order[SortBy], items: Iterable[Listed]) -> list[Listed]:
    """Return the items in this order; equal ones by ascending id, as in lists from Postgres."""
    key, is_descending = _SORT_KEYS[order.by], order.direction is SortOrder.DESCENDING
    by_id = sorted(items, key=lambda item: item.record.id)
    return sorted(by_id, key=lambda item: key(item.record), reverse=is_descending)


def sort_nodes(fleet: Fleet, order: Order[NodeSortBy], nodes: Iterable[FleetNode]) -> list[FleetNode]:
    """Return the nodes in this order; nodes whose value is unknown come last, in both directions."""
    if order.by.value in _SORT_KEYS:
        return sorted_by(Order(SortBy(order.by.value), order.direction), nodes)
    by_id = sorted(nodes, key=lambda node: node.record.id)
    values = [(_sort_value(fleet, order.by, node), node) for node in by_id]
    known = [(value, node) for value, node in values if value is not None]
    known.sort(key=lambda pair: pair[0], reverse=order.direction is SortOrder.DESCENDING)
    return [node for _, node in known] + [node for value, node in values if value is None]


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
