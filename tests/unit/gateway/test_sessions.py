"""Sessions: the same node for the same name, on every replica, until that node goes or would make it wait too long."""

from __future__ import annotations

from collections import Counter
from itertools import product
from random import Random
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lucid_compute.gateway.dispatcher import AFFINE_SLACK_MS, AFFINE_WAIT
from lucid_compute.registry.fleet.fleet import FleetNode, Lifecycle
from lucid_compute.registry.fleet.node_ring import NEIGHBOURS
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from tests.factories import NOW
from tests.small_fleets import SmallFleet

SIZES = [2, 10, 16, 17, 100]
NAMES = [f"acme user-{number}" for number in range(100)]
EU = RoutingPolicy(allow_regions=frozenset({"eu"}))


def build(node_ids: list[str], **changes: Any) -> SmallFleet:
    """A fleet that heard of the nodes in this order."""
    fleet = SmallFleet()
    for node_id in node_ids:
        fleet.add_node(node_id, **changes)
    return fleet


def ids(count: int) -> list[str]:
    """So many ids, always the same."""
    return [f"node-{number:03}" for number in range(count)]


async def homes(fleet: SmallFleet, policy: RoutingPolicy = NO_POLICY) -> dict[str, str]:
    """Which node each session's request goes to."""
    found: dict[str, str] = {}
    for name in NAMES:
        node = await fleet.choose(fleet.criteria(policy, session=name))
        assert node is not None
        found[name] = node.state.id
    return found


@pytest.mark.parametrize("count", SIZES)
async def test_every_replica_sends_a_session_to_the_same_node(count: int) -> None:
    """In whatever order it heard of the nodes, and as often as it is asked."""
    one, other = build(ids(count)), build(ids(count)[::-1])
    first = await homes(one)
    assert first == await homes(other) == await homes(one)


@pytest.mark.parametrize(
    ("count", "seed"),
    [*product([2, 3, 5, 10, 16, 17, 100], range(10))],
)
async def test_sessions_are_spread_evenly_over_the_nodes(count: int, seed: int) -> None:
    """Hundreds for each of them, whatever their ids: none has twice its share, and on small rings none half."""
    fleet = build([str(UUID(int=Random(seed * 1000 + number).getrandbits(128))) for number in range(count)])
    counts: Counter[FleetNode | None] = Counter()
    for number in range(300 * count):
        counts[fleet.dispatcher.find_quickly(fleet.criteria(session=f"acme user-{number}"), fleet.now)] += 1
    assert max(counts.values()) < 300 * (1.35 if count <= NEIGHBOURS else 2.2)
    assert min(counts[node] for node in fleet.fleet.nodes()) > 300 * (0.7 if count <= NEIGHBOURS else 0.2)


@pytest.mark.parametrize("count", SIZES)
async def test_only_the_sessions_of_a_node_that_goes_move_and_they_come_back_with_it(count: int) -> None:
    """Drained, it takes no more; resumed, it has its sessions again.

    On larger rings about as many others move, because a node moves up among the neighbours that theirs is chosen from.
    """
    fleet = build(ids(count))
    before = await homes(fleet)
    gone = before[NAMES[0]]
    fleet.fleet.apply_lifecycle(Lifecycle(gone, {}, NOW, 1, "draining", 1))
    meanwhile = await homes(fleet)
    moved = sum(meanwhile[name] != home for name, home in before.items() if home != gone)
    assert moved <= (0 if count <= NEIGHBOURS else 3 * len(NAMES) / count)
    assert gone not in meanwhile.values()
    fleet.fleet.apply_lifecycle(Lifecycle(gone, {}, None, None, "healthy", 2))
    assert await homes(fleet) == before


@pytest.mark.parametrize("count", SIZES)
async def test_a_session_leaves_a_node_that_is_full_or_failed_it_for_the_next(count: int) -> None:
    """And all its requests go to the same other node meanwhile."""
    fleet = build(ids(count), metadata={"maxConcurrency": 1})
    home = await fleet.choose(fleet.criteria(session=NAMES[0]))
    assert home is not None
    fleet.fleet.replicas.begin(home.state.id)
    others = {await fleet.choose(fleet.criteria(session=NAMES[0])) for _ in range(20)}
    assert len(others) == 1
    assert home not in others
    fleet.fleet.replicas.end(home.state.id)
    criteria = fleet.criteria(session=NAMES[0])
    criteria.tried = {home.state.id}
    assert {await fleet.choose(criteria)} == others


@pytest.mark.parametrize("count", SIZES)
async def test_a_session_waits_up_to_twice_as_long_for_its_own_node(count: int) -> None:
    """With eight places, eight requests there double the wait, and a ninth is too much."""
    fleet = build(ids(count), metadata={"maxConcurrency": 16})
    home = await fleet.choose(fleet.criteria(session=NAMES[0]))
    assert home is not None
    for _ in range(16 - 1):
        fleet.fleet.replicas.begin(home.state.id)
        assert await fleet.choose(fleet.criteria(session=NAMES[0])) is home
    fleet.fleet.replicas.end(home.state.id)
    fleet.beat(home.state.id, load=0.2)
    assert await fleet.choose(fleet.criteria(session=NAMES[0])) is not home


@pytest.mark.parametrize("count", SIZES)
async def test_noise_of_a_few_milliseconds_moves_no_session(count: int) -> None:
    """First bytes of 2 ms here and 25 ms there are no reason to give up a warm prefix; 33 ms are."""
    fleet = build(ids(count))
    criteria = fleet.criteria(session=NAMES[0])
    home = await fleet.choose(criteria)
    assert home is not None
    for latency_ms, stays in ((25.0, True), (40.0, False)):
        fleet.stats.nodes.clear()
        for node_id in ids(count):
            fleet.stats.record_latency(node_id, criteria.kind, latency_ms if node_id == home.state.id else 2.0)
        assert (await fleet.choose(criteria) is home) is stays


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    latencies_ms=st.lists(st.floats(0.1, 1000), min_size=2, max_size=12),
    running=st.lists(st.integers(0, 20), min_size=12, max_size=12),
    name=st.sampled_from(NAMES),
)
async def test_a_session_gives_up_its_node_only_for_a_wait_that_is_much_shorter(
    latencies_ms: list[float], running: list[int], name: str
) -> None:
    """More than twice as long and more than the slack longer, whatever nodes do; and else never."""
    fleet = build(ids(len(latencies_ms)))
    criteria = fleet.criteria(session=name)
    home = await fleet.choose(criteria)
    assert home is not None
    for node_id, latency_ms, count in zip(ids(len(latencies_ms)), latencies_ms, running, strict=False):
        fleet.stats.record_latency(node_id, criteria.kind, latency_ms)
        for _ in range(count):
            fleet.fleet.replicas.begin(node_id)
    waits = {node.state.id: fleet.dispatcher.wait_ms(node, criteria) for node in fleet.fleet.nodes()}
    least = min(waits.values())
    longest = max(least * AFFINE_WAIT, least + AFFINE_SLACK_MS)
    chosen = await fleet.choose(criteria)
    assert chosen is not None
    assert (chosen is home) is (waits[home.state.id] <= longest)
    assert waits[chosen.state.id] <= longest


@pytest.mark.parametrize("count", [10, 100, 700])
async def test_a_session_stays_also_where_its_policy_suits_few(count: int) -> None:
    """Three nodes are in its region: it keeps to one of them, on every replica."""
    one, other = build(ids(count), metadata={"region": "us"}), build(ids(count)[::-1], metadata={"region": "us"})
    for fleet in (one, other):
        for number in range(3):
            fleet.add_node(f"eu-{number}", metadata={"region": "eu"})
    first = await homes(one, EU)
    assert first == await homes(other, EU) == await homes(one, EU)
    assert set(first.values()) <= {"eu-0", "eu-1", "eu-2"}
    assert len(set(first.values())) > 1
    named = RoutingPolicy(node_ids=frozenset({"eu-0", "eu-1", "node-001"}))
    assert await homes(one, named) == await homes(other, named)
    assert len(set((await homes(one, named)).values())) > 1


@pytest.mark.parametrize("count", SIZES)
async def test_sessions_stay_while_every_node_is_silent(count: int) -> None:
    """As when Postgres is down: their nodes still know their prefixes."""
    fleet = build(ids(count))
    before = await homes(fleet)
    fleet.wait(60)
    assert await homes(fleet) == before


async def test_requests_without_a_session_do_not_stick() -> None:
    """They go to any of the nodes that are as good."""
    fleet = build(ids(10))
    assert len({await fleet.choose(fleet.criteria()) for _ in range(200)}) == 10
