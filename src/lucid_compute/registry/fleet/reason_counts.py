"""How many nodes have which reason against a model, counted without looking at the nodes one by one.

Anybody may ask for that, so it must cost the same however large the fleet is. A reason of fit is the same for all nodes
of a kind (`CapabilityIndex.key_of`), and for all that don't name the model it follows from their traits alone. Reasons
of health are the same for every model, and only `HEARTBEAT_STALE` changes with time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime

from lucid_compute.registry.domain.node_state import FRESH_WINDOW, NodeState
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport
from lucid_compute.registry.matching_engine import ReasonCode, fit_reasons, health_reasons

Key = tuple[object, ...]
_TRAITS = 3  # the first fields of a key: runtimes, VRAM and context
_SLOTS = 100  # in a second
_NO_TIME = datetime.min.replace(tzinfo=UTC)


class _Kind:
    """Nodes that differ in nothing but their health, or the traits of such kinds; `example` stands for all."""

    __slots__ = ("example", "size")

    def __init__(self, example: NodeState) -> None:
        self.example = example
        self.size = 0

    def codes(self, model: ModelPassport) -> list[ReasonCode]:
        """Return the codes of the reasons why these nodes don't fit the model."""
        return [reason.code for reason in fit_reasons(model, self.example)]


class HeartbeatAges:
    """When each node's newest heartbeat came. Counting takes one look-up for each second, however many nodes there are.

    Instants are kept by slots of 10 ms, and counted by seconds too. Slots come from floats, which keep their order, so
    an instant is never in a later slot than a later instant.
    """

    def __init__(self) -> None:
        self._slots: dict[int, dict[str, datetime]] = {}
        self._seconds: Counter[int] = Counter()
        self._newest = 0
        self.count = 0

    def add(self, node_id: str, at: datetime) -> None:
        """Add a node whose newest heartbeat came at `at`."""
        slot = int(at.timestamp() * _SLOTS)
        self._slots.setdefault(slot, {})[node_id] = at
        second = slot // _SLOTS
        self._seconds[second] += 1
        self._newest = max(self._newest, second)
        self.count += 1

    def remove(self, node_id: str, at: datetime) -> None:
        """Remove a node that was added with this instant."""
        slot = int(at.timestamp() * _SLOTS)
        ids = self._slots[slot]
        del ids[node_id]
        if not ids:
            del self._slots[slot]
        second = slot // _SLOTS
        if self._seconds[second] == 1:
            del self._seconds[second]
        else:
            self._seconds[second] -= 1
        self.count -= 1

    def count_since(self, since: datetime) -> int:
        """Return how many nodes' newest heartbeats came at `since` or later."""
        slot = int(since.timestamp() * _SLOTS)
        second = slot // _SLOTS
        within = sum(at >= since for at in self._slots.get(slot, {}).values())
        within += sum(len(self._slots.get(later, ())) for later in range(slot + 1, (second + 1) * _SLOTS))
        if self._newest - second > len(self._seconds):
            return within + sum(count for each, count in self._seconds.items() if each > second)
        return within + sum(self._seconds.get(each, 0) for each in range(second + 1, self._newest + 1))


class ReasonCounts:
    """Counts of a fleet's nodes by reason, kept up to date one change at a time."""

    def __init__(self) -> None:
        self._kinds: dict[Key, _Kind] = {}
        self._traits: dict[Key, _Kind] = {}
        self._naming: dict[str, dict[Key, _Kind]] = {}
        self._health: Counter[ReasonCode] = Counter()
        self._ages = HeartbeatAges()

    def add(self, key: Key, node: NodeState) -> None:
        """Add a node; `key` is that of its kind."""
        kind = self._kinds.get(key)
        if kind is None:
            kind = self._kinds[key] = _Kind(node)
            for name in _names_of(node):
                self._naming.setdefault(name, {})[key] = kind
        kind.size += 1
        traits = self._traits.get(key[:_TRAITS])
        if traits is None:
            unnamed = NodeState(passport=replace(node.passport, runtimes=node.runtimes))
            traits = self._traits[key[:_TRAITS]] = _Kind(unnamed)
        traits.size += 1
        self._health.update(_codes_of_health(node))
        if node.last_heartbeat is not None:
            self._ages.add(node.id, node.last_heartbeat.received_at)

    def remove(self, key: Key, node: NodeState) -> None:
        """Remove a node that was added with this key and state."""
        kind, traits = self._kinds[key], self._traits[key[:_TRAITS]]
        kind.size -= 1
        if not kind.size:
            del self._kinds[key]
            for name in _names_of(kind.example):
                del self._naming[name][key]
                if not self._naming[name]:
                    del self._naming[name]
        traits.size -= 1
        if not traits.size:
            del self._traits[key[:_TRAITS]]
        self._health.subtract(_codes_of_health(node))
        if node.last_heartbeat is not None:
            self._ages.remove(node.id, node.last_heartbeat.received_at)

    def update_health(self, old: NodeState, new: NodeState) -> None:
        """Record a heartbeat after which the node is of the same kind as before."""
        previous, newest = old.last_heartbeat, new.last_heartbeat
        if previous is None or newest is None or previous.heartbeat.status is not newest.heartbeat.status:
            self._health.subtract(_codes_of_health(old))
            self._health.update(_codes_of_health(new))
        if previous is not None:
            self._ages.remove(old.id, previous.received_at)
        if newest is not None:
            self._ages.add(new.id, newest.received_at)

    def summary(self, model: ModelPassport, now: datetime) -> dict[str, int]:
        """Return how many nodes have each reason against the model, a node once for each; nothing for an API model.

        It equals what `rejection_reasons` says of every node.
        """
        if model.format is ModelFormat.API:
            return {}
        counts = Counter(self._health)
        counts[ReasonCode.HEARTBEAT_STALE] = self._ages.count - self._ages.count_since(now - FRESH_WINDOW)
        naming = {key: kind for name in model.known_as for key, kind in self._naming.get(name, {}).items()}
        named = Counter[Key]()
        for key, kind in naming.items():
            named[key[:_TRAITS]] += kind.size
            counts.update(dict.fromkeys(kind.codes(model), kind.size))
        for key, traits in self._traits.items():
            if unnamed := traits.size - named[key]:
                counts.update(dict.fromkeys(traits.codes(model), unnamed))
        return {code.value: count for code, count in counts.items() if count}


def _names_of(node: NodeState) -> Iterable[str]:
    return node.reported_models.union(node.declared)


def _codes_of_health(node: NodeState) -> list[ReasonCode]:
    """Return the codes of the reasons of health that do not change with time."""
    receipt = node.last_heartbeat
    return [reason.code for reason in health_reasons(node, _NO_TIME if receipt is None else receipt.received_at)]
