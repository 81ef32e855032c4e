"""Requests in flight: this replica's own counts, those in other leases, and those published between two leases."""

from __future__ import annotations

from datetime import datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.replicas import LEASE, ReplicaRecord, Replicas, Snapshot
from tests.factories import NOW, compute_passport, receipt

EVERYTHING = Snapshot.parse("1000:1000:")


def lease(
    in_flight: dict[str, int] | None = None, *, at: datetime = NOW, applied: Snapshot = EVERYTHING
) -> ReplicaRecord:
    """Another replica's lease."""
    return ReplicaRecord("other", NOW, at, at, applied, in_flight or {})


def seconds(count: float) -> datetime:
    """That long after noon."""
    return NOW + timedelta(seconds=count)


def everyone(_: str) -> bool:
    """Count every node as relevant."""
    return True


def test_requests_are_counted_from_begin_to_end_and_a_node_without_any_is_not_kept() -> None:
    """An end too many does no harm."""
    replicas = Replicas()
    for _ in range(2):
        replicas.begin("a")
    replicas.begin("b")
    assert (replicas.in_flight("a"), replicas.in_flight("b"), replicas.in_flight("c")) == (2, 1, 0)
    for node in ("a", "b", "b", "c"):
        replicas.end(node)
    assert replicas.own_in_flight == {"a": 1}
    replicas.end("a")
    assert replicas.own_in_flight == {}
    assert replicas.counts_for_lease() == {}


def test_alone_there_is_no_news() -> None:
    """No other replica is there to receive them."""
    replicas = Replicas()
    replicas.begin("a")
    replicas.end("a")
    assert not replicas.has_changed.is_set()
    assert replicas.pop_changed_counts(10, everyone) == {}


def test_news_are_what_changed_since_it_was_told() -> None:
    """By the lease or by an earlier update; a count that changed back in between is left out."""
    replicas = Replicas()
    replicas.begin("before")
    replicas.apply("own", [lease()], NOW - LEASE)
    assert replicas.counts_for_lease() == {"before": 1}
    replicas.begin("a")
    replicas.begin("unlimited")
    replicas.begin("brief")
    replicas.end("brief")
    replicas.end("before")
    assert replicas.has_changed.is_set()
    assert replicas.pop_changed_counts(10, lambda node: node != "unlimited") == {"a": 1, "before": 0}
    assert not replicas.has_changed.is_set()
    replicas.begin("a")
    replicas.end("a")
    assert replicas.pop_changed_counts(10, everyone) == {}
    for node in "abc":
        replicas.begin(node)
    assert replicas.pop_changed_counts(2, everyone) == {"a": 2, "b": 1}
    assert replicas.has_changed.is_set()
    assert replicas.pop_changed_counts(2, everyone) == {"c": 1}


def test_news_are_newer_than_the_lease_before_and_older_than_the_next() -> None:
    """Whichever arrives first; counts of a replica that is not known to be alive are ignored."""
    replicas = Replicas()
    replicas.apply_counts("other", seconds(1), {"a": 9})
    assert replicas.in_flight("a") == 0
    replicas.apply("own", [lease({"a": 2, "b": 1})], NOW - LEASE)
    replicas.apply_counts("other", seconds(-0.1), {"a": 9})
    assert replicas.in_flight("a") == 2
    replicas.apply_counts("other", seconds(0.2), {"a": 5, "c": 1})
    replicas.apply_counts("other", seconds(0.1), {"a": 9, "b": 0})
    assert [replicas.in_flight(node) for node in "abc"] == [5, 0, 1]
    replicas.apply("own", [lease({"a": 2, "b": 1})], NOW - LEASE)  # read again: it is the one from before
    assert [replicas.in_flight(node) for node in "abc"] == [5, 0, 1]
    replicas.apply("own", [lease({"a": 3}, at=seconds(0.15))], NOW - LEASE)
    assert [replicas.in_flight(node) for node in "abc"] == [5, 0, 1]
    replicas.apply("own", [lease({"a": 4}, at=seconds(1))], NOW - LEASE)
    assert [replicas.in_flight(node) for node in "abc"] == [4, 0, 0]
    replicas.apply("own", [], NOW - LEASE)
    assert [replicas.in_flight(node) for node in "abc"] == [0, 0, 0]


def test_late_news_do_not_make_a_node_drained() -> None:
    """A lease has counts from after a drain was applied; an update from before it may arrive after it."""
    replicas = Replicas()
    replicas.apply("own", [lease({"a": 1})], NOW - LEASE)
    replicas.apply_counts("other", seconds(0.2), {"a": 0})
    assert replicas.in_flight("a") == 0
    assert not replicas.are_idle_on("a")
    replicas.apply("own", [lease(at=seconds(1))], NOW - LEASE)
    assert replicas.are_idle_on("a")
    replicas.apply_counts("other", seconds(1.2), {"a": 1})
    assert not replicas.are_idle_on("a")
    replicas.apply_counts("other", seconds(1.3), {"a": 0})
    assert replicas.are_idle_on("a")


@given(*(st.tuples(st.integers(1, 12), st.integers(0, 8), st.sets(st.integers(1, 20))) for _ in range(2)))
def test_a_snapshot_covers_another_when_it_sees_all_that_the_other_sees(
    one: tuple[int, int, set[int]], two: tuple[int, int, set[int]]
) -> None:
    """By its definition, transaction by transaction."""

    def build(xmin: int, more: int, running: set[int]) -> Snapshot:
        return Snapshot(xmin, xmin + more, frozenset(xid for xid in running if xmin <= xid < xmin + more))

    first, second = build(*one), build(*two)
    sees_as_much = all(xid in first for xid in range(30) if xid in second)
    assert first.covers(second) is (first.xmax >= second.xmax and sees_as_much)


def test_a_nodes_own_drain_is_done_when_every_replica_has_read_what_this_one_had() -> None:
    """The read that ran while the heartbeat was committed may have begun before it: the one after it counts."""
    fleet, record = Fleet(), compute_passport()
    fleet.apply_passport(record)
    node = fleet.get_node(record.id, owner=None)
    fleet.apply_receipt(record.id, receipt(status="draining"))
    assert fleet.is_drained(node), "alone, there is nobody to wait for"
    other = lease(applied=Snapshot.parse("100:105:100,102"))
    fleet.replicas.apply("own", [other], NOW - LEASE)
    assert not fleet.is_drained(node)
    fleet.replicas.record_read(Snapshot.parse("90:95:"))
    assert not fleet.is_drained(node)
    fleet.replicas.record_read(Snapshot.parse("102:106:103"))
    for applied, is_drained in (
        ("100:105:100,102", False),
        ("100:106:100", False),
        ("103:106:103", True),
        ("200:200:", True),
    ):
        fleet.replicas.apply("own", [lease(applied=Snapshot.parse(applied))], NOW - LEASE)
        assert fleet.is_drained(node) is is_drained, applied
    fleet.replicas.apply("own", [lease({record.id: 1}, applied=Snapshot.parse("200:200:"))], NOW - LEASE)
    assert not fleet.is_drained(node)
