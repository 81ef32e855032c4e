"""An index of the nodes that the matching engine has to judge. Its cost grows with the kinds of node, not with nodes.

Nodes that the matching engine can't tell apart (runtimes, VRAM, context, declared and reported models) form one
*capability class*. The engine decides once whether a class fits a model. A class counts while its freshest healthy
member is fresh. Each class has one bit, so a model's fitting classes and the classes that are fresh now are two
integers. The bits that they share name the classes whose freshest member is a candidate. The engine judges that node.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from datetime import datetime
from operator import itemgetter
from typing import Generic, TypeVar

from lucid_compute.registry.domain.node_state import FRESH_WINDOW, NodeState
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.fleet.node_ring import NodeRing
from lucid_compute.registry.matching_engine import hardware_compatible, runtime_compatible, serves

Key = TypeVar("Key", bound=Hashable)


class FreshnessOrder(Generic[Key]):
    """A dict from key to instant, ordered oldest first.

    Heartbeats come nearly in order, so a touch is two dict operations. One that comes late, from another replica, only
    marks the dict as unsorted; the next reader sorts it once. `newest` and `newest_at` need no sorting; they are None
    when the dict is empty.
    """

    __slots__ = ("_instants", "_is_sorted", "newest", "newest_at")

    def __init__(self) -> None:
        self._instants: dict[Key, datetime] = {}
        self._is_sorted = True
        self.newest: Key | None = None
        self.newest_at: datetime | None = None

    def __len__(self) -> int:
        """Return the number of keys."""
        return len(self._instants)

    def __contains__(self, key: Key) -> bool:
        """Return whether the key is present."""
        return key in self._instants

    def __iter__(self) -> Iterator[Key]:
        """Return an iterator over the keys, in no particular order."""
        return iter(self._instants)

    def touch(self, key: Key, at: datetime) -> bool:
        """Set the instant of `key` to `at`; return whether `newest_at` changed."""
        previous = self._instants.pop(key, None)
        self._instants[key] = at
        newest_at = self.newest_at
        if newest_at is None or at >= newest_at:
            self.newest, self.newest_at = key, at
        else:
            self._is_sorted = False
            if previous == newest_at:
                self.newest, self.newest_at = max(self._instants.items(), key=itemgetter(1))
        return self.newest_at != newest_at

    def discard(self, key: Key) -> None:
        """Remove `key`, if present."""
        if self._instants.pop(key, None) == self.newest_at:
            self._sort()
            self.newest, self.newest_at = next(reversed(self._instants.items()), (None, None))

    def expire_before(self, instant: datetime) -> list[Key]:
        """Remove and return the keys last touched before `instant`."""
        self._sort()
        expired = []
        for key, at in self._instants.items():
            if at >= instant:
                break
            expired.append(key)
        for key in expired:
            del self._instants[key]
        if not self._instants:
            self.newest = self.newest_at = None
        return expired

    def _sort(self) -> None:
        if not self._is_sorted:
            self._instants = dict(sorted(self._instants.items(), key=itemgetter(1)))
            self._is_sorted = True


ClassKey = tuple[object, ...]
Item = TypeVar("Item")


class _Traits:
    """What classes that differ only in the models they name have in common: runtimes, VRAM and context.

    `fitting` is the ids of the models that fit such a node when it names none of them.
    """

    __slots__ = ("bits", "fitting", "unnamed")

    def __init__(self, node: NodeState) -> None:
        self.unnamed = NodeState(passport=replace(node.passport, runtimes=node.runtimes))
        self.bits = 0
        self.fitting: set[str] = set()


class CapabilityClass:
    """Nodes that the matching engine can tell apart only by their health.

    `healthy` orders the members that would be healthy if fresh by their newest heartbeat; `size` counts all members.
    `rings` are the rings of the models that the class serves; its healthy members are on them.
    """

    __slots__ = ("bit", "healthy", "key", "named_models", "representative", "rings", "size", "traits")

    def __init__(self, key: ClassKey, representative: NodeState, traits: _Traits, bit: int) -> None:
        """Create a class without members; the engine judges `representative` for all of them."""
        self.key = key
        self.traits = traits
        self.representative = representative
        self.named_models = frozenset(representative.declared) | representative.reported_models
        self.bit = bit
        self.size = 0
        self.healthy: FreshnessOrder[str] = FreshnessOrder()
        self.rings: dict[str, NodeRing] = {}

    def has_on_ring(self, node_id: str, model_id: str) -> bool:
        """Return whether a member is on the model's ring, without the ring's hash and search."""
        return model_id in self.rings and node_id in self.healthy


class _ModelEntry:
    """A model with two sets of classes as bits: those that fit it, and those that also declare or report it.

    `ring` holds the healthy members of the second set, whose heartbeats may be stale by now.
    """

    __slots__ = ("fitting", "model", "ring", "serving")

    def __init__(self, model: ModelPassport) -> None:
        self.model = model
        self.fitting = 0
        self.serving = 0
        self.ring = NodeRing()

    def decide(self, capability_class: CapabilityClass) -> None:
        """Let the matching engine decide whether a class that names this model fits it."""
        bit = capability_class.bit
        fits = _fits(self.model, capability_class.representative)
        self.fitting = self.fitting | bit if fits else self.fitting & ~bit
        is_served = fits and serves(self.model, capability_class.representative)
        self.serving = self.serving | bit if is_served else self.serving & ~bit
        if is_served:
            capability_class.rings[self.model.id] = self.ring  # a new class has no members to add yet


class CapabilityIndex:
    """Every model and every capability class, kept up to date one change at a time."""

    def __init__(self) -> None:
        self._classes: dict[ClassKey, CapabilityClass] = {}
        self._traits: dict[ClassKey, _Traits] = {}
        self._entries: dict[str, _ModelEntry] = {}
        self._classes_naming: dict[str, set[CapabilityClass]] = {}
        self._models_known_as: dict[str, set[str]] = {}
        self._fresh_order: FreshnessOrder[CapabilityClass] = FreshnessOrder()
        self._fresh_bits = 0
        self._expired_at: datetime | None = None  # the instant for which classes that are no longer fresh are removed
        self._free_bits: list[int] = []
        self._class_at: dict[int, CapabilityClass] = {}  # by the position of its bit, the lowest is 1

    def __len__(self) -> int:
        """Return the number of capability classes."""
        return len(self._classes)

    @staticmethod
    def key_of(node: NodeState) -> ClassKey:
        """Return all that the matching engine reads of a node except its health; the first three are its traits."""
        return (
            node.runtimes,
            node.passport.vram_gb,
            node.passport.max_context,
            frozenset(node.declared.values()),
            node.reported_models,
        )

    def join(self, node: NodeState) -> CapabilityClass:
        """Add the node to its class, created for its first member; return the class."""
        key = self.key_of(node)
        joined = self._classes.get(key) or self._add_class(key, node)
        joined.size += 1
        return joined

    def leave(self, node_id: str, capability_class: CapabilityClass) -> None:
        """Remove the node from its class, and the class with its last member."""
        self.set_unhealthy(node_id, capability_class)
        capability_class.size -= 1
        if capability_class.size == 0:
            self._drop_class(capability_class)

    def set_healthy(self, node_id: str, capability_class: CapabilityClass, received_at: datetime) -> None:
        """Record a heartbeat of a member that is healthy as long as it is fresh."""
        if node_id not in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.add(node_id)
        if capability_class.healthy.touch(node_id, received_at):
            self._update_freshness(capability_class)

    def set_unhealthy(self, node_id: str, capability_class: CapabilityClass) -> None:
        """Record that this member is not healthy, however fresh."""
        if node_id in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.discard(node_id)
            capability_class.healthy.discard(node_id)
            self._update_freshness(capability_class)

    def put_model(self, model: ModelPassport) -> None:
        """Add or replace the model, and decide once which classes fit it."""
        self.drop_model(model.id)
        entry = self._entries[model.id] = _ModelEntry(model)
        for name in model.known_as:
            self._models_known_as.setdefault(name, set()).add(model.id)
        for traits in self._traits.values():
            if _fits(model, traits.unnamed):
                traits.fitting.add(model.id)
                entry.fitting |= traits.bits
        naming = {c for name in model.known_as for c in self._classes_naming.get(name, ())}
        for capability_class in naming:
            entry.decide(capability_class)
        entry.ring.fill(node_id for c in naming if model.id in c.rings for node_id in c.healthy)

    def drop_model(self, model_id: str) -> None:
        """Remove the model, if it is known."""
        entry = self._entries.pop(model_id, None)
        if entry is None:
            return
        for name in entry.model.known_as:
            _discard_from(self._models_known_as, name, model_id)
        for traits in self._traits.values():
            traits.fitting.discard(model_id)
        for capability_class in {c for name in entry.model.known_as for c in self._classes_naming.get(name, ())}:
            capability_class.rings.pop(model_id, None)

    def candidates(self, model_id: str, now: datetime) -> Iterator[str]:
        """Return the freshest healthy member of each fresh class that fits the model; none of an unknown model.

        A caller that stops at the first node pays for one class, however many fit.
        """
        entry = self._entries.get(model_id)
        return self._freshest_of(0 if entry is None else entry.fitting & self._fresh_at(now))

    def serving_candidates(self, model_id: str, now: datetime) -> Iterator[str]:
        """Return those `candidates` that also declare or report the model."""
        entry = self._entries.get(model_id)
        return self._freshest_of(0 if entry is None else entry.serving & self._fresh_at(now))

    def ring_of(self, model_id: str) -> NodeRing:
        """Return the nodes that fit and name the model and would be healthy if fresh; empty for an unknown model."""
        entry = self._entries.get(model_id)
        return entry.ring if entry else NodeRing()

    def _update_freshness(self, capability_class: CapabilityClass) -> None:
        self._expired_at = None
        newest_at = capability_class.healthy.newest_at
        if newest_at is None:
            self._fresh_order.discard(capability_class)
            self._fresh_bits &= ~capability_class.bit
            return
        self._fresh_order.touch(capability_class, newest_at)
        if not self._fresh_bits & capability_class.bit:
            self._fresh_bits |= capability_class.bit

    def _freshest_of(self, bits: int) -> Iterator[str]:
        while bits:
            position = bits.bit_length()
            node_id = self._class_at[position].healthy.newest
            if node_id is not None:
                yield node_id
            bits ^= 1 << position - 1

    def _fresh_at(self, now: datetime) -> int:
        if now != self._expired_at:  # a list asks for each of its models at the same instant
            for capability_class in self._fresh_order.expire_before(now - FRESH_WINDOW):
                self._fresh_bits &= ~capability_class.bit
            self._expired_at = now
        return self._fresh_bits

    def _add_class(self, key: ClassKey, node: NodeState) -> CapabilityClass:
        bit = self._free_bits.pop() if self._free_bits else 1 << len(self._classes)
        traits = self._traits.get(key[:3]) or self._add_traits(key[:3], node)
        traits.bits |= bit
        added = self._classes[key] = self._class_at[bit.bit_length()] = CapabilityClass(key, node, traits, bit)
        for model_id in traits.fitting:
            self._entries[model_id].fitting |= bit
        for name in added.named_models:
            self._classes_naming.setdefault(name, set()).add(added)
            for model_id in self._models_known_as.get(name, ()):
                self._entries[model_id].decide(added)
        return added

    def _add_traits(self, key: ClassKey, node: NodeState) -> _Traits:
        traits = self._traits[key] = _Traits(node)
        traits.fitting = {i for i, entry in self._entries.items() if _fits(entry.model, traits.unnamed)}
        return traits

    def _drop_class(self, dropped: CapabilityClass) -> None:
        del self._classes[dropped.key], self._class_at[dropped.bit.bit_length()]
        dropped.traits.bits &= ~dropped.bit
        if not dropped.traits.bits:
            del self._traits[dropped.key[:3]]
        for name in dropped.named_models:
            _discard_from(self._classes_naming, name, dropped)
        for entry in self._entries.values():
            entry.fitting &= ~dropped.bit
            entry.serving &= ~dropped.bit
        self._free_bits.append(dropped.bit)


def _fits(model: ModelPassport, node: NodeState) -> bool:
    return runtime_compatible(model, node) and hardware_compatible(model, node)


def _discard_from(index: dict[str, set[Item]], name: str, item: Item) -> None:
    """Remove `item` from the set at `name`, and the set with its last item."""
    index[name].discard(item)
    if not index[name]:
        del index[name]
