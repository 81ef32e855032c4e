"""The fleet: every node and model as Postgres last told, indexed so that hot reads cost no query.

It is written to by the storage layer only (the feed, and the registry for its own writes), in any order: each change
carries its row's revision, and an older one is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from lucid_compute.errors import ModelNotFound, NodeDeregistered, NodeNotFound
from lucid_compute.registry.domain.node_state import FRESH_WINDOW, DeclaredModel, NodeState, NodeStatus, Receipt
from lucid_compute.registry.domain.passports import (
    ComputePassport,
    ModelPassport,
    Passport,
    PassportStatus,
    PassportType,
)
from lucid_compute.registry.fleet.capability_index import CapabilityClass, CapabilityIndex
from lucid_compute.registry.fleet.node_ring import NodeRing
from lucid_compute.registry.fleet.replicas import OUTAGE_AFTER, Outage, Replicas, Sight, live_since, merge_outages
from lucid_compute.registry.matching_engine import is_healthy


class Lifecycle(NamedTuple):
    """What an operator asked of a node: its declaration and its drain. `drain_xid` is the transaction that began it.

    `recorded_state` is the last state that an event tells of.
    """

    passport_id: str
    declared: Mapping[str, DeclaredModel]
    draining_since: datetime | None
    drain_xid: int | None
    recorded_state: str
    revision: int


class FleetNode:
    """A node as the fleet holds it; `state` is replaced, never changed."""

    __slots__ = (
        "capability_class",
        "drain_xid",
        "lifecycle_revision",
        "recorded_state",
        "self_drain",
        "state",
    )

    def __init__(self, state: NodeState, capability_class: CapabilityClass) -> None:
        self.state = state
        self.capability_class = capability_class
        self.lifecycle_revision = 0
        self.drain_xid: int | None = None
        self.recorded_state = "registered"
        self.self_drain: Sight | None = None

    @property
    def record(self) -> Passport:
        """The node's passport as it is stored."""
        return self.state.passport.record


_NONE: Mapping[str, Any] = MappingProxyType({})


class Credentials:
    """The secrets of nodes and models by passport id, each under its passport's revision."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[int, Mapping[str, Any]]] = {}

    def __repr__(self) -> str:
        """Say whose secrets are held, and none of them."""
        return f"Secrets(of {len(self._held)} passports)"

    def apply(self, passport_id: str, revision: int, secrets: Mapping[str, Any]) -> None:
        """Hold the passport's secrets if newer than the ones held; an empty mapping forgets them.

        Its revision is kept, so that a late sight of the former secrets does not bring them back.
        """
        held = self._held.get(passport_id)
        if held is not None and revision > held[0]:
            self._held[passport_id] = (revision, secrets or _NONE)
        elif held is None and secrets:
            self._held[passport_id] = (revision, secrets)

    def of(self, passport_id: str) -> Mapping[str, Any]:
        """Return the passport's secrets: `inferenceKey` of a node, `upstreamApiKey` of a model; empty when none."""
        held = self._held.get(passport_id)
        return _NONE if held is None else held[1]

    def forget(self, passport_id: str) -> None:
        """Drop the secrets of a node or a model that is dropped itself."""
        self._held.pop(passport_id, None)


class Fleet:
    """Nodes and models in memory. Not safe across threads: one event loop owns it."""

    def __init__(self) -> None:
        self.replicas = Replicas()
        self.secrets = Credentials()
        self.outages: tuple[Outage, ...] = ()
        self.outage_after = OUTAGE_AFTER
        self.lease_renewed_at: datetime | None = None
        self.changes = 0  # goes up with whatever a count of nodes or models could tell, but for time that passes
        self._nodes: dict[str, FleetNode] = {}
        self._nodes_by_owner: dict[str, dict[str, FleetNode]] = {}
        self._models: dict[str, ModelPassport] = {}
        self._models_newest_first: list[ModelPassport] | None = None
        self._model_ids_by_name: dict[str, str] = {}
        self._index = CapabilityIndex()

    # --- what storage tells

    def apply_passport(self, record: Passport) -> None:
        """Hold the passport if it is a node's or a model's and newer than the one held."""
        if record.type is PassportType.COMPUTE:
            self._apply_compute(record)
        elif record.type is PassportType.MODEL:
            self._apply_model(record)

    def apply_lifecycle(self, lifecycle: Lifecycle) -> None:
        """Hold the node's declaration and drain, if newer than the ones held."""
        node = self._nodes.get(lifecycle.passport_id)
        if node is None or lifecycle.revision <= node.lifecycle_revision:
            return
        node.lifecycle_revision = lifecycle.revision
        node.drain_xid = lifecycle.drain_xid
        node.recorded_state = lifecycle.recorded_state
        self._replace(node, node.state._replace(declared=lifecycle.declared, draining_since=lifecycle.draining_since))

    def apply_receipt(self, passport_id: str, receipt: Receipt) -> None:
        """Hold the node's newest heartbeat, if newer than the one held."""
        node = self._nodes.get(passport_id)
        if node is None:
            return
        held = node.state.last_heartbeat
        if held is not None and receipt.revision <= held.revision:
            return
        _follow_self_drain(node, receipt, self.replicas)
        former = node.state
        state = NodeState(former.passport, former.declared, former.draining_since, receipt)  # _replace takes far longer
        if held is not None and _looks_alike(held, receipt):
            node.state = state
            self._follow_health(node)
            self.changes += not _says_the_same(held, receipt)
        else:
            self._replace(node, state)

    def apply_outages(self, outages: Iterable[Outage]) -> None:
        """Hold the registry's recorded outages."""
        self.outages = merge_outages(outages)

    # --- nodes

    def find_node(self, passport_id: str) -> FleetNode | None:
        """Return the node, ended ones too; None when there is none."""
        return self._nodes.get(passport_id)

    def get_node(self, passport_id: str, *, owner: str | None) -> FleetNode:
        """Return the owner's node; `owner` None sees all.

        Raises:
            NodeNotFound: there is none, or it is another owner's.
        """
        node = self._nodes.get(passport_id)
        if node is None or (owner is not None and node.record.owner != owner):
            raise NodeNotFound(passport_id)
        return node

    def get_registered_node(self, passport_id: str, *, owner: str | None) -> FleetNode:
        """Return the owner's node that has not ended.

        Raises:
            NodeNotFound: as `get_node`.
            NodeDeregistered: it was deregistered or revoked.
        """
        node = self.get_node(passport_id, owner=owner)
        if node.record.has_ended:
            raise NodeDeregistered(passport_id)
        return node

    def nodes(self, *, owner: str | None = None) -> Iterable[FleetNode]:
        """Return the owner's nodes, ended ones too; all with `owner` None."""
        return (self._nodes if owner is None else self._nodes_by_owner.get(owner, {})).values()

    def node_count(self) -> int:
        """Return how many nodes have not ended."""
        return sum(not node.record.has_ended for node in self._nodes.values())

    def live_since(self, now: datetime) -> datetime:
        """Return the oldest instant that a live node's newest heartbeat may have, outages of ours left out."""
        return live_since(now, self.outages_until(now))

    def outages_until(self, now: datetime) -> tuple[Outage, ...]:
        """Return the recorded outages, and the one that lasts while this replica's lease could not be renewed."""
        since = self.lease_renewed_at
        if since is None or now - since <= self.outage_after:
            return self.outages
        return merge_outages([*self.outages, Outage(since, now)])

    def status_of(self, node: FleetNode, now: datetime) -> NodeStatus:
        """Return what the registry says of the node right now."""
        return node.state.status(self.live_since(now))

    def in_flight(self, passport_id: str) -> int:
        """Return how many requests every live replica has running on the node."""
        return self.replicas.in_flight(passport_id)

    def is_drained(self, node: FleetNode) -> bool:
        """Return whether the node drains, every live replica has applied that, and none has a request running on it."""
        if not node.state.is_draining or not self.replicas.are_idle_on(node.state.id):
            return False
        if node.state.draining_since is not None:
            return self.replicas.all_have_applied(node.drain_xid)
        return self.replicas.all_have_seen(node.self_drain)

    # --- models

    def find_model(self, id_or_name: str) -> ModelPassport | None:
        """Return the model of that id, else the active one of that name or alias; None when there is none."""
        return self._models.get(id_or_name) or self._models.get(self._model_ids_by_name.get(id_or_name, ""))

    def get_model(self, id_or_name: str) -> ModelPassport:
        """Return the model of that id, name or alias.

        Raises:
            ModelNotFound: there is none.
        """
        if (model := self.find_model(id_or_name)) is None:
            raise ModelNotFound(id_or_name)
        return model

    def models_newest_first(self) -> list[ModelPassport]:
        """Return every model that is not revoked, by creation, newest first, then by id."""
        if self._models_newest_first is None:
            by_id = sorted(self._models.values(), key=lambda model: model.id)
            self._models_newest_first = sorted(by_id, key=lambda model: model.record.created_at, reverse=True)
        return self._models_newest_first

    def candidates(self, model: ModelPassport, now: datetime) -> Iterator[NodeState]:
        """Return nodes for `has_available_compute` to judge: one of each kind that the index takes to be available.

        It is the freshest of its kind. Nodes are looked up one at a time, when the engine asks for the next.
        """
        return (self._nodes[node_id].state for node_id in self._index.candidates(model.id, now))

    def serving_candidates(self, model: ModelPassport, now: datetime) -> Iterator[NodeState]:
        """Return those of `candidates` that declare or report the model, for `has_serving_compute` to judge."""
        return (self._nodes[node_id].state for node_id in self._index.serving_candidates(model.id, now))

    def ring_of(self, model: ModelPassport) -> NodeRing:
        """Return the nodes that the gateway may look at for the model, fresh or not.

        They fit it, declare or report it, and were healthy, active and not draining at their newest heartbeat.
        """
        return self._index.ring_of(model.id)

    def pass_over(self, node: FleetNode) -> None:
        """Take a node that is silent for good off every ring, until its next heartbeat."""
        self._index.set_unhealthy(node.state.id, node.capability_class)

    def class_count(self) -> int:
        """Return how many kinds of node there are."""
        return len(self._index)

    # --- what is over

    def forget_all_but(self, passport_ids: Collection[str], *, made_before: datetime) -> None:
        """Drop what a full load did not find, unless it was made after the load began."""
        for node in list(self._nodes.values()):
            if node.record.id not in passport_ids and node.record.created_at < made_before:
                self.forget_node(node)
        for model in list(self._models.values()):
            if model.id not in passport_ids and model.record.created_at < made_before:
                self._drop_model(model)
                self.secrets.forget(model.id)

    def forget_node(self, node: FleetNode) -> None:
        """Drop a node that ended long ago."""
        self.changes += 1
        self.secrets.forget(node.record.id)
        self._index.leave(node.record.id, node.capability_class)
        del self._nodes[node.record.id]
        del self._nodes_by_owner[node.record.owner][node.record.id]

    # --- inside

    def _apply_compute(self, record: Passport) -> None:
        node = self._nodes.get(record.id)
        if node is None:
            self.changes += 1
            state = NodeState(ComputePassport.read(record))
            node = FleetNode(state, self._index.join(state))
            self._nodes[record.id] = self._nodes_by_owner.setdefault(record.owner, {})[record.id] = node
        elif record.revision > node.record.revision:
            self._replace(node, node.state._replace(passport=ComputePassport.read(record)))
        if record.has_ended:
            self.secrets.apply(record.id, record.revision, {})

    def _apply_model(self, record: Passport) -> None:
        held = self._models.get(record.id)
        if held is not None and held.record.revision >= record.revision:
            return
        if held is not None:
            self._drop_model(held)
        if record.status is PassportStatus.REVOKED:
            self.secrets.forget(record.id)
            return
        self.changes += 1
        self._models_newest_first = None
        model = self._models[record.id] = ModelPassport.read(record)
        self._model_ids_by_name.update(dict.fromkeys(model.known_as[1:], record.id))
        self._index.put_model(model)

    def _drop_model(self, held: ModelPassport) -> None:
        self.changes += 1
        self._models_newest_first = None
        del self._models[held.id]
        self._index.drop_model(held.id)
        for name in held.known_as[1:]:
            if self._model_ids_by_name.get(name) == held.id:
                del self._model_ids_by_name[name]

    def _replace(self, node: FleetNode, state: NodeState) -> None:
        """Give the node another state, and with it another class if the matching engine would tell them apart."""
        self.changes += 1
        node.state = state
        if self._index.key_of(state) != node.capability_class.key:
            self._index.leave(state.id, node.capability_class)
            node.capability_class = self._index.join(state)
        self._follow_health(node)

    def _follow_health(self, node: FleetNode) -> None:
        state = node.state
        if state.last_heartbeat is not None and is_healthy(state, state.last_heartbeat.received_at):
            self._index.set_healthy(state.id, node.capability_class, state.last_heartbeat.received_at)
        else:
            self._index.set_unhealthy(state.id, node.capability_class)


def _looks_alike(held: Receipt, receipt: Receipt) -> bool:
    """Return whether the matching engine reads the same of both heartbeats, but for health."""
    old, new = held.heartbeat, receipt.heartbeat
    return old.available_models == new.available_models and old.runtime == new.runtime


def _says_the_same(held: Receipt, receipt: Receipt) -> bool:
    """Return whether the node is as it was one heartbeat ago, which was not long ago."""
    is_on_time = receipt.received_at - held.received_at <= FRESH_WINDOW
    return is_on_time and held.heartbeat.status == receipt.heartbeat.status


def _follow_self_drain(node: FleetNode, receipt: Receipt, replicas: Replicas) -> None:
    if receipt.heartbeat.status != "draining":
        node.self_drain = None
    elif node.self_drain is None:
        node.self_drain = replicas.sight()
