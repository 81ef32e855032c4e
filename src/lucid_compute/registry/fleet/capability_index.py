"""Which nodes the matching engine has to look at, at a cost that follows the kinds of node and not the nodes.

Nodes that look alike to the matching engine (runtimes, VRAM, context, declared and reported models) form one
*capability class*. The engine decides once whether a class fits a model; a class counts while its freshest healthy
member is fresh. Each class has one bit: a model's fitting classes and the classes that are fresh now are two integers.
The bits that they share name the classes whose freshest member is a candidate. The engine then judges that node.
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
    """A dict from key to instant, kept oldest first.

    Heartbeats come nearly in order, so a touch is two dict operations; one that comes late (another replica took it)
    only marks the order, and the next reader sorts it once. `newest` and `newest_at`, None when empty, are known
    without sorting.
    """

    __slots__ = ("_instants", "_is_sorted", "newest", "newest_at")

    def __init__(self) -> None:
        self._instants: dict[Key, datetime] = {}
        self._is_sorted = True
        self.newest: Key | None = None
        self.newest_at: datetime | None = None

    def __len__(self) -> int:
        """Return how many keys there are."""
        return len(self._instants)

    def __contains__(self, key: Key) -> bool:
        """Return whether the key is in the order."""
        return key in self._instants

    def __iter__(self) -> Iterator[Key]:
        """Return every key, in no order that may be relied on."""
        return iter(self._instants)

    def touch(self, key: Key, at: datetime) -> bool:
        """Put `key` at its place for `at`, wherever it was; return whether that moved `newest_at`."""
        former = self._instants.pop(key, None)
        self._instants[key] = at
        newest_at = self.newest_at
        if newest_at is None or at >= newest_at:
            self.newest, self.newest_at = key, at
        else:
            self._is_sorted = False
            if former == newest_at:
                self.newest, self.newest_at = max(self._instants.items(), key=itemgetter(1))
        return self.newest_at != newest_at

    def discard(self, key: Key) -> None:
        """Take `key` out, if it is there."""
        if self._instants.pop(key, None) == self.newest_at:
            self._sort()
            self.newest, self.newest_at = next(reversed(self._instants.items()), (None, None))

    def expire_before(self, instant: datetime) -> list[Key]:
        """Take out and answer the keys last touched before `instant`."""
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
    """The classes that differ only in the models they name: runtimes, VRAM and context are the same.

    `fitting` holds the ids of the models that fit such a node where it names none of them.
    """

    __slots__ = ("bits", "fitting", "unnamed")

    def __init__(self, node: NodeState) -> None:
        self.unnamed = NodeState(passport=replace(node.passport, runtimes=node.runtimes))
        self.bits = 0
        self.fitting: set[str] = set()


class CapabilityClass:
    """Nodes that the matching engine can't tell apart but by their health.

    `healthy` orders the members that would be healthy if fresh by their newest heartbeat; `size` counts all members.
    `rings` are those of the models that the class serves, and hold its healthy members.
    """

    __slots__ = ("bit", "healthy", "key", "named_models", "representative", "rings", "size", "traits")

    def __init__(self, key: ClassKey, representative: NodeState, traits: _Traits, bit: int) -> None:
        """Start with no member; `representative` stands for all of them when fit is decided."""
        self.key = key
        self.traits = traits
        self.representative = representative
        self.named_models = frozenset(representative.declared) | representative.reported_models
        self.bit = bit
        self.size = 0
        self.healthy: FreshnessOrder[str] = FreshnessOrder()
        self.rings: dict[str, NodeRing] = {}

    def has_on_ring(self, node_id: str, model_id: str) -> bool:
        """Return whether its member is on the model's ring, without the ring's hash and search."""
        return model_id in self.rings and node_id in self.healthy


class _ModelEntry:
    """A model with the classes that fit it, and those of them that also declare or report it, as bits.

    `ring` holds the healthy members of the latter, whose heartbeats may have grown old since.
    """

    __slots__ = ("fitting", "model", "ring", "serving")

    def __init__(self, model: ModelPassport) -> None:
        self.model = model
        self.fitting = 0
        self.serving = 0
        self.ring = NodeRing()

    def decide(self, capability_class: CapabilityClass) -> None:
        """Let the matching engine say whether a class that names this model fits it."""
        bit = capability_class.bit
        fits = _fits(self.model, capability_class.representative)
        self.fitting = self.fitting | bit if fits else self.fitting & ~bit
        is_served = fits and serves(self.model, capability_class.representative)
        self.serving = self.serving | bit if is_served else self.serving & ~bit
        if is_served:
            capability_class.rings[self.model.id] = self.ring  # a class that is new has no members to put there yet


class CapabilityIndex:
    """Every model against every capability class, kept up to date one change at a time."""

    def __init__(self) -> None:
        self._classes: dict[ClassKey, CapabilityClass] = {}
        self._traits: dict[ClassKey, _Traits] = {}
        self._entries: dict[str, _ModelEntry] = {}
        self._classes_naming: dict[str, set[CapabilityClass]] = {}
        self._models_known_as: dict[str, set[str]] = {}
        self._fresh_order: FreshnessOrder[CapabilityClass] = FreshnessOrder()
        self._fresh_bits = 0
        self._free_bits: list[int] = []
        self._class_at: dict[int, CapabilityClass] = {}  # by the place of its bit, the lowest is 1

    def __len__(self) -> int:
        """Return how many capability classes there are."""
        return len(self._classes)

    @staticmethod
    def key_of(node: NodeState) -> ClassKey:
        """Return all that the matching engine reads of a node beside its health; the first three are its traits."""
        return (
            node.runtimes,
            node.passport.vram_gb,
            node.passport.max_context,
            frozenset(node.declared.values()),
            node.reported_models,
        )

    def join(self, node: NodeState) -> CapabilityClass:
        """Count the node as a member of its class, made when it is the first, and return the class."""
        key = self.key_of(node)
        found = self._classes.get(key) or self._add_class(key, node)
        found.size += 1
        return found

    def leave(self, node_id: str, capability_class: CapabilityClass) -> None:
        """Take the node out of its class; the class goes with its last member."""
        self.set_unhealthy(node_id, capability_class)
        capability_class.size -= 1
        if capability_class.size == 0:
            self._drop_class(capability_class)

    def set_healthy(self, node_id: str, capability_class: CapabilityClass, received_at: datetime) -> None:
        """Note a heartbeat of a member that is healthy for as long as it is fresh."""
        if node_id not in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.add(node_id)
        if capability_class.healthy.touch(node_id, received_at):
            self._follow_freshest(capability_class)

    def set_unhealthy(self, node_id: str, capability_class: CapabilityClass) -> None:
        """Note that this member does not count, however fresh."""
        if node_id in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.discard(node_id)
            capability_class.healthy.discard(node_id)
            self._follow_freshest(capability_class)

    def put_model(self, model: ModelPassport) -> None:
        """Decide, once, which classes fit this model."""
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
        """Forget the model, if it is known."""
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
        """Yield the freshest healthy member of each class that fits the model and is fresh; none of an unknown model.

        A caller that stops at the first node pays for one class, however many fit.
        """
        if (entry := self._entries.get(model_id)) is not None:
            yield from self._freshest_of(entry.fitting & self._fresh_at(now))

    def serving_candidates(self, model_id: str, now: datetime) -> Iterator[str]:
        """Yield those of `candidates` that also declare or report the model."""
        if (entry := self._entries.get(model_id)) is not None:
            yield from self._freshest_of(entry.serving & self._fresh_at(now))

    def ring_of(self, model_id: str) -> NodeRing:
        """Return the nodes that fit the model, name it and would be healthy if fresh; none of a model that is gone."""
        entry = self._entries.get(model_id)
        return entry.ring if entry else NodeRing()

    def _follow_freshest(self, capability_class: CapabilityClass) -> None:
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
            place = bits.bit_length()
            node_id = self._class_at[place].healthy.newest
            if node_id is not None:
                yield node_id
            bits ^= 1 << place - 1

    def _fresh_at(self, now: datetime) -> int:
        for capability_class in self._fresh_order.expire_before(now - FRESH_WINDOW):
            self._fresh_bits &= ~capability_class.bit
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
    """Take `item` out of the set at `name`, and the set with its last item."""
    index[name].discard(item)
    if not index[name]:
        del index[name]
