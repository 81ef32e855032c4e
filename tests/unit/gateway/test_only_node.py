"""When the failures of a model's only node are its own, though no other node can show that."""

from __future__ import annotations

import pytest

from lucid_compute.gateway.breakers import FAILURES_TO_OPEN
from lucid_compute.gateway.node_stats import Suspicion
from lucid_compute.registry.fleet.fleet import FleetNode
from tests.small_fleets import SmallFleet

SILENT, ANSWERED = True, False


def suspect(fleet: SmallFleet, node: FleetNode, *keys: str, is_timeout: bool = ANSWERED) -> None:
    """Send a request of each key to the node, which fails it in a way that may be the request's fault."""
    for key in keys:
        number = fleet.stats.record_start(node.state.id)
        suspicion = Suspicion(fleet.model.id, key, is_timeout)
        fleet.stats.record_suspicion(node.state.id, number, suspicion=suspicion)


def opens_at_the_next_failure(fleet: SmallFleet, node: FleetNode) -> bool:
    """Return whether enough failures are counted: another node joins, and the first one fails once more."""
    fleet.add_node()
    return fleet.fail(node)


@pytest.mark.parametrize("keys", [["a", "b"] * 3, ["a"] * FAILURES_TO_OPEN + ["b"], ["b", "a", "a", "a"]])
def test_failures_at_requests_of_several_keys_are_the_only_nodes(keys: list[str]) -> None:
    """All since it last served one, also those before the second key's."""
    fleet = SmallFleet()
    node = fleet.add_node()
    suspect(fleet, node, *keys)
    assert opens_at_the_next_failure(fleet, node)


@pytest.mark.parametrize("keys", [["a"] * 20, ["a", "b", "a"]])
def test_one_key_or_too_few_requests_prove_nothing(keys: list[str]) -> None:
    """What one client asks for may be what the node can't do, however often."""
    fleet = SmallFleet()
    node = fleet.add_node()
    suspect(fleet, node, *keys)
    assert not opens_at_the_next_failure(fleet, node)


def test_a_node_that_is_silent_fails_whoever_asks() -> None:
    """A request can't ask for that."""
    fleet = SmallFleet()
    node = fleet.add_node()
    suspect(fleet, node, *["a"] * (FAILURES_TO_OPEN - 1), is_timeout=SILENT)
    assert opens_at_the_next_failure(fleet, node)


def test_a_request_that_is_served_starts_the_count_afresh() -> None:
    """Also after the node's doubts were looked through, which happens beside requests."""
    fleet = SmallFleet()
    node = fleet.add_node()
    suspect(fleet, node, *["a"] * FAILURES_TO_OPEN)
    fleet.clock.pass_seconds(5)
    fleet.stats.forget_ended()
    fleet.stats.record_success(node.state.id)
    suspect(fleet, node, "b")
    assert not opens_at_the_next_failure(fleet, node)


def test_a_node_beside_others_is_not_judged_so() -> None:
    """There the others show whose fault it is; that all fail alike is the request's."""
    fleet = SmallFleet()
    node, _ = fleet.add_nodes(2)
    suspect(fleet, node, *["a", "b"] * FAILURES_TO_OPEN)
    assert not fleet.fail(node)


def test_the_only_node_stays_open_whatever_it_fails_at() -> None:
    """Never more than half of a model's nodes are blocked: the next request may be the one that works again."""
    fleet = SmallFleet()
    node = fleet.add_node()
    suspect(fleet, node, *["a", "b"] * FAILURES_TO_OPEN)
    assert not fleet.fail(node)
    assert fleet.stats.blocked_seconds(node.state.id) == 0
    assert fleet.stats.open_count() == 0
