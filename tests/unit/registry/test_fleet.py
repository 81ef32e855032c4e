"""The fleet against the engine: after any sequence of events, the index and the engine over every node agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from lucid_compute.errors import ModelNotFound, NodeDeregistered, NodeNotFound
from lucid_compute.registry.domain.node_state import DeclaredModel, NodeState, Receipt, ReportedStatus
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport, PassportStatus, PassportType
from lucid_compute.registry.fleet.capability_index import CapabilityIndex
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode, Lifecycle
from lucid_compute.registry.fleet.node_ring import place_of
from lucid_compute.registry.fleet.replicas import LEASE, ReplicaRecord, Snapshot
from lucid_compute.registry.matching_engine import (
    fit_reasons,
    has_available_compute,
    has_serving_compute,
    is_available_on,
    is_healthy,
    rejection_reasons,
    serves,
)
from tests.factories import NOW, compute_passport, passport, receipt
from tests.small_fleets import SmallFleet
from tests.work import calls_of, lines_of

NAMES = ["a", "b", "c"]
RUNTIMES = st.sampled_from([["vllm"], ["ollama"], []])
METADATA = st.fixed_dictionaries(
    {"vram": st.sampled_from([24, 80]), "runtimes": RUNTIMES, "maxContext": st.sampled_from([None, 4096])}
)
MODELS = st.fixed_dictionaries(
    {
        "format": st.sampled_from(["safetensors", "gguf", "api"]),
        "minVramGb": st.sampled_from([None, 40, {"fp16": 80, "q4": 20}]),
        "contextLength": st.sampled_from([None, 4096, 8192]),
        "aliases": st.sampled_from([[], ["b"], ["c"]]),
    }
)
DECLARED = st.lists(
    st.builds(
        DeclaredModel, st.sampled_from(NAMES), st.sampled_from([None, 2048, 8192]), st.sampled_from([None, "fp16"])
    ),
    max_size=2,
)


class FleetMachine(RuleBasedStateMachine):
    """Registers, sends heartbeats, drains, declares, revokes and waits at random; the engine judges every node."""

    def __init__(self) -> None:
        super().__init__()
        self.fleet = Fleet()
        self.now: datetime = NOW
        self.revision = 1
        self.records: dict[str, Any] = {}
        self.node_ids: list[str] = []
        self.model_ids: list[str] = []
        self.passed_over: set[str] = set()

    def _next(self) -> int:
        self.revision += 1
        return self.revision

    def _put(self, record: Any) -> None:
        self.records[record.id] = record
        self.fleet.apply_passport(record)

    @rule(metadata=METADATA)
    def register(self, metadata: dict[str, Any]) -> None:
        self._put(compute_passport(metadata, id=f"node-{self.revision:04}", name="n", revision=self._next()))
        self.node_ids.append(next(reversed(self.records)))

    @rule(metadata=MODELS, name=st.sampled_from(NAMES))
    def add_model(self, metadata: dict[str, Any], name: str) -> None:
        taken = {n for model in self.fleet.models_newest_first() for n in model.known_as}
        if not taken & {name, *metadata["aliases"]}:
            identity = {"id": f"model-{self.revision:04}", "name": name, "revision": self._next()}
            self._put(passport(PassportType.MODEL, metadata, **identity))
            self.model_ids.append(next(reversed(self.records)))

    @precondition(lambda self: self.node_ids)
    @rule(data=st.data(), late=st.sampled_from([0, 0, 0, 10, 29, 31]), reported=st.sets(st.sampled_from(NAMES)))
    def beat(self, data: st.DataObject, late: int, reported: set[str]) -> None:
        node_id = data.draw(st.sampled_from(self.node_ids))
        status = data.draw(st.sampled_from(["healthy", "healthy", "unhealthy", "draining"]))
        runtime = data.draw(st.sampled_from([None, {"name": "vllm"}]))
        beat: dict[str, Any] = {
            "passport_id": node_id,
            "status": status,
            "availableModels": sorted(reported),
            "runtime": runtime,
        }
        self.fleet.apply_receipt(node_id, receipt(age_seconds=late, now=self.now, revision=self._next(), **beat))
        self.passed_over.discard(node_id)

    @precondition(lambda self: self.node_ids)
    @rule(data=st.data(), declared=DECLARED, drains=st.booleans())
    def operate(self, data: st.DataObject, declared: list[DeclaredModel], drains: bool) -> None:
        node_id = data.draw(st.sampled_from(self.node_ids))
        since = self.now if drains else None
        models = {model.id: model for model in declared}
        self.fleet.apply_lifecycle(Lifecycle(node_id, models, since, 1 if drains else None, "healthy", self._next()))

    @precondition(lambda self: self.records)
    @rule(data=st.data(), status=st.sampled_from(list(PassportStatus)))
    def change_status(self, data: st.DataObject, status: PassportStatus) -> None:
        record = data.draw(st.sampled_from([self.records[key] for key in sorted(self.records)]))
        if record.status is not PassportStatus.REVOKED and not (
            record.type is PassportType.MODEL and status == "active"
        ):
            self._put(replace(record, status=status, revision=self._next()))

    @precondition(lambda self: self.node_ids)
    @rule(data=st.data(), metadata=METADATA)
    def change_hardware(self, data: st.DataObject, metadata: dict[str, Any]) -> None:
        record = self.records[data.draw(st.sampled_from(self.node_ids))]
        self._put(replace(record, metadata={**record.metadata, **metadata}, revision=self._next()))

    @precondition(lambda self: self.model_ids)
    @rule(data=st.data(), metadata=MODELS)
    def change_model(self, data: st.DataObject, metadata: dict[str, Any]) -> None:
        record = self.records[data.draw(st.sampled_from(self.model_ids))]
        others = {n for model in self.fleet.models_newest_first() if model.id != record.id for n in model.known_as}
        if record.status is PassportStatus.ACTIVE and not others & {*metadata["aliases"]}:
            self._put(replace(record, metadata=metadata, revision=self._next()))

    @precondition(lambda self: self.node_ids)
    @rule(data=st.data(), forgets=st.booleans())
    def deregister(self, data: st.DataObject, forgets: bool) -> None:
        node_id = data.draw(st.sampled_from(self.node_ids))
        self._put(replace(self.records[node_id], deregistered_at=self.now, revision=self._next()))
        if forgets:
            self.fleet.forget_node(self.fleet.get_node(node_id, owner=None))
            self.node_ids.remove(node_id)
            del self.records[node_id]

    @rule(seconds=st.sampled_from([1, 10, 30, 31, 121]))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule()
    def pass_over_the_dead(self) -> None:
        live_since = self.fleet.live_since(self.now)
        for node in self.fleet.nodes():
            if not node.state.is_live(live_since):
                self.fleet.remove_from_rings(node)
                self.passed_over.add(node.state.id)

    @rule(seconds=st.sampled_from([1, 31]))
    def set_the_clock_back(self, seconds: int) -> None:
        self.now -= timedelta(seconds=seconds)
        for node in self.fleet.nodes():
            self.fleet.clip(node, self.now)
            self.passed_over.discard(node.state.id)

    @invariant()
    def the_index_says_what_every_node_would(self) -> None:
        nodes = [node.state for node in self.fleet.nodes()]
        for model in self.fleet.models_newest_first():
            expected = has_available_compute(model, nodes, self.now)
            assert is_available(self.fleet, model, self.now) is expected
            serving = [node for node in nodes if serves(model, node)]
            assert is_served(self.fleet, model, self.now) is has_available_compute(model, serving, self.now)

    @invariant()
    def the_candidates_are_the_freshest_available_node_of_each_kind_and_no_others(self) -> None:
        """The engine would hide a candidate too many, and one too few wherever another is left."""
        nodes = [node.state for node in self.fleet.nodes()]
        for model in self.fleet.models_newest_first():
            available = [node for node in nodes if is_available_on(model, node, self.now)]
            serving = [node for node in available if serves(model, node)]
            for candidates, expected in (
                (self.fleet.candidates(model, self.now), available),
                (self.fleet.serving_candidates(model, self.now), serving),
            ):
                found = list(candidates)
                assert _newest_by_kind(found) == _newest_by_kind(expected)
                assert len(found) == len(_newest_by_kind(found))

    @invariant()
    def the_reasons_are_counted_as_a_walk_over_all_nodes_counts_them(self) -> None:
        """At any instant: clocks are set back too."""
        nodes = [node.state for node in self.fleet.nodes()]
        for model in self.fleet.models_newest_first():
            judged = nodes if model.format is not ModelFormat.API else []
            for now in (
                self.now,
                *(self.now + timedelta(seconds=seconds) for seconds in (-40, -1, 29.995, 30, 31, 9000)),
            ):
                walked = Counter(reason.code.value for node in judged for reason in rejection_reasons(model, node, now))
                assert self.fleet.summarise_reasons(model, now) == walked

    @invariant()
    def rings_hold_the_nodes_that_fit_serve_and_are_healthy_if_fresh(self) -> None:
        """A dead node that was removed from the rings may be missing, until its next heartbeat."""
        nodes = list(self.fleet.nodes())
        for model in self.fleet.models_newest_first():
            ring = self.fleet.ring_of(model)
            expected = {node.state.id for node in nodes if _belongs_on_ring(model, node.state)}
            assert expected - self.passed_over <= set(ring.all()) <= expected
            assert ring.all() == sorted(ring.all(), key=lambda node_id: (place_of(node_id), node_id))
            assert len(ring) == len(set(ring.all()))
            for node in nodes:
                is_on_ring = node.state.id in set(ring.all())
                assert (node.state.id in ring) is is_on_ring
                assert node.capability_class.has_on_ring(node, model.id) is is_on_ring


def is_available(fleet: Fleet, model: ModelPassport, now: datetime) -> bool:
    """Return whether the model can be run, as every reader asks."""
    return has_available_compute(model, fleet.candidates(model, now), now)


def is_served(fleet: Fleet, model: ModelPassport, now: datetime) -> bool:
    """Return whether the model is served, as every reader asks."""
    return has_serving_compute(model, fleet.serving_candidates(model, now), now)


def _newest_by_kind(nodes: list[NodeState]) -> dict[object, datetime]:
    newest: dict[object, datetime] = {}
    for node in nodes:
        assert node.last_heartbeat is not None
        kind = CapabilityIndex.key_of(node)
        newest[kind] = max(newest.get(kind, node.last_heartbeat.received_at), node.last_heartbeat.received_at)
    return newest


def _belongs_on_ring(model: ModelPassport, state: NodeState) -> bool:
    was_healthy = state.last_heartbeat is not None and is_healthy(state, state.last_heartbeat.received_at)
    return was_healthy and serves(model, state) and not fit_reasons(model, state)


TestFleetAgainstEngine = FleetMachine.TestCase
TestFleetAgainstEngine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_an_older_sight_of_a_row_changes_nothing() -> None:
    """The feed and the registry may apply changes of one row in any order."""
    fleet, record = Fleet(), compute_passport(revision=5)
    fleet.apply_passport(record)
    fleet.apply_receipt(record.id, receipt(revision=7, load=0.7))
    fleet.apply_receipt(record.id, receipt(revision=6, load=0.1))
    fleet.apply_lifecycle(Lifecycle(record.id, {}, NOW, 10, "draining", 3))
    fleet.apply_lifecycle(Lifecycle(record.id, {}, None, None, "healthy", 2))
    state = fleet.get_node(record.id, owner=None).state
    assert state.last_heartbeat is not None
    assert state.last_heartbeat.heartbeat.load == 0.7
    assert state.draining_since == NOW


def test_another_owners_node_is_not_there() -> None:
    """A tenant can't tell a foreign node from none."""
    fleet, record = Fleet(), compute_passport(owner="acme")
    fleet.apply_passport(record)
    assert fleet.get_node(record.id, owner="acme").record == record
    with pytest.raises(NodeNotFound):
        fleet.get_node(record.id, owner="other")
    with pytest.raises(NodeNotFound):
        fleet.get_node("none", owner=None)


def test_an_ended_node_is_gone_for_good() -> None:
    """Revoked and deregistered nodes are refused with 410."""
    fleet = Fleet()
    for changes in ({"deregistered_at": NOW}, {"status": PassportStatus.REVOKED}):
        record = compute_passport(**changes)
        fleet.apply_passport(record)
        with pytest.raises(NodeDeregistered):
            fleet.get_registered_node(record.id, owner=None)


def test_ids_resolve_before_names() -> None:
    """A model that is named like another's id does not hide it."""
    fleet = Fleet()
    first = passport(PassportType.MODEL, {"format": "api"}, name="first")
    second = passport(PassportType.MODEL, {"format": "api"}, name=first.id)
    fleet.apply_passport(first)
    fleet.apply_passport(second)
    assert fleet.get_model(first.id).record.name == "first"
    with pytest.raises(ModelNotFound):
        fleet.get_model("First")


def test_a_drain_is_done_when_every_live_replica_has_applied_it_and_runs_nothing() -> None:
    """A replica that is behind, or still runs a request there, holds `drained` back; a dead one does not."""
    fleet, record = Fleet(), compute_passport()
    fleet.apply_passport(record)
    fleet.apply_lifecycle(Lifecycle(record.id, {}, NOW, 100, "draining", 1))
    node = fleet.get_node(record.id, owner=None)

    def other(applied: str, in_flight: dict[str, int], age_seconds: float = 0) -> ReplicaRecord:
        seen_at = NOW - timedelta(seconds=age_seconds)
        return ReplicaRecord("other", NOW, seen_at, NOW, Snapshot.parse(applied), in_flight)

    assert fleet.is_drained(node)
    for lease, expected in [
        (other("90:100:", {}), False),
        (other("90:101:100", {}), False),
        (other("101:101:", {}), True),
        (other("101:101:", {record.id: 2}), False),
        (other("90:100:", {record.id: 2}, age_seconds=11), True),
    ]:
        fleet.replicas.apply("own", [lease], NOW - LEASE)
        assert fleet.is_drained(node) is expected
    fleet.replicas.begin(record.id)
    assert fleet.in_flight(record.id) == 1
    assert not fleet.is_drained(node)


def test_a_heartbeat_that_arrives_late_does_not_hide_a_fresher_one() -> None:
    """Two alike nodes: the older heartbeat, applied last, leaves the class as fresh as the newer one made it."""
    fleet = Fleet()
    wanted = passport(PassportType.MODEL, {"format": "safetensors"})
    fleet.apply_passport(wanted)
    first, second = compute_passport(), compute_passport()
    for record, age in ((first, 0), (second, 20)):
        fleet.apply_passport(record)
        fleet.apply_receipt(record.id, receipt(age_seconds=age))
    model = fleet.get_model(wanted.id)
    assert is_available(fleet, model, NOW + timedelta(seconds=30))
    fleet.apply_passport(replace(first, status=PassportStatus.DEPRECATED, revision=2))
    assert is_available(fleet, model, NOW + timedelta(seconds=10))
    assert not is_available(fleet, model, NOW + timedelta(seconds=11))


def test_a_heartbeat_that_a_clock_set_back_made_older_is_counted_as_that_old() -> None:
    """The node's next heartbeat replaces it, as any other."""
    fleet, record = Fleet(), compute_passport({"runtimes": ["vllm"]})
    wanted = passport(PassportType.MODEL, {"format": "safetensors"})
    fleet.apply_passport(wanted)
    fleet.apply_passport(record)
    fleet.apply_receipt(record.id, receipt(revision=1))
    model, now = fleet.get_model(wanted.id), NOW - timedelta(seconds=60)
    fleet.clip(fleet.get_node(record.id, owner=None), now)
    assert fleet.summarise_reasons(model, now) == {}
    assert fleet.summarise_reasons(model, now + timedelta(seconds=31)) == {"HEARTBEAT_STALE": 1}
    fleet.apply_receipt(record.id, receipt(revision=2, now=now + timedelta(seconds=40)))
    assert fleet.summarise_reasons(model, now + timedelta(seconds=41)) == {}


@pytest.mark.parametrize("status", ["healthy", "unhealthy"])
def test_a_heartbeat_that_changes_only_the_time_is_not_judged_again(status: str) -> None:
    """It makes less than half of the calls of one with another status."""
    small = SmallFleet()
    node = small.add_node("node-1", status=status)
    small.wait(1)
    steady = _calls_of_a_heartbeat(small, node, status)
    small.wait(1)
    assert steady < _calls_of_a_heartbeat(small, node, "draining") / 2


def _calls_of_a_heartbeat(small: SmallFleet, node: FleetNode, status: str) -> int:
    previous = node.state.last_heartbeat
    assert previous is not None
    heartbeat = previous.heartbeat.model_copy(update={"status": ReportedStatus(status)})
    newest = Receipt(heartbeat, small.now, previous.up_since, previous.revision + 1)
    return calls_of(partial(small.fleet.apply_receipt, node.state.id, newest))


def test_a_runtime_that_a_heartbeat_names_counts_at_once() -> None:
    """The class follows the report, also when nothing else in it changed."""
    fleet = Fleet()
    wanted = passport(PassportType.MODEL, {"format": "safetensors"})
    record = compute_passport({"runtimes": []})
    fleet.apply_passport(wanted)
    fleet.apply_passport(record)
    for revision, runtime, expected in ((1, None, False), (2, {"name": "vllm"}, True), (3, {"name": "ollama"}, False)):
        fleet.apply_receipt(record.id, receipt(revision=revision, runtime=runtime))
        assert is_available(fleet, fleet.get_model(wanted.id), NOW) is expected


def test_a_model_that_comes_after_a_kind_of_node_is_gone_does_not_fit_its_successor() -> None:
    """A class's place is used again; a model registered in between must not take the new class for the old."""
    fleet = Fleet()
    first, second = compute_passport({"vram": 80}), compute_passport({"vram": 80})
    fleet.apply_passport(first)
    fleet.apply_passport(second)
    fleet.apply_lifecycle(Lifecycle(second.id, {"other": DeclaredModel("other")}, None, None, "healthy", 1))
    fleet.apply_lifecycle(Lifecycle(second.id, {}, None, None, "healthy", 2))
    small = compute_passport({"vram": 4})
    fleet.apply_passport(small)
    fleet.apply_receipt(small.id, receipt())
    wanted = passport(PassportType.MODEL, {"format": "safetensors", "minVramGb": 40})
    fleet.apply_passport(wanted)
    assert not is_available(fleet, fleet.get_model(wanted.id), NOW)


def test_a_node_of_a_new_kind_costs_the_same_whatever_kinds_and_models_there_are() -> None:
    """Each node names a model of its own, as one with its own LoRA does: no other model and no other kind is judged."""
    costs = [_cost_of_a_kind(models, kinds) for models, kinds in ((10, 10), (200, 10), (10, 200))]
    assert costs == costs[:1] * 3


def _cost_of_a_kind(models: int, kinds: int) -> int:
    fleet = Fleet()
    for number in range(models):
        record = passport(PassportType.MODEL, {"format": "safetensors"}, id=f"model-{number}", name=f"model-{number}")
        fleet.apply_passport(record)
    for number in range(kinds):
        _add_kind(fleet, number)
    return lines_of(partial(_add_kind, fleet, kinds))


def _add_kind(fleet: Fleet, number: int) -> None:
    record = compute_passport(id=f"node-{number}")
    fleet.apply_passport(record)
    declared = {"model-1": DeclaredModel("model-1"), f"lora-{number}": DeclaredModel(f"lora-{number}")}
    fleet.apply_lifecycle(Lifecycle(record.id, declared, None, None, "registered", 1))
    fleet.apply_receipt(record.id, receipt())
