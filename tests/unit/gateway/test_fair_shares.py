"""Who gets how much: equal nodes the same, slow ones less, none nothing, and no two replicas run for the same one.

Draws are seeded, or so many that the bounds are seven standard deviations away.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.registry.fleet.fleet import FleetNode
from tests.small_fleets import SmallFleet


def choose(fleet: SmallFleet) -> FleetNode:
    """Choose a node for a request without a wish."""
    node = fleet.dispatcher.find_quickly(fleet.criteria(), fleet.now)
    assert node is not None
    return node


def serve(fleet: SmallFleet, latency_ms: dict[str, float], count: int) -> Counter[str]:
    """Send requests one after another, each answered after its node's latency."""
    served: Counter[str] = Counter()
    for _ in range(count):
        node_id = choose(fleet).state.id
        served[node_id] += 1
        fleet.stats.record_latency(node_id, fleet.criteria().kind, latency_ms[node_id])
    return served


@pytest.mark.parametrize("count", [2, 5, 16, 17, 60])
def test_equal_nodes_share_evenly(count: int) -> None:
    """400 requests for each, one at a time: a tie, broken at random."""
    fleet = SmallFleet()
    fleet.add_nodes(count)
    counts = Counter(choose(fleet).state.id for _ in range(400 * count))
    assert len(counts) == count
    assert min(counts.values()) > 260
    assert max(counts.values()) < 540


@pytest.mark.parametrize("count", [4, 60])
def test_requests_under_way_are_spread_over_the_nodes(count: int) -> None:
    """Ten for each, none of which ends: nobody gets far more than its part."""
    fleet = SmallFleet()
    fleet.add_nodes(count)
    for _ in range(10 * count):
        fleet.fleet.replicas.begin(choose(fleet).state.id)
    running = fleet.fleet.replicas.own_in_flight.values()
    assert len(running) == count
    assert min(running) >= 3
    assert max(running) <= 20


def test_waits_within_a_quarter_are_a_tie_and_others_are_not() -> None:
    """A load of 0.24 is no reason to go elsewhere, and one of 0.26 is."""
    fleet = SmallFleet()
    idle, nearly, busier = (fleet.add_node(load=load) for load in (0.0, 0.24, 0.26))
    counts = Counter(choose(fleet) for _ in range(1000))
    assert set(counts) == {idle, nearly}
    assert min(counts.values()) > 380
    assert busier not in counts


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ({"load": 0.1}, {"load": 0.9}),
        ({"queueDepth": 0}, {"queueDepth": 4}),
        ({"queueDepth": 3, "metadata": {"maxConcurrency": 32}}, {"queueDepth": 3, "metadata": {"maxConcurrency": 4}}),
    ],
)
def test_load_and_queue_count_by_the_places_that_a_node_has(better: dict[str, Any], worse: dict[str, Any]) -> None:
    """What waits there is divided by how many it serves at a time."""
    fleet = SmallFleet()
    first, _ = fleet.add_node(**better), fleet.add_node(**worse)
    assert {choose(fleet) for _ in range(50)} == {first}


def test_requests_that_other_replicas_have_there_count() -> None:
    """Also those count that this replica did not send."""
    fleet = SmallFleet()
    first, second = fleet.add_nodes(2)
    for _ in range(3):
        fleet.fleet.replicas.begin(first.state.id)
    assert {choose(fleet) for _ in range(50)} == {second}


def test_a_node_twice_as_slow_gets_fewer_and_still_some() -> None:
    """Ten minutes of one request each second: it is tried again within each minute, and no more."""
    fleet = SmallFleet()
    nodes = [node.state.id for node in fleet.add_nodes(4)]
    latency_ms = {**dict.fromkeys(nodes, 50.0), nodes[0]: 100.0}
    served: Counter[str] = Counter()
    for _ in range(600):
        served += serve(fleet, latency_ms, 1)
        fleet.clock.pass_seconds(1)
    assert 8 <= served[nodes[0]] <= 60
    assert all(served[node] > 100 for node in nodes[1:])


def test_a_slow_node_takes_its_part_when_the_fast_ones_have_much_to_do() -> None:
    """Latencies 50 and 100, and requests that don't end: the slow one gets about half of what a fast one gets."""
    fleet = SmallFleet()
    nodes = [node.state.id for node in fleet.add_nodes(4)]
    for node_id in nodes:
        fleet.stats.record_latency(node_id, fleet.criteria().kind, 100.0 if node_id == nodes[0] else 50.0)
    for _ in range(400):
        fleet.fleet.replicas.begin(choose(fleet).state.id)
    running = fleet.fleet.replicas.own_in_flight
    fast = [running[node] for node in nodes[1:]]
    assert 0.3 < running[nodes[0]] / (sum(fast) / 3) < 0.8


@pytest.mark.parametrize("bad_answers", [1, 50])
def test_a_node_that_was_slow_once_has_its_full_part_again_within_two_minutes(bad_answers: int) -> None:
    """However slow it was and for how long: a minute after the last of that, one good answer clears it."""
    fleet = SmallFleet()
    nodes = [node.state.id for node in fleet.add_nodes(4)]
    for _ in range(bad_answers):
        fleet.stats.record_latency(nodes[0], fleet.criteria().kind, 30_000.0)
    latency_ms = dict.fromkeys(nodes, 50.0)
    for _ in range(120):
        serve(fleet, latency_ms, 5)
        fleet.clock.pass_seconds(1)
    counts = serve(fleet, latency_ms, 2000)
    assert counts[nodes[0]] > 350


def test_a_latency_of_long_ago_keeps_no_policy_away() -> None:
    """Only requests that mind it would measure the node again: it must not be shut out for good."""
    fleet = SmallFleet()
    node = fleet.add_node()
    criteria = fleet.criteria()
    fleet.stats.record_latency(node.state.id, criteria.kind, 900.0)
    assert fleet.dispatcher.usage_of(node, criteria).latency_ms == 900
    fleet.clock.pass_seconds(59)
    assert fleet.dispatcher.usage_of(node, criteria).latency_ms == 900
    fleet.clock.pass_seconds(2)
    assert fleet.dispatcher.usage_of(node, criteria).latency_ms is None


def test_streams_and_whole_answers_are_measured_apart() -> None:
    """A whole answer takes as long as a stream's last byte."""
    fleet = SmallFleet()
    first, second = fleet.add_nodes(2)
    fleet.stats.record_latency(first.state.id, fleet.criteria(is_stream=True).kind, 900.0)
    fleet.stats.record_latency(second.state.id, fleet.criteria(is_stream=True).kind, 10.0)
    assert {choose(fleet) for _ in range(50)} == {first, second}


def replicas(fleet: SmallFleet, count: int) -> list[Dispatcher]:
    """Replicas that know the same nodes, and not yet what the others send."""
    return [Dispatcher(fleet.fleet, FleetStats(fleet.fleet)) for _ in range(count)]


@pytest.mark.parametrize("count", [10, 100])
def test_replicas_that_choose_at_once_choose_different_nodes(count: int) -> None:
    """Two hundred of them, none knowing of another's request: a node gets its part, and few more."""
    fleet = SmallFleet()
    fleet.add_nodes(count)
    chosen = [replica.find_quickly(fleet.criteria(), fleet.now) for replica in replicas(fleet, 200)]
    assert max(Counter(chosen).values()) < 200 / count + 9 * (200 / count) ** 0.5


def test_replicas_do_not_all_run_for_the_best_of_many_nodes() -> None:
    """One of a hundred is idle: only those that happen to look at it send their request there."""
    fleet = SmallFleet()
    fleet.add_nodes(99, load=1.0)
    idle = fleet.add_node()
    chosen = [replica.find_quickly(fleet.criteria(), fleet.now) for replica in replicas(fleet, 300)]
    assert 1 <= chosen.count(idle) < 75
    assert len(set(chosen)) > 50


async def test_a_search_through_many_nodes_does_not_always_begin_at_the_same_ones() -> None:
    """One in sixty is in the region: nearly all choices look through the ring, and all those nodes get some."""
    fleet = SmallFleet()
    fleet.add_nodes(2950, metadata={"region": "us"})
    criteria = [node.state.id for node in fleet.add_nodes(50, metadata={"region": "eu"})]
    policy = fleet.criteria().policy._replace(allow_regions=frozenset({"eu"}))
    counts: Counter[str] = Counter()
    for _ in range(1500):
        node = await fleet.choose(fleet.criteria(policy))
        assert node is not None
        counts[node.state.id] += 1
    assert set(counts) == set(criteria)
    assert max(counts.values()) < 150
