"""An index of the nodes that the matching engine has to judge. Its cost grows with the kinds of node, not with nodes.

Nodes that the matching engine can't tell apart (runtimes, VRAM, context, declared and reported models) form one
*capability class*. The engine decides once whether a class fits a model. A class counts while its freshest healthy
member is fresh. Classes that differ only in the models that they name share their *traits*; models that ask the same
of a node that does not name them share a *need*.

Each traits has one bit, and each class has one bit among those of its traits. So the traits that meet a need, the
classes that name a model, and what is fresh now are integers. The bits that they share name the classes whose freshest
member is a candidate. The engine judges that node. A new class changes integers of its own traits and of the models
that it names, and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import datetime
from typing import Generic, Protocol, TypeVar

from lucid_compute.registry.domain.node_state import FRESH_WINDOW, NodeState
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.fleet.freshness import ExpiryQueue, FreshnessOrder
from lucid_compute.registry.fleet.node_ring import NodeRing
from lucid_compute.registry.matching_engine import (
    hardware_compatible,
    minimum_vram_gb,
    runtime_compatible,
    serves,
    wanted_runtimes,
)


class ClassMember(Protocol):
    """A node of the fleet, by identity; `state` is replaced, and is current whenever the index is asked."""

    state: NodeState

    def __hash__(self) -> int:
        """Return the hash of its identity."""


ClassKey = tuple[object, ...]
NeedKey = tuple[object, ...]
Item = TypeVar("Item")


class _BitTable(Generic[Item]):
    """Items by the position of their bit, the lowest is 1. The bit of a removed item is given to a later one.

    Positions are kept, and not bits: the bits of ten thousand items would take seven megabytes.
    """

    __slots__ = ("_free", "at")

    def __init__(self) -> None:
        self.at: dict[int, Item] = {}
        self._free: list[int] = []

    def add(self, item: Item) -> int:
        """Return the position of a new item."""
        position = self._free.pop() if self._free else len(self.at) + 1
        self.at[position] = item
        return position

    def remove(self, position: int) -> None:
        """Free the position of an item."""
        del self.at[position]
        self._free.append(position)


class _Traits:
    """What classes that differ only in the models they name have in common: runtimes, VRAM and context.

    `unnamed` is such a node that names no model; `fresh` has the bits of the classes with a fresh member.
    """

    __slots__ = ("bit", "classes", "fresh", "unnamed")

    def __init__(self, node: NodeState) -> None:
        self.unnamed = NodeState(passport=replace(node.passport, runtimes=node.runtimes))
        self.classes: _BitTable[CapabilityClass] = _BitTable()
        self.fresh = 0
        self.bit = 0


class CapabilityClass:
    """Nodes that the matching engine can tell apart only by their health.

    `healthy` orders the members that would be healthy if fresh by their newest heartbeat; `size` counts all members.
    `rings` are the rings of the models that the class serves; its healthy members are on them.
    """

    __slots__ = ("healthy", "key", "named_models", "position", "representative", "rings", "size", "traits")

    def __init__(self, key: ClassKey, representative: NodeState, traits: _Traits) -> None:
        """Create a class without members; the engine judges `representative` for all of them."""
        self.key = key
        self.traits = traits
        self.representative = representative
        self.named_models = frozenset(representative.declared) | representative.reported_models
        self.position = traits.classes.add(self)
        self.size = 0
        self.healthy: FreshnessOrder[ClassMember] = FreshnessOrder()
        self.rings: dict[str, NodeRing] = {}

    @property
    def bit(self) -> int:
        """Return the bit of the class among those of its traits."""
        return 1 << self.position - 1

    def has_on_ring(self, member: ClassMember, model_id: str) -> bool:
        """Return whether a member is on the model's ring, without the ring's hash and search."""
        return model_id in self.rings and member in self.healthy


class _Need:
    """What `size` models ask of a node that does not name them; `met_by` has the bits of the traits that meet it."""

    __slots__ = ("met_by", "model", "size")

    def __init__(self, model: ModelPassport) -> None:
        """Create a need that no traits meet yet; the engine judges `model` for all its models."""
        self.model = model
        self.met_by = 0
        self.size = 0

    def decide(self, traits: _Traits) -> None:
        """Let the matching engine decide whether these traits meet the need."""
        self.met_by = self.met_by | traits.bit if _fits(self.model, traits.unnamed) else self.met_by & ~traits.bit


class _ModelEntry:
    """A model, what it asks of nodes that do not name it, and the classes that name it.

    `naming` has the bits of the classes that name the model and of those that also fit it, by traits; `served_by` the
    bits of the traits of the latter. `ring` holds the healthy members of the latter; their heartbeats may be stale.
    """

    __slots__ = ("model", "naming", "need", "ring", "served_by")

    def __init__(self, model: ModelPassport, need: _Need) -> None:
        self.model = model
        self.need = need
        self.naming: dict[_Traits, tuple[int, int]] = {}
        self.served_by = 0
        self.ring = NodeRing()

    def add(self, named_by: CapabilityClass) -> None:
        """Let the matching engine decide whether a class that names this model fits it."""
        naming, serving = self.naming.get(named_by.traits, (0, 0))
        if _fits(self.model, named_by.representative) and serves(self.model, named_by.representative):
            serving |= named_by.bit
            self.served_by |= named_by.traits.bit
            named_by.rings[self.model.id] = self.ring  # a new class has no members to add yet
        self.naming[named_by.traits] = naming | named_by.bit, serving

    def remove(self, dropped: CapabilityClass) -> None:
        """Forget a class that named this model."""
        traits = dropped.traits
        naming, serving = (bits & ~dropped.bit for bits in self.naming.pop(traits, (0, 0)))
        if naming:
            self.naming[traits] = naming, serving
        if not serving:
            self.served_by &= ~traits.bit

    def fitting(self, traits: _Traits) -> int:
        """Return the bits of the fresh classes of these traits that fit the model."""
        unnamed = traits.fresh if self.need.met_by & traits.bit else 0
        naming = self.naming.get(traits)
        return unnamed if naming is None else unnamed & ~naming[0] | naming[1] & traits.fresh

    def serving(self, traits: _Traits) -> int:
        """Return the bits of the fresh classes of these traits that fit the model and name it."""
        return self.naming[traits][1] & traits.fresh


class CapabilityIndex:
    """Every model and every capability class, kept up to date one change at a time."""

    def __init__(self) -> None:
        self._classes: dict[ClassKey, CapabilityClass] = {}
        self._traits: dict[ClassKey, _Traits] = {}
        self._bits: _BitTable[_Traits] = _BitTable()
        self._entries: dict[str, _ModelEntry] = {}
        self._needs: dict[NeedKey, _Need] = {}
        self._classes_naming: dict[str, set[CapabilityClass]] = {}
        self._models_known_as: dict[str, set[str]] = {}
        self._expiry: ExpiryQueue[CapabilityClass] = ExpiryQueue()
        self._fresh_traits = 0
        self._expired_at: datetime | None = None  # a list asks for each of its models at the same instant

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

    def leave(self, member: ClassMember, capability_class: CapabilityClass) -> None:
        """Remove the node from its class, and the class with its last member."""
        self.set_unhealthy(member, capability_class)
        capability_class.size -= 1
        if capability_class.size == 0:
            self._drop_class(capability_class)

    def set_healthy(self, member: ClassMember, capability_class: CapabilityClass, received_at: datetime) -> None:
        """Record a heartbeat of a member that is healthy as long as it is fresh."""
        if member not in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.add(member.state.id)
        if capability_class.healthy.touch(member, received_at):
            self._update_freshness(capability_class)

    def set_fresh(self, member: ClassMember, capability_class: CapabilityClass, received_at: datetime) -> bool:
        """Record a heartbeat of a member that was healthy and has not changed; return whether it was healthy."""
        is_healthy = member in capability_class.healthy
        if is_healthy and capability_class.healthy.touch(member, received_at):
            self._update_freshness(capability_class)
        return is_healthy

    def set_unhealthy(self, member: ClassMember, capability_class: CapabilityClass) -> None:
        """Record that this member is not healthy, however fresh."""
        if member in capability_class.healthy:
            for ring in capability_class.rings.values():
                ring.discard(member.state.id)
            capability_class.healthy.discard(member)
            self._update_freshness(capability_class)

    def put_model(self, model: ModelPassport) -> None:
        """Add or replace the model, and decide once which traits and which classes that name it fit it."""
        self.drop_model(model.id)
        need = self._needs.get(_need_key(model)) or self._add_need(model)
        need.size += 1
        entry = self._entries[model.id] = _ModelEntry(model, need)
        for name in model.known_as:
            self._models_known_as.setdefault(name, set()).add(model.id)
        naming = self._naming(model)
        for capability_class in naming:
            entry.add(capability_class)
        entry.ring.fill(member.state.id for c in naming if model.id in c.rings for member in c.healthy)

    def drop_model(self, model_id: str) -> None:
        """Remove the model, if it is known."""
        entry = self._entries.pop(model_id, None)
        if entry is None:
            return
        entry.need.size -= 1
        if not entry.need.size:
            del self._needs[_need_key(entry.model)]
        for name in entry.model.known_as:
            _discard_from(self._models_known_as, name, model_id)
        for capability_class in self._naming(entry.model):
            capability_class.rings.pop(model_id, None)

    def candidates(self, model_id: str, now: datetime) -> Iterator[NodeState]:
        """Return the freshest healthy member of each fresh class that fits the model; none of an unknown model.

        A caller that stops at the first node pays for one class, however many fit.
        """
        fresh = self._fresh_traits if now == self._expired_at else self._fresh_at(now)
        entry = self._entries.get(model_id)
        bits = 0 if entry is None else (entry.need.met_by | entry.served_by) & fresh
        return self._freshest(bits, entry.fitting) if entry and bits else iter(())

    def serving_candidates(self, model_id: str, now: datetime) -> Iterator[NodeState]:
        """Return those `candidates` that also declare or report the model."""
        fresh = self._fresh_traits if now == self._expired_at else self._fresh_at(now)
        entry = self._entries.get(model_id)
        bits = 0 if entry is None else entry.served_by & fresh
        return self._freshest(bits, entry.serving) if entry and bits else iter(())

    def ring_of(self, model_id: str) -> NodeRing:
        """Return the nodes that fit and name the model and would be healthy if fresh; empty for an unknown model."""
        entry = self._entries.get(model_id)
        return entry.ring if entry else NodeRing()

    def _freshest(self, traits_bits: int, classes_of: Callable[[_Traits], int]) -> Iterator[NodeState]:
        while traits_bits:
            position = traits_bits.bit_length()
            traits_bits ^= 1 << position - 1
            traits = self._bits.at[position]
            bits = classes_of(traits)
            while bits:
                position = bits.bit_length()
                bits ^= 1 << position - 1
                member = traits.classes.at[position].healthy.newest
                if member is not None:
                    yield member.state

    def _update_freshness(self, capability_class: CapabilityClass) -> None:
        self._expired_at = None
        newest_at = capability_class.healthy.newest_at
        if newest_at is None:
            self._expiry.discard(capability_class)
            self._set_stale(capability_class)
            return
        self._expiry.touch(capability_class, newest_at)
        traits = capability_class.traits
        if not traits.fresh & capability_class.bit:
            traits.fresh |= capability_class.bit
            self._fresh_traits |= traits.bit

    def _set_stale(self, capability_class: CapabilityClass) -> None:
        traits = capability_class.traits
        traits.fresh &= ~capability_class.bit
        if not traits.fresh:
            self._fresh_traits &= ~traits.bit

    def _fresh_at(self, now: datetime) -> int:
        for capability_class in self._expiry.expire_before(now - FRESH_WINDOW):
            self._set_stale(capability_class)
        self._expired_at = now
        return self._fresh_traits

    def _naming(self, model: ModelPassport) -> set[CapabilityClass]:
        return {c for name in model.known_as for c in self._classes_naming.get(name, ())}

    def _named(self, names: Iterable[str]) -> set[str]:
        return {model_id for name in names for model_id in self._models_known_as.get(name, ())}

    def _add_class(self, key: ClassKey, node: NodeState) -> CapabilityClass:
        traits = self._traits.get(key[:3]) or self._add_traits(key[:3], node)
        added = self._classes[key] = CapabilityClass(key, node, traits)
        for name in added.named_models:
            self._classes_naming.setdefault(name, set()).add(added)
        for model_id in self._named(added.named_models):
            self._entries[model_id].add(added)
        return added

    def _add_traits(self, key: ClassKey, node: NodeState) -> _Traits:
        traits = self._traits[key] = _Traits(node)
        traits.bit = 1 << self._bits.add(traits) - 1
        for need in self._needs.values():
            need.decide(traits)
        return traits

    def _add_need(self, model: ModelPassport) -> _Need:
        need = self._needs[_need_key(model)] = _Need(model)
        for traits in self._traits.values():
            need.decide(traits)
        return need

    def _drop_class(self, dropped: CapabilityClass) -> None:
        del self._classes[dropped.key]
        for name in dropped.named_models:
            _discard_from(self._classes_naming, name, dropped)
        for model_id in self._named(dropped.named_models):
            self._entries[model_id].remove(dropped)
        traits = dropped.traits
        traits.classes.remove(dropped.position)
        if not traits.classes.at:
            del self._traits[dropped.key[:3]]
            self._bits.remove(traits.bit.bit_length())


def _fits(model: ModelPassport, node: NodeState) -> bool:
    return runtime_compatible(model, node) and hardware_compatible(model, node)


def _need_key(model: ModelPassport) -> NeedKey:
    """Return all that the matching engine reads of a model to judge a node that does not name it."""
    return wanted_runtimes(model), minimum_vram_gb(model, None), model.context_length


def _discard_from(index: dict[str, set[Item]], name: str, item: Item) -> None:
    """Remove `item` from the set at `name`, and the set with its last item."""
    index[name].discard(item)
    if not index[name]:
        del index[name]
