"""The fleet: every node and model as last read from Postgres, in memory and indexed, so that hot reads need no query.

Only the change feed and the stores (for their own writes) apply changes, in any order: each change has its row's
revision, and an older one is ignored.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from lucid_compute.errors import ModelNotFound, NodeDeregistered, NodeNotFound
from lucid_compute.registry.domain.node_state import (
    FRESH_WINDOW,
    DeclaredModel,
    Heartbeat,
    NodeState,
    NodeStatus,
    Receipt,
    ReportedStatus,
)
from lucid_compute.registry.domain.passports import (
    ComputePassport,
    ModelPassport,
    Passport,
    PassportStatus,
    PassportType,
)
from lucid_compute.registry.fleet.capability_index import CapabilityClass, CapabilityIndex
from lucid_compute.registry.fleet.node_ring import NodeRing
from lucid_compute.registry.fleet.reason_counts import AgeGroup, HeartbeatAges, ReasonCounts
from lucid_compute.registry.fleet.replicas import OUTAGE_AFTER, Checkpoint, Outage, Replicas, live_since, merge_outages
from lucid_compute.registry.matching_engine import is_healthy


class Lifecycle(NamedTuple):
    """What an operator set for a node: its declaration and its drain. `drain_xid` is the transaction of the drain.

    `recorded_state` is the node's state in its last event.
    """

    passport_id: str
    declared: Mapping[str, DeclaredModel]
    draining_since: datetime | None
    drain_xid: int | None
    recorded_state: str
    revision: int


class FleetNode:
    """A node in the fleet; `state` is replaced, never changed in place. `age` is None before its first heartbeat."""

    __slots__ = (
        "age",
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
        self.age: AgeGroup | None = None
        self.lifecycle_revision = 0
        self.drain_xid: int | None = None
        self.recorded_state = "registered"
        self.self_drain: Checkpoint | None = None

    @property
    def record(self) -> Passport:
        """The node's passport as stored."""
        return self.state.passport.record


_NONE: Mapping[str, Any] = MappingProxyType({})


class Credentials:
    """Credentials for nodes and upstreams, by passport id.

    They are kept apart from passports, so that no response of the API can contain them.
    """

    def __init__(self) -> None:
        self._by_passport: dict[str, tuple[int, Mapping[str, Any]]] = {}
        self._unconfirmed: set[str] = set()

    def __repr__(self) -> str:
        """Return the number of passports and no secret."""
        return f"Credentials(of {len(self._by_passport)} passports)"

    def begin_load(self) -> None:
        """Begin a full load: its secrets replace those of now, whatever their revisions say."""
        self._unconfirmed = set(self._by_passport)

    def apply(self, passport_id: str, revision: int, secrets: Mapping[str, Any]) -> None:
        """Replace the passport's secrets if `revision` is newer; an empty mapping removes them.

        The revision is kept, so that an older copy that arrives late does not restore removed secrets.
        """
        current = self._by_passport.get(passport_id)
        if current is not None and (revision > current[0] or passport_id in self._unconfirmed):
            self._unconfirmed.discard(passport_id)
            self._by_passport[passport_id] = (revision, secrets or _NONE)
        elif current is None and secrets:
            self._by_passport[passport_id] = (revision, secrets)

    def of(self, passport_id: str) -> Mapping[str, Any]:
        """Return the passport's secrets: `inferenceKey` of a node, `upstreamApiKey` of a model; empty if none."""
        current = self._by_passport.get(passport_id)
        return _NONE if current is None else current[1]

    def forget(self, passport_id: str) -> None:
        """Remove the secrets of a node or a model that the fleet forgets."""
        self._by_passport.pop(passport_id, None)


class _Unconfirmed(NamedTuple):
    """What the fleet had when a full load began, by passport id, and the load has not brought yet."""

    passports: set[str]
    lifecycles: set[str]
    receipts: set[str]


class Fleet:
    """Nodes and models in memory. Not safe across threads: one event loop owns it."""

    def __init__(self) -> None:
        self.replicas = Replicas()
        self.secrets = Credentials()
        self.outages: tuple[Outage, ...] = ()
        self.outage_after = OUTAGE_AFTER
        self.lease_renewed_at: datetime | None = None
        self.changes = 0  # grows with each change that a count of nodes or models could show, except passing time
        self._nodes: dict[str, FleetNode] = {}
        self._nodes_by_owner: dict[str, dict[str, FleetNode]] = {}
        self._models: dict[str, ModelPassport] = {}
        self._models_newest_first: list[ModelPassport] | None = None
        self._model_ids_by_name: dict[str, str] = {}
        self._index = CapabilityIndex()
        self._connected: set[str] = set()  # outbound nodes whose agents keep a connection to this replica
        self._unconfirmed = _Unconfirmed(set(), set(), set())
        self._ages = HeartbeatAges()
        self._reasons = ReasonCounts(self._ages)

    # --- changes

    def apply_passport(self, record: Passport) -> None:
        """Apply the passport of a node or a model, if newer than the current one."""
        if record.type is PassportType.COMPUTE:
            self._apply_compute(record)
        elif record.type is PassportType.MODEL:
            self._apply_model(record)

    def apply_lifecycle(self, lifecycle: Lifecycle) -> None:
        """Apply the node's declaration and drain, if newer than the current ones."""
        node = self._nodes.get(lifecycle.passport_id)
        unconfirmed = self._unconfirmed.lifecycles
        if node is None or (lifecycle.revision <= node.lifecycle_revision and node.state.id not in unconfirmed):
            return
        unconfirmed.discard(node.state.id)
        node.lifecycle_revision = lifecycle.revision
        node.drain_xid = lifecycle.drain_xid
        node.recorded_state = lifecycle.recorded_state
        self._replace(node, node.state._replace(declared=lifecycle.declared, draining_since=lifecycle.draining_since))

    def apply_receipt(self, passport_id: str, receipt: Receipt) -> None:
        """Apply the node's newest heartbeat, if newer than the current one."""
        node = self._nodes.get(passport_id)
        if node is None:
            return
        old = node.state
        previous = old.last_heartbeat
        unconfirmed = self._unconfirmed.receipts
        if previous is not None and receipt.revision <= previous.revision and passport_id not in unconfirmed:
            return
        unconfirmed.discard(passport_id)
        _update_self_drain(node, receipt, self.replicas)
        node.age = self._ages.move(node.age, receipt.received_at)
        # _replace takes far longer
        state = NodeState(old.passport, old.declared, old.draining_since, receipt, old.is_connected)
        if previous is None or not _looks_alike(previous.heartbeat, receipt.heartbeat):
            self._replace(node, state)
            return
        node.state = state
        if previous.heartbeat.status is not receipt.heartbeat.status:
            self._reasons.update_health(old, state)
            self._update_health(node)
            self.changes += 1
            return
        is_as_healthy = self._index.set_fresh(node, node.capability_class, receipt.received_at)
        if not is_as_healthy and receipt.heartbeat.status is ReportedStatus.HEALTHY:  # it was silent, or drains
            self._update_health(node)
        self.changes += receipt.received_at - previous.received_at > FRESH_WINDOW

    def set_connected(self, passport_id: str, *, is_connected: bool) -> None:
        """Record whether the agent of an outbound node keeps a connection to this replica."""
        if is_connected:
            self._connected.add(passport_id)
        else:
            self._connected.discard(passport_id)
        if (node := self._nodes.get(passport_id)) is not None:
            self._replace(node, self._with_reach(node.state))

    def apply_outages(self, outages: Iterable[Outage]) -> None:
        """Replace the recorded outages of the registry."""
        self.outages = merge_outages(outages)

    # --- nodes

    def find_node(self, passport_id: str) -> FleetNode | None:
        """Return the node, also one that has ended; None if there is none."""
        return self._nodes.get(passport_id)

    def has_node(self, passport_id: str) -> bool:
        """Return whether there is such a node, also one that has ended."""
        return passport_id in self._nodes

    def find_visible(self, passport_id: str, owner: str | None) -> FleetNode | None:
        """Return the owner's node, also one that has ended; with `owner` None, any owner's; None if there is none."""
        node = self._nodes.get(passport_id)
        return node if node is not None and owner in (None, node.record.owner) else None

    def get_node(self, passport_id: str, *, owner: str | None) -> FleetNode:
        """Return the owner's node; with `owner` None, any owner's.

        Raises:
            NodeNotFound: there is no such node, or it belongs to another owner.
        """
        if (node := self.find_visible(passport_id, owner)) is None:
            raise NodeNotFound(passport_id)
        return node

    def get_registered_node(self, passport_id: str, *, owner: str | None) -> FleetNode:
        """Return the owner's node, which has not ended; with `owner` None, any owner's.

        Raises:
            NodeNotFound: there is no such node, or it belongs to another owner.
            NodeDeregistered: the node was deregistered or revoked.
        """
        node = self.get_node(passport_id, owner=owner)
        if node.record.has_ended:
            raise NodeDeregistered(passport_id)
        return node

    def nodes(self, *, owner: str | None = None) -> Iterable[FleetNode]:
        """Return the owner's nodes, also those that have ended; with `owner` None, all nodes."""
        return (self._nodes if owner is None else self._nodes_by_owner.get(owner, {})).values()

    def node_count(self) -> int:
        """Return the number of nodes that have not ended."""
        return sum(not node.record.has_ended for node in self._nodes.values())

    def live_since(self, now: datetime) -> datetime:
        """Return the oldest instant of a live node's newest heartbeat, with outages of the registry not counted."""
        return live_since(now, self.outages_until(now))

    def outages_until(self, now: datetime) -> tuple[Outage, ...]:
        """Return the recorded outages, and the current one if this replica's lease can't be renewed."""
        since = self.lease_renewed_at
        if since is None or now - since <= self.outage_after:
            return self.outages
        return merge_outages([*self.outages, Outage(since, now)])

    def status_of(self, node: FleetNode, now: datetime) -> NodeStatus:
        """Return the node's status at `now`."""
        return node.state.status(self.live_since(now))

    def in_flight(self, passport_id: str) -> int:
        """Return the number of requests in flight on the node, over all live replicas."""
        return self.replicas.in_flight(passport_id)

    def is_drained(self, node: FleetNode) -> bool:
        """Return whether the node drains, all live replicas have applied that, and none has a request on it."""
        if not node.state.is_draining or not self.replicas.are_idle_on(node.state.id):
            return False
        if node.state.draining_since is not None:
            return self.replicas.all_have_applied(node.drain_xid)
        return self.replicas.all_have_reached(node.self_drain)

    # --- models

    def find_model(self, id_or_name: str) -> ModelPassport | None:
        """Return the model with that id, else the active one with that name or alias; None if there is none."""
        return self._models.get(id_or_name) or self._models.get(self._model_ids_by_name.get(id_or_name, ""))

    def get_model(self, id_or_name: str) -> ModelPassport:
        """Return the model with that id, name or alias.

        Raises:
            ModelNotFound: there is no such model.
        """
        if (model := self.find_model(id_or_name)) is None:
            raise ModelNotFound(id_or_name)
        return model

    def models_newest_first(self) -> list[ModelPassport]:
        """Return every model that is not revoked, newest first; models of the same instant by id."""
        if self._models_newest_first is None:
            by_id = sorted(self._models.values(), key=lambda model: model.id)
            self._models_newest_first = sorted(by_id, key=lambda model: model.record.created_at, reverse=True)
        return self._models_newest_first

    def candidates(self, model: ModelPassport, now: datetime) -> Iterator[NodeState]:
        """Return nodes for `has_available_compute` to judge: the freshest node of each class that may be available.

        Nodes are looked up one at a time, when the engine asks for the next.
        """
        return self._index.candidates(model.record.id, now)

    def serving_candidates(self, model: ModelPassport, now: datetime) -> Iterator[NodeState]:
        """Return those `candidates` that declare or report the model, for `has_serving_compute` to judge."""
        return self._index.serving_candidates(model.record.id, now)

    def ring_of(self, model: ModelPassport) -> NodeRing:
        """Return the nodes that the gateway may consider for the model, fresh or not.

        They fit the model, declare or report it, and were healthy, active and not draining at their newest heartbeat.
        """
        return self._index.ring_of(model.id)

    def remove_from_rings(self, node: FleetNode) -> None:
        """Remove a node that has become silent from every ring, until its next heartbeat."""
        self._index.set_unhealthy(node, node.capability_class)

    def summarise_reasons(self, model: ModelPassport, now: datetime) -> dict[str, int]:
        """Return how many nodes have each reason against the model; it costs the same however many nodes there are."""
        return self._reasons.summary(model, now)

    def class_count(self) -> int:
        """Return the number of capability classes."""
        return len(self._index)

    # --- full loads

    def begin_load(self) -> None:
        """Begin a full load: its rows replace all that the fleet has now, whatever their revisions say.

        What this replica writes while the load runs is newer, and stays.
        """
        self._unconfirmed = _Unconfirmed({*self._nodes, *self._models}, set(self._nodes), set(self._nodes))
        self.secrets.begin_load()
        for node in self._nodes.values():
            if node.self_drain is not None:  # its snapshot may be another database's
                node.self_drain = self.replicas.checkpoint()

    def load_receipt(self, passport_id: str, receipt: Receipt) -> None:
        """Apply a heartbeat of a full load.

        If the fleet has a newer one, the database has lost it after it was acknowledged. The node did send it, so it
        stays until the node's next one.
        """
        node = self._nodes.get(passport_id)
        held = node.state.last_heartbeat if node else None
        if passport_id in self._unconfirmed.receipts and held is not None and held.received_at > receipt.received_at:
            receipt = held._replace(revision=receipt.revision)
        self.apply_receipt(passport_id, receipt)

    def end_load(self, present_ids: Collection[str]) -> None:
        """Forget the nodes and models of before that were not in the load. Those that were made meanwhile stay."""
        unconfirmed, self._unconfirmed = self._unconfirmed, _Unconfirmed(set(), set(), set())
        for passport_id in unconfirmed.passports.difference(present_ids):
            if (node := self._nodes.get(passport_id)) is not None:
                self.forget_node(node)
            elif (model := self._models.get(passport_id)) is not None:
                self._drop_model(model)
                self.secrets.forget(model.id)
        for passport_id in unconfirmed.receipts:  # the database has no heartbeat of these: the next one is the first
            node = self._nodes.get(passport_id)
            if node is not None and (held := node.state.last_heartbeat) is not None:
                node.state = node.state._replace(last_heartbeat=held._replace(revision=0))

    def clip(self, node: FleetNode, now: datetime) -> None:
        """Let no heartbeat of the node be later than `now`: the database's clock stepped back since it came."""
        receipt = node.state.last_heartbeat
        if receipt is not None and receipt.received_at > now:
            node.state = node.state._replace(last_heartbeat=clipped(receipt, now))
            node.age = self._ages.move(node.age, now)
            self._update_health(node)

    # --- removals

    def forget_node(self, node: FleetNode) -> None:
        """Remove a node that ended long ago."""
        self.changes += 1
        self.secrets.forget(node.record.id)
        self._reasons.remove(node.capability_class.key, node.state)
        if node.age is not None:
            self._ages.leave(node.age)
        self._index.leave(node, node.capability_class)
        del self._nodes[node.record.id]
        of_owner = self._nodes_by_owner[node.record.owner]
        del of_owner[node.record.id]
        if not of_owner:
            del self._nodes_by_owner[node.record.owner]

    # --- inside

    def _apply_compute(self, record: Passport) -> None:
        node = self._nodes.get(record.id)
        if node is None:
            self.changes += 1
            state = self._with_reach(NodeState(ComputePassport.read(record)))
            node = FleetNode(state, self._index.join(state))
            self._reasons.add(node.capability_class.key, state)
            self._nodes[record.id] = self._nodes_by_owner.setdefault(record.owner, {})[record.id] = node
        elif record.revision > node.record.revision or record.id in self._unconfirmed.passports:
            self._unconfirmed.passports.discard(record.id)
            self._replace(node, self._with_reach(node.state._replace(passport=ComputePassport.read(record))))
        if record.has_ended:
            self.secrets.apply(record.id, record.revision, {})

    def _apply_model(self, record: Passport) -> None:
        current = self._models.get(record.id)
        if current is not None:
            if current.record.revision >= record.revision and record.id not in self._unconfirmed.passports:
                return
            self._unconfirmed.passports.discard(record.id)
            self._drop_model(current)
        if record.status is PassportStatus.REVOKED:
            self.secrets.forget(record.id)
            return
        self.changes += 1
        self._models_newest_first = None
        model = self._models[record.id] = ModelPassport.read(record)
        self._model_ids_by_name.update(dict.fromkeys(model.known_as[1:], record.id))
        self._index.put_model(model)

    def _drop_model(self, model: ModelPassport) -> None:
        self.changes += 1
        self._models_newest_first = None
        del self._models[model.id]
        self._index.drop_model(model.id)
        for name in model.known_as[1:]:
            if self._model_ids_by_name.get(name) == model.id:
                del self._model_ids_by_name[name]

    def _with_reach(self, state: NodeState) -> NodeState:
        """Return the state with whether this replica can send the node requests."""
        return state._replace(is_connected=not state.passport.is_outbound or state.id in self._connected)

    def _replace(self, node: FleetNode, state: NodeState) -> None:
        """Replace the node's state, and its class if the matching engine reads anything else in the new state."""
        self.changes += 1
        self._reasons.remove(node.capability_class.key, node.state)
        node.state = state
        if self._index.key_of(state) != node.capability_class.key:
            self._index.leave(node, node.capability_class)
            node.capability_class = self._index.join(state)
        self._reasons.add(node.capability_class.key, state)
        self._update_health(node)

    def _update_health(self, node: FleetNode) -> None:
        state = node.state
        if state.last_heartbeat is not None and is_healthy(state, state.last_heartbeat.received_at):
            self._index.set_healthy(node, node.capability_class, state.last_heartbeat.received_at)
        else:
            self._index.set_unhealthy(node, node.capability_class)


def clipped(receipt: Receipt, now: datetime) -> Receipt:
    """Return the heartbeat, received at `now` at the latest."""
    if receipt.received_at <= now:
        return receipt
    up_since = None if receipt.up_since is None else min(receipt.up_since, now)
    return receipt._replace(received_at=now, up_since=up_since)


def _looks_alike(old: Heartbeat, new: Heartbeat) -> bool:
    """Return whether the matching engine reads the same in both heartbeats, except health."""
    if old.available_models != new.available_models:
        return False
    before, now = old.runtime, new.runtime  # most have none, and models of Pydantic take long to compare
    return before is now or (before is not None and now is not None and before.name == now.name)


def _update_self_drain(node: FleetNode, receipt: Receipt, replicas: Replicas) -> None:
    if receipt.heartbeat.status is not ReportedStatus.DRAINING:
        node.self_drain = None
    elif node.self_drain is None:
        node.self_drain = replicas.checkpoint()
