"""Dispatch against the rules: whatever is known of nodes, a choice is one that they allow, and of the best kind."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from decimal import Decimal
from typing import NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lucid_compute.gateway.dispatcher import FEW
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.domain.passports import PassportStatus
from lucid_compute.registry.fleet.fleet import FleetNode, Lifecycle
from lucid_compute.registry.fleet.replicas import LEASE, ReplicaRecord, Snapshot
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy, routing_reasons
from tests.factories import NOW
from tests.small_fleets import SmallFleet

MAX_NODES = 40


class Plan(NamedTuple):
    """A node to be made: what it is, what it says, and what this replica learnt of it."""

    region: str | None
    price: str | None
    limit: int | None
    status: str
    age_seconds: float | None
    serves: bool
    ends: str | None
    in_flight: int
    elsewhere: int
    latency_ms: float | None
    latency_age: float
    trouble: str | None


def _plans(sound: int, ages: list[float | None]) -> st.SearchStrategy[Plan]:
    """Nodes that in each regard are as they should be so many times as often as in each other way."""
    return st.builds(
        Plan,
        region=st.sampled_from([None, "eu", "us"]),
        price=st.sampled_from([None, "0.001", "0.01"]),
        limit=st.sampled_from([None, None, 1, 3]),
        status=st.sampled_from(["healthy"] * sound + ["unhealthy", "draining"]),
        age_seconds=st.sampled_from(ages),
        serves=st.sampled_from([True] * sound + [False]),
        ends=st.sampled_from([None] * sound + ["drain", "deregister", "deprecate"]),
        in_flight=st.integers(0, 3),
        elsewhere=st.integers(0, 2),
        latency_ms=st.sampled_from([None, 10.0, 30.0, 500.0]),
        latency_age=st.sampled_from([0.0, 30.0, 59.0, 61.0]),
        trouble=st.sampled_from([None] * 4 + ["blocked", "blocked", "on trial", "failed once", "full", "lacks"]),
    )


PLANS = st.one_of(
    st.lists(_plans(4, [0, 0, 5, 30, 30.001, 31, 120, 120.001, 121, None]), max_size=8),
    st.lists(_plans(8, [0, 31]), max_size=4),
    st.lists(_plans(50, [0, 30, 31, 121]), min_size=24, max_size=MAX_NODES),
    st.lists(_plans(50, [31, 60, 119]), min_size=24, max_size=MAX_NODES),
)
POLICIES = st.one_of(
    st.just(NO_POLICY),
    st.just(RoutingPolicy(route_stale=False)),
    st.builds(
        RoutingPolicy,
        st.sampled_from([None, frozenset({"eu"}), frozenset({"eu", "us"}), frozenset[str]()]),
        st.sampled_from([None, Decimal("0.005")]),
        st.sampled_from([None, 100.0]),
        st.one_of(st.none(), st.frozensets(st.integers(0, MAX_NODES).map("node-{:02}".format), max_size=4)),
        st.booleans(),
    ),
)


class Request(NamedTuple):
    """A request to be made."""

    policy: RoutingPolicy
    tried: frozenset[str]
    session: str | None
    endpoint: str


REQUESTS = st.builds(
    Request,
    POLICIES,
    tried=st.frozensets(st.integers(0, MAX_NODES).map("node-{:02}".format), max_size=2),
    session=st.sampled_from([None, None, "acme one", "acme two"]),
    endpoint=st.sampled_from(["chat/completions", "responses"]),
)


def make(fleet: SmallFleet, plans: list[Plan]) -> list[FleetNode]:
    """Make the nodes; what was learnt of them long ago first."""
    for number, plan in enumerate(plans):
        metadata = {"region": plan.region, "pricePer1kTokens": plan.price, "maxConcurrency": plan.limit}
        serves = ("model",) if plan.serves else ()
        node = fleet.add_node(
            f"node-{number:02}", metadata=metadata, serves=serves, status=plan.status, age_seconds=plan.age_seconds or 0
        )
        if plan.age_seconds is None:
            node.state = node.state._replace(last_heartbeat=None)
            fleet.fleet.remove_from_rings(node)
        _end(fleet, node, plan.ends)
    for age in (61.0, 59.0, 30.0, 0.0):
        for number, plan in enumerate(plans):
            if plan.latency_age == age and plan.latency_ms is not None:
                fleet.stats.record_latency(f"node-{number:02}", fleet.criteria().kind, plan.latency_ms)
        fleet.clock.pass_seconds({61.0: 2.0, 59.0: 29.0, 30.0: 30.0, 0.0: 0.0}[age])
    for number, plan in enumerate(plans):
        _trouble(fleet, f"node-{number:02}", plan.trouble)
        for _ in range(plan.in_flight):
            fleet.fleet.replicas.begin(f"node-{number:02}")
    counts = {f"node-{number:02}": plan.elsewhere for number, plan in enumerate(plans)}
    fleet.fleet.replicas.apply(
        "own", [ReplicaRecord("other", NOW, NOW, NOW, Snapshot.parse("1:1:"), counts)], NOW - LEASE
    )
    return list(fleet.fleet.nodes())


def _end(fleet: SmallFleet, node: FleetNode, ends: str | None) -> None:
    record = node.record
    if ends == "drain":
        fleet.fleet.apply_lifecycle(Lifecycle(record.id, {}, NOW, 1, "draining", 1))
    elif ends == "deregister":
        fleet.fleet.apply_passport(replace(record, deregistered_at=NOW, revision=record.revision + 1))
    elif ends == "deprecate":
        fleet.fleet.apply_passport(replace(record, status=PassportStatus.DEPRECATED, revision=record.revision + 1))


def _trouble(fleet: SmallFleet, node_id: str, trouble: str | None) -> None:
    stats = fleet.stats
    known = stats.track(node_id)
    assert known is not None
    if trouble in {"blocked", "on trial", "failed once"}:
        known.has_doubts = True
        for _ in range(1 if trouble == "failed once" else 5):
            known.breaker.fail(
                fleet.clock.monotonic() - (31 if trouble == "on trial" else len(node_id)), lambda: True, 0
            )
        if trouble != "failed once":
            stats._open.add(node_id)
        if trouble == "on trial":
            stats.record_start(node_id)
    elif trouble == "full":
        stats.record_full(node_id, 5)
    elif trouble == "lacks":
        stats.record_lack(node_id, "responses", fleet.model.id, "")


def reasons_against(fleet: SmallFleet, node: FleetNode, criteria: Criteria) -> set[ReasonCode]:
    """What the rules say against the node."""
    live_since = fleet.fleet.live_since(fleet.now)
    usage = fleet.dispatcher.usage_of(node, criteria)
    reasons = routing_reasons(criteria.model, node.state, usage, criteria.policy, now=fleet.now, live_since=live_since)
    return {reason.code for reason in reasons}


def may_be_tried_blocked(fleet: SmallFleet, nodes: list[FleetNode], criteria: Criteria) -> set[str]:
    """The documented exception: more than half of the model's nodes are blocked, because others went away."""
    live = [node for node in nodes if not reasons_against(fleet, node, fleet.criteria()) - _OF_ITS_USE]
    blocked = [node for node in live if fleet.stats.blocked_seconds(node.state.id) > 0]
    if len(blocked) * 2 <= len(live):
        return set()
    return {
        node.state.id
        for node in blocked
        if node.state.id not in criteria.tried and reasons_against(fleet, node, criteria) == {ReasonCode.BREAKER_OPEN}
    }


_OF_ITS_USE = {ReasonCode.BREAKER_OPEN, ReasonCode.AT_CAPACITY}


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(plans=PLANS, asked=REQUESTS)
def test_a_choice_is_allowed_and_fresh_if_any_fresh_one_is(plans: list[Plan], asked: Request) -> None:
    """And there is none exactly when the rules allow none."""
    fleet = SmallFleet()
    nodes = make(fleet, plans)
    criteria = fleet.criteria(asked.policy, session=asked.session, endpoint=asked.endpoint)
    tried = criteria.tried = asked.tried
    policy = asked.policy
    allowed = [node for node in nodes if node.state.id not in tried and not reasons_against(fleet, node, criteria)]
    best = {node.state.id for node in allowed if node.state.is_fresh(fleet.now)}
    best = best or {node.state.id for node in allowed}
    exception = set() if allowed else may_be_tried_blocked(fleet, nodes, criteria)
    is_exact = len(fleet.fleet.ring_of(fleet.model)) <= FEW or policy.node_ids is not None
    for _ in range(2):
        quick = fleet.dispatcher.find_quickly(criteria, fleet.now)
        assert quick is None or quick.state.id in best
        assert quick is not None or not best or not is_exact
        full = asyncio.run(fleet.dispatcher.find(criteria, fleet.now))
        assert full.state.id in (best or exception) if full else not (best or exception)
