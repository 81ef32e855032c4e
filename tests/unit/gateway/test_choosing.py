"""Choosing a node where few will do: the dead, the silent, the one of many, and those that leave meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from lucid_compute.registry.domain.passports import PassportStatus
from lucid_compute.registry.fleet.fleet import FleetNode, Lifecycle
from lucid_compute.registry.fleet.node_ring import place_of
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from tests.factories import NOW
from tests.small_fleets import SmallFleet


async def test_a_dead_node_leaves_the_ring_when_it_is_met_and_comes_back_with_its_next_heartbeat() -> None:
    """However many died, a few choices later only the living are looked at."""
    fleet = SmallFleet()
    alive = fleet.add_node()
    dead = fleet.add_nodes(200, age_seconds=121)
    ring = fleet.fleet.ring_of(fleet.model)
    assert len(ring) == 201
    for _ in range(40):
        chosen = await fleet.choose(fleet.criteria())
        assert chosen is alive
    assert len(ring) < 20
    fleet.beat(dead[0].state.id)
    assert dead[0].state.id in ring
    assert {await fleet.choose(fleet.criteria()) for _ in range(60)} == {alive, dead[0]}


async def test_a_node_that_is_merely_silent_stays_on_the_ring() -> None:
    """At 120 s it may still serve, and a hundredth later it may not."""
    fleet = SmallFleet()
    node = fleet.add_node()
    fleet.wait(120)
    assert await fleet.choose(fleet.criteria()) is node
    fleet.wait(0.001)
    assert await fleet.choose(fleet.criteria()) is None
    assert len(fleet.fleet.ring_of(fleet.model)) == 0
    fleet.beat(node.state.id)
    assert await fleet.choose(fleet.criteria()) is node


def test_a_few_looks_are_enough_when_every_node_is_silent() -> None:
    """As when Postgres is down: no fresh one exists, so none has to be looked for."""
    fleet = SmallFleet()
    fleet.add_nodes(300)
    fleet.wait(31)
    assert fleet.dispatcher.find_quickly(fleet.criteria(), fleet.now) is not None
    assert fleet.dispatcher.find_quickly(fleet.criteria(session="acme one"), fleet.now) is not None
    assert fleet.dispatcher.find_quickly(fleet.criteria(RoutingPolicy(route_stale=False)), fleet.now) is None


async def test_the_one_node_of_many_that_will_do_is_found() -> None:
    """One of 1,200 is in the region; one of 1,200 is fresh; the one that is named is looked at alone."""
    fleet = SmallFleet()
    nodes = fleet.add_nodes(1199, metadata={"region": "us"}, age_seconds=60)
    only = fleet.add_node(metadata={"region": "eu"})
    for policy in (RoutingPolicy(allow_regions=frozenset({"eu"})), NO_POLICY, RoutingPolicy(route_stale=False)):
        assert await fleet.choose(fleet.criteria(policy)) is only
    named = RoutingPolicy(node_ids=frozenset({nodes[7].state.id, "unknown"}))
    assert fleet.dispatcher.find_quickly(fleet.criteria(named), fleet.now) is nodes[7]
    fleet.fleet.replicas.begin(only.state.id)
    full = fleet.add_node(metadata={"region": "asia", "maxConcurrency": 1})
    fleet.fleet.replicas.begin(full.state.id)
    assert await fleet.choose(fleet.criteria(RoutingPolicy(allow_regions=frozenset({"asia"})))) is None


async def test_a_drain_while_many_nodes_are_looked_at_is_not_missed() -> None:
    """The search gives way to other requests: a node that left in the meantime is not chosen."""
    fleet = SmallFleet()
    fleet.add_nodes(1100, metadata={"region": "us"}, age_seconds=60)
    eu = RoutingPolicy(allow_regions=frozenset({"eu"}))
    for age in (0, 60):
        only = fleet.add_node(metadata={"region": "eu"}, age_seconds=age)
        session = next(name for name in map(str, range(1000)) if _position(fleet, only, name) > 600)
        search = asyncio.create_task(fleet.dispatcher.find(fleet.criteria(eu, session=session), fleet.now))
        await asyncio.sleep(0)
        assert not search.done()
        fleet.fleet.apply_lifecycle(Lifecycle(only.state.id, {}, NOW, 1, "draining", 1))
        assert await search is None


def _position(fleet: SmallFleet, node: FleetNode, session: str) -> int:
    ring = fleet.fleet.ring_of(fleet.model)
    return ring.onward_from(place_of(session), len(ring)).index(node.state.id)


async def test_a_model_that_is_gone_has_no_node() -> None:
    """It was revoked between two attempts."""
    fleet = SmallFleet()
    fleet.add_node()
    criteria = fleet.criteria()
    record = criteria.model.record
    fleet.fleet.apply_passport(replace(record, status=PassportStatus.REVOKED, revision=record.revision + 1))
    assert await fleet.choose(criteria) is None


async def test_the_node_that_is_blocked_for_the_shortest_time_serves_when_the_others_are_gone() -> None:
    """Two of four were blocked, and the other two left: half of what is left may be blocked, and not all of it."""
    fleet = SmallFleet()
    first, second, *others = fleet.add_nodes(4)
    for node in (first, second):
        for _ in range(5):
            fleet.fail(node)
        fleet.clock.pass_seconds(5)
    assert {await fleet.choose(fleet.criteria()) for _ in range(50)} == set(others)
    for node in others:
        fleet.fleet.replicas.begin(node.state.id)
        fleet.fleet.apply_lifecycle(Lifecycle(node.state.id, {}, NOW, 1, "draining", 1))
    assert await fleet.choose(fleet.criteria()) is first
    criteria = fleet.criteria()
    criteria.tried = {first.state.id}
    assert await fleet.choose(criteria) is second
    fleet.clock.pass_seconds(21)
    assert fleet.dispatcher.find_quickly(fleet.criteria(), fleet.now) is first


async def test_a_node_that_fails_at_once_does_not_draw_every_request_to_it() -> None:
    """Nothing is ever in flight there, so it would seem the idlest; for a second after a failure it is the last choice.

    Its breaker may not open here, since one of the three is blocked already.
    """
    fleet = SmallFleet()
    blocked, failing, busy = fleet.add_nodes(3)
    for _ in range(5):
        fleet.fail(blocked)
    for _ in range(100):
        fleet.fleet.replicas.begin(busy.state.id)
    assert await fleet.choose(fleet.criteria()) is failing
    fleet.fail(failing)
    assert {await fleet.choose(fleet.criteria()) for _ in range(50)} == {busy}
    fleet.clock.pass_seconds(1)
    assert await fleet.choose(fleet.criteria()) is failing
    fleet.fail(failing)
    criteria = fleet.criteria()
    criteria.tried = {busy.state.id}
    assert await fleet.choose(criteria) is failing
    fleet.stats.record_success(failing.state.id)
    assert await fleet.choose(fleet.criteria()) is failing


async def test_half_of_the_nodes_stay_blocked_while_the_others_are_only_busy() -> None:
    """A full node is not a node that went away."""
    fleet = SmallFleet()
    first, second = fleet.add_nodes(2, metadata={"maxConcurrency": 1})
    for _ in range(5):
        fleet.fail(first)
    fleet.fleet.replicas.begin(second.state.id)
    assert await fleet.choose(fleet.criteria()) is None
    fleet.fleet.replicas.end(second.state.id)
    assert await fleet.choose(fleet.criteria()) is second


async def test_a_model_that_changed_lets_go_of_the_nodes_that_no_longer_fit() -> None:
    """Also where the request names them; and it has them again when it changes back."""
    fleet = SmallFleet()
    node = fleet.add_node()
    record = fleet.model.record
    named = RoutingPolicy(node_ids=frozenset({node.state.id}))
    for revision, minimum_gb, expected in ((2, 200, None), (3, 40, node), (4, 200, None)):
        changed = replace(record, metadata={**record.metadata, "minVramGb": minimum_gb}, revision=revision)
        fleet.fleet.apply_passport(changed)
        assert node.capability_class.has_on_ring(node, record.id) is (expected is not None)
        for policy in (NO_POLICY, named):
            assert await fleet.choose(fleet.criteria(policy)) is expected
