"""Full loads: what the database has replaces what was held, whatever the revisions say; own writes meanwhile stay."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from lucid_compute.errors import Unauthorized
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.domain.node_state import DeclaredModel, Receipt
from lucid_compute.registry.domain.passports import Passport, PassportType
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode, Lifecycle
from lucid_compute.registry.fleet.key_ring import KeyRecord, KeyRing, Secret, digest_of, make_secret
from lucid_compute.registry.fleet.replicas import LEASE, ReplicaRecord, Snapshot
from tests.factories import NOW, compute_passport, passport, receipt


def lifecycle(node_id: str, revision: int, **changes: Any) -> Lifecycle:
    """What an operator set for the node."""
    fields = {"declared": {}, "draining_since": None, "drain_xid": None, "recorded_state": "healthy", **changes}
    return Lifecycle(passport_id=node_id, revision=revision, **fields)


def fleet_with(record: Passport, lifecycle: Lifecycle, receipt: Receipt) -> tuple[Fleet, FleetNode]:
    """A fleet of one node."""
    fleet = Fleet()
    fleet.apply_passport(record)
    fleet.apply_lifecycle(lifecycle)
    fleet.apply_receipt(record.id, receipt)
    return fleet, fleet.get_node(record.id, owner=None)


def test_what_the_database_lost_is_gone_and_what_it_has_counts() -> None:
    """Lost were an edit, a declaration, a drain, a secret and an end: each row is older than the held one."""
    record = compute_passport({"region": "old"}, revision=3)
    ended = replace(record, metadata={**record.metadata, "region": "lost"}, deregistered_at=NOW, revision=9)
    declared = {"lost": DeclaredModel("lost")}
    drained = lifecycle(record.id, 9, declared=declared, draining_since=NOW, drain_xid=900)
    fleet, node = fleet_with(ended, drained, receipt(revision=40))
    fleet.secrets.apply(record.id, 9, {"inferenceKey": "lost"})

    fleet.begin_load()
    fleet.apply_passport(record)
    fleet.secrets.apply(record.id, 3, {"inferenceKey": "kept"})
    fleet.apply_lifecycle(lifecycle(record.id, 2, declared={"kept": DeclaredModel("kept")}))
    fleet.load_receipt(record.id, receipt(age_seconds=40, revision=7))
    fleet.end_load({record.id})

    assert node.record == record
    assert fleet.secrets.of(record.id) == {"inferenceKey": "kept"}
    assert set(node.state.declared) == {"kept"}
    assert (node.state.draining_since, node.drain_xid) == (None, None)


def test_the_next_heartbeat_counts_at_once() -> None:
    """Its revision is far below that of the lost ones."""
    record = compute_passport()
    fleet, node = fleet_with(record, lifecycle(record.id, 1), receipt(revision=40))
    fleet.begin_load()
    fleet.load_receipt(record.id, receipt(age_seconds=40, revision=7))
    fleet.end_load({record.id})
    after = receipt(now=NOW + timedelta(seconds=5), revision=8, load=0.9)
    fleet.apply_receipt(record.id, after)
    assert node.state.last_heartbeat == after


def test_a_heartbeat_that_was_acknowledged_and_lost_was_still_heard() -> None:
    """So no node is called silent for what the database lost. An older heartbeat in memory gives way."""
    record = compute_passport()
    fleet, node = fleet_with(record, lifecycle(record.id, 1), receipt(age_seconds=3, revision=40, load=0.9))
    fleet.begin_load()
    fleet.load_receipt(record.id, receipt(age_seconds=200, revision=7))
    fleet.end_load({record.id})
    held = node.state.last_heartbeat
    assert held is not None
    assert (held.received_at, held.heartbeat.load) == (NOW - timedelta(seconds=3), 0.9)
    fleet.begin_load()
    loaded = receipt(age_seconds=1, revision=3)
    fleet.load_receipt(record.id, loaded)
    fleet.end_load({record.id})
    assert node.state.last_heartbeat == loaded


def test_the_first_heartbeat_of_a_node_whose_heartbeats_were_all_lost_counts() -> None:
    """The load has no heartbeat of it; the next one has revision 1."""
    record = compute_passport()
    fleet, node = fleet_with(record, lifecycle(record.id, 1), receipt(revision=4))
    fleet.begin_load()
    fleet.apply_passport(record)
    fleet.end_load({record.id})
    first = receipt(now=NOW + timedelta(seconds=1), revision=1)
    fleet.apply_receipt(record.id, first)
    assert node.state.last_heartbeat == first


def test_what_this_replica_writes_while_the_load_runs_stays() -> None:
    """The load's rows are from before it, also when they come later; revisions decide between the two as always."""
    record = compute_passport({"region": "old"}, revision=3)
    fleet, node = fleet_with(record, lifecycle(record.id, 3), receipt(revision=3))
    fleet.begin_load()
    own = receipt(now=NOW + timedelta(seconds=1), revision=4)
    edited = replace(record, description="edited", revision=4)
    fleet.apply_passport(edited)
    fleet.secrets.apply(record.id, 4, {"inferenceKey": "own"})
    fleet.apply_lifecycle(lifecycle(record.id, 4, draining_since=NOW))
    fleet.apply_receipt(record.id, own)

    fleet.apply_passport(record)
    fleet.secrets.apply(record.id, 3, {})
    fleet.apply_lifecycle(lifecycle(record.id, 3))
    fleet.load_receipt(record.id, receipt(revision=3))
    fleet.end_load({record.id})
    assert (node.record, node.state.draining_since, node.state.last_heartbeat) == (edited, NOW, own)
    assert fleet.secrets.of(record.id) == {"inferenceKey": "own"}


def test_nodes_and_models_that_the_load_lacks_go_except_new_ones() -> None:
    """A name that a lost model had is free for the model that has it in the database."""
    lost, present, unreadable, made = (compute_passport() for _ in range(4))
    lost_model, kept_model = (passport(PassportType.MODEL, {"format": "api"}, name="m") for _ in range(2))
    fleet = Fleet()
    for record in (lost, present, unreadable, lost_model):
        fleet.apply_passport(record)
    fleet.begin_load()
    fleet.apply_passport(made)
    fleet.apply_passport(present)
    fleet.apply_passport(kept_model)
    fleet.end_load({present.id, unreadable.id, kept_model.id})
    assert {node.record.id for node in fleet.nodes()} == {present.id, unreadable.id, made.id}
    assert [model.id for model in fleet.models_newest_first()] == [kept_model.id]
    assert fleet.get_model("m").id == kept_model.id


def test_a_load_that_was_broken_off_is_begun_again() -> None:
    """What the first one brought is replaced too."""
    record = compute_passport(revision=3)
    fleet, node = fleet_with(record, lifecycle(record.id, 1), receipt())
    for revision in (2, 1):
        fleet.begin_load()
        fleet.apply_passport(replace(record, revision=revision))
    fleet.end_load({record.id})
    assert node.record.revision == 1


def test_outside_a_load_an_older_row_is_ignored() -> None:
    """As the feed may deliver one after this replica's own write."""
    record = compute_passport(revision=3)
    fleet, node = fleet_with(record, lifecycle(record.id, 3), receipt(revision=3))
    fleet.begin_load()
    fleet.end_load({record.id})
    fleet.apply_passport(replace(record, revision=2))
    fleet.apply_lifecycle(lifecycle(record.id, 2, draining_since=NOW))
    assert (node.record, node.state.draining_since) == (record, None)


def test_a_nodes_own_drain_waits_for_snapshots_of_the_new_database() -> None:
    """What had committed when it began is named by transactions that are not those of this database."""
    record = compute_passport()
    fleet = Fleet()
    fleet.apply_passport(record)
    own = fleet.replicas
    own.record_read(Snapshot.parse("900:900:"))
    own.record_read(Snapshot.parse("900:900:"))
    fleet.apply_receipt(record.id, receipt(status="draining"))
    node = fleet.get_node(record.id, owner=None)
    for _ in range(2):
        own.record_read(Snapshot.parse("901:901:"))
    other = ReplicaRecord("other", NOW, NOW, NOW, Snapshot.parse("110:110:"), {})
    own.apply("own", [other], NOW - LEASE)
    assert not fleet.is_drained(node)
    fleet.begin_load()
    fleet.end_load({record.id})
    for _ in range(3):
        own.record_read(Snapshot.parse("100:100:"))
    assert fleet.is_drained(node)


def test_a_heartbeat_of_a_time_that_has_not_come_is_of_now() -> None:
    """The clock stepped back: a node that dies now is stale in 30 s, not after the step."""
    record = compute_passport()
    fleet, node = fleet_with(record, lifecycle(record.id, 1), receipt(age_seconds=-3600))
    fleet.clip(node, NOW)
    assert node.state.is_fresh(NOW + timedelta(seconds=30))
    assert not node.state.is_fresh(NOW + timedelta(seconds=31))
    before = node.state.last_heartbeat
    fleet.clip(node, NOW + timedelta(seconds=1))
    assert node.state.last_heartbeat == before


def key(secret: Secret, revision: int, **changes: Any) -> KeyRecord:
    """A key as stored."""
    fields = {
        "owner": "olga",
        "scopes": frozenset({Scope.ADMIN}),
        "passport_id": None,
        "former_digest": None,
        "former_valid_until": None,
        "expires_at": None,
        "revoked_at": None,
        "is_bootstrap": False,
        "limits": None,
        **changes,
    }
    return KeyRecord(id=secret.key_id, digest=digest_of(secret.text), revision=revision, **fields)


def test_keys_that_the_database_lost_are_refused_and_those_made_meanwhile_are_not() -> None:
    """Also when they were used before, and so are cached, and when the lost one was the bootstrap key."""
    lost, rotated, unreadable, made, boot = (make_secret() for _ in range(5))
    ring = KeyRing()
    ring.synced_at = NOW
    ring.apply([key(lost, 1), key(rotated, 9, owner="lost"), key(unreadable, 1), key(boot, 1, is_bootstrap=True)])
    for secret in (lost, rotated, boot):
        ring.authenticate(secret.text, NOW)
    ring.begin_load()
    ring.apply([key(made, 1)])
    ring.apply([key(rotated, 2, owner="kept")])
    for secret in (lost, boot):
        ring.authenticate(secret.text, NOW)  # and cached, a moment before the load ends
    ring.end_load({rotated.key_id, unreadable.key_id})
    assert ring.authenticate(rotated.text, NOW).owner == "kept"
    assert ring.authenticate(made.text, NOW).owner == "olga"
    assert ring.is_valid(unreadable.key_id, NOW)
    for secret in (lost, boot):
        assert not ring.is_valid(secret.key_id, NOW)
        with pytest.raises(Unauthorized):
            ring.authenticate(secret.text, NOW)
    ring.apply([key(rotated, 1, owner="older")])
    assert ring.authenticate(rotated.text, NOW).owner == "kept"
