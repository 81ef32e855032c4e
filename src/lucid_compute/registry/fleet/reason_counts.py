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


class AgeGroup:
    """The nodes whose newest heartbeat came at one instant, such as those of one group commit: `count` of them."""

    __slots__ = ("at", "count", "slot")

    def __init__(self, at: datetime, slot: _AgeSlot) -> None:
        self.at = at
        self.count = 0
        self.slot = slot


class _AgeSlot:
    """The groups of 10 ms, and how many nodes they have together."""

    __slots__ = ("count", "groups", "number", "second")

    def __init__(self, number: int, second: _AgeSecond) -> None:
        self.number = number
        self.count = 0
        self.groups: dict[datetime, AgeGroup] = {}
        self.second = second


class _AgeSecond:
    """The slots of one second by number, and how many nodes they have together."""

    __slots__ = ("count", "number", "slots")

    def __init__(self, number: int) -> None:
        self.number = number
        self.count = 0
        self.slots: dict[int, _AgeSlot] = {}


class HeartbeatAges:
    """How many nodes' newest heartbeats came since an instant. Counting costs the same however many nodes there are.

    Each node remembers its group, so that a heartbeat changes six numbers and looks nothing up. Slots come from
    floats, which keep their order, so an instant is never in a later slot than a later instant.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, _AgeSecond] = {}
        self._newest = 0
        self._last: AgeGroup | None = None  # a group commit asks for the same one for each of its heartbeats
        self.count = 0

    def move(self, left: AgeGroup | None, at: datetime) -> AgeGroup:
        """Move a node from its previous group, if it had one, to that of `at`, which is returned."""
        joined = self._last
        if joined is None or joined.at != at:
            joined = self._last = self._group(at)
        slot = joined.slot
        joined.count += 1
        slot.count += 1
        slot.second.count += 1
        self.count += 1
        if left is not None:
            self.leave(left)
        return joined

    def leave(self, left: AgeGroup) -> None:
        """Remove a node from its group."""
        slot = left.slot
        left.count -= 1
        slot.count -= 1
        slot.second.count -= 1
        self.count -= 1
        if not left.count:
            self._drop(left)

    def count_since(self, since: datetime) -> int:
        """Return how many nodes' newest heartbeats came at `since` or later."""
        slot_number = _slot_of(since)
        number = slot_number // _SLOTS
        seconds, within = self._seconds, 0
        if (second := seconds.get(number)) is not None:
            within = sum(slot.count for slot in second.slots.values() if slot.number > slot_number)
            if (slot := second.slots.get(slot_number)) is not None:
                within += sum(group.count for group in slot.groups.values() if group.at >= since)
        if self._newest - number > len(seconds):
            return within + sum(each.count for each in seconds.values() if each.number > number)
        later = map(seconds.get, range(number + 1, self._newest + 1))
        return within + sum(each.count for each in later if each is not None)

    def _group(self, at: datetime) -> AgeGroup:
        slot_number = _slot_of(at)
        number = slot_number // _SLOTS
        if (second := self._seconds.get(number)) is None:
            second = self._seconds[number] = _AgeSecond(number)
            self._newest = max(self._newest, number)
        if (slot := second.slots.get(slot_number)) is None:
            slot = second.slots[slot_number] = _AgeSlot(slot_number, second)
        if (group := slot.groups.get(at)) is None:
            group = slot.groups[at] = AgeGroup(at, slot)
        return group

    def _drop(self, empty: AgeGroup) -> None:
        """Forget a group without nodes, and the slot and the second that it leaves empty."""
        if empty is self._last:
            self._last = None
        slot = empty.slot
        del slot.groups[empty.at]
        if not slot.groups:
            del slot.second.slots[slot.number]
            if not slot.second.slots:
                del self._seconds[slot.second.number]


def _slot_of(instant: datetime) -> int:
    return int(instant.timestamp() * _SLOTS)


class ReasonCounts:
    """Counts of a fleet's nodes by reason, kept up to date one change at a time. `ages` are those of its nodes."""

    def __init__(self, ages: HeartbeatAges) -> None:
        self._kinds: dict[Key, _Kind] = {}
        self._traits: dict[Key, _Kind] = {}
        self._naming: dict[str, dict[Key, _Kind]] = {}
        self._health: Counter[ReasonCode] = Counter()
        self._ages = ages

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

    def update_health(self, old: NodeState, new: NodeState) -> None:
        """Record another health of a node that is of the same kind as before."""
        self._health.subtract(_codes_of_health(old))
        self._health.update(_codes_of_health(new))

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
