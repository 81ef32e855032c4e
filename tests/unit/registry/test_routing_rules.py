"""The rules of routing: who may be given a request now, why not, under which name, and how long it would wait there."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.errors import Shortage
from lucid_compute.gateway.node_stats import UNMEASURED_MS
from lucid_compute.gateway.ranking import rank
from lucid_compute.registry.domain.node_state import DeclaredModel, NodeState
from lucid_compute.registry.domain.passports import PassportStatus
from lucid_compute.registry.fleet.fleet import Lifecycle
from lucid_compute.registry.matching_engine import is_available_on, serves
from lucid_compute.registry.routing_rules import (
    ASSUMED_CONCURRENCY,
    NO_POLICY,
    NodeUsage,
    RoutingPolicy,
    id_on_node,
    routing_reasons,
    stretch_of,
    suits,
)
from tests.factories import NOW, model, node
from tests.small_fleets import SmallFleet

LIVE_SINCE = NOW - timedelta(seconds=120)
MODEL = model({"aliases": ["alias"]}, name="name", id="the-models-id")


def codes(
    state: NodeState, usage: NodeUsage | None = None, policy: RoutingPolicy = NO_POLICY, wanted: Any = MODEL
) -> list[str]:
    """What speaks against the node, by code."""
    reasons = routing_reasons(wanted, state, usage or NodeUsage(), policy, now=NOW, live_since=LIVE_SINCE)
    assert all(reason.message.endswith(".") for reason in reasons)
    return [reason.code.value for reason in reasons]


def serving(metadata: dict[str, Any] | None = None, **changes: Any) -> NodeState:
    """A node that declares the model."""
    return node(metadata, declared=[DeclaredModel("name")], **changes)


@pytest.mark.parametrize(
    ("age_seconds", "may_be_silent", "expected"),
    [
        (30, True, []),
        (30.001, True, []),
        (120, True, []),
        (30.001, False, ["HEARTBEAT_STALE"]),
        (120.001, True, ["HEARTBEAT_STALE"]),
        (None, True, ["HEARTBEAT_MISSING"]),
    ],
)
def test_a_silent_node_may_serve_for_two_minutes_if_the_policy_allows(
    age_seconds: float | None, may_be_silent: bool, expected: list[str]
) -> None:
    """The bounds are inclusive."""
    assert codes(serving(age_seconds=age_seconds), policy=RoutingPolicy(route_stale=may_be_silent)) == expected


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        (serving(), []),
        (node(beat={"availableModels": ["alias"]}), []),
        (node(), ["MODEL_NOT_SERVED"]),
        (serving({"runtimes": ["ollama"]}), ["RUNTIME_MISMATCH"]),
        (serving(draining_since=NOW), ["DRAINING"]),
        (serving(beat={"status": "draining"}), ["DRAINING"]),
        (serving(beat={"status": "unhealthy"}), ["REPORTED_UNHEALTHY"]),
        (serving(deregistered_at=NOW), ["DEREGISTERED"]),
        (serving(status=PassportStatus.DEPRECATED), ["PASSPORT_INACTIVE"]),
    ],
)
def test_what_a_node_is_and_says_decides_first(state: NodeState, expected: list[str]) -> None:
    """Each rule of availability holds here too, and the node has to name the model."""
    assert codes(state) == expected


@pytest.mark.parametrize(
    ("usage", "policy", "expected"),
    [
        (NodeUsage(in_flight=1), {}, []),
        (NodeUsage(in_flight=2), {}, ["AT_CAPACITY"]),
        (NodeUsage(full_seconds=0.5), {}, ["AT_CAPACITY"]),
        (NodeUsage(blocked_seconds=29.2), {}, ["BREAKER_OPEN"]),
        (NodeUsage(lacks="responses"), {}, ["MODEL_NOT_SERVED"]),
        (NodeUsage(), {"allow_regions": frozenset({"eu", "us"})}, []),
        (NodeUsage(), {"allow_regions": frozenset({"us"})}, ["REGION_NOT_ALLOWED"]),
        (NodeUsage(), {"allow_regions": frozenset()}, ["REGION_NOT_ALLOWED"]),
        (NodeUsage(), {"max_price_per_1k_tokens": Decimal("0.002")}, []),
        (NodeUsage(), {"max_price_per_1k_tokens": Decimal("0.0019")}, ["PRICE_TOO_HIGH"]),
        (NodeUsage(latency_ms=100.0), {"max_latency_ms": 100.0}, []),
        (NodeUsage(latency_ms=100.1), {"max_latency_ms": 100.0}, ["LATENCY_TOO_HIGH"]),
        (NodeUsage(), {"max_latency_ms": 100.0}, []),
        (NodeUsage(), {"node_ids": frozenset({"this"})}, []),
        (NodeUsage(), {"node_ids": frozenset({"that"})}, ["MODEL_NOT_SERVED"]),
        (NodeUsage(5, 1.0), {"allow_regions": frozenset()}, ["AT_CAPACITY", "BREAKER_OPEN", "REGION_NOT_ALLOWED"]),
    ],
)
def test_what_a_replica_knows_and_a_request_asks_decide_then(
    usage: NodeUsage, policy: dict[str, Any], expected: list[str]
) -> None:
    """Two at a time, in the eu, at 0.002 USD."""
    metadata = {"maxConcurrency": 2, "region": "eu", "pricePer1kTokens": "0.002"}
    assert codes(serving(metadata, id="this"), usage, RoutingPolicy(**policy)) == expected


def test_what_is_not_known_of_a_node_does_not_speak_against_it_but_for_its_region() -> None:
    """It may name no price and no limit, and nobody has measured it; a node of no region is in none."""
    asks = RoutingPolicy(max_price_per_1k_tokens=Decimal(0), max_latency_ms=0.0)
    assert codes(serving(), NodeUsage(in_flight=10_000), asks) == []
    assert codes(serving(), policy=RoutingPolicy(allow_regions=frozenset({"eu"}))) == ["REGION_NOT_ALLOWED"]


@pytest.mark.parametrize(("most", "expected"), [("0.009", ["PRICE_TOO_HIGH"]), ("0.01", [])])
@pytest.mark.parametrize("key", ["name", "alias", "the-models-id"])
def test_a_limit_is_held_against_the_dearest_token_of_the_model(key: str, most: str, expected: list[str]) -> None:
    """Whatever a request is made of, it never costs more than it allows; other models' prices are no matter."""
    prices = {
        "other": {"inputPer1kTokens": "9", "outputPer1kTokens": "9"},
        key: {"inputPer1kTokens": "0.001", "outputPer1kTokens": "0.01"},
    }
    state = serving({"pricePer1kTokens": "5", "prices": prices})
    assert codes(state, policy=RoutingPolicy(max_price_per_1k_tokens=Decimal(most))) == expected


@given(
    metadata=st.fixed_dictionaries(
        {
            "region": st.sampled_from([None, "eu"]),
            "pricePer1kTokens": st.sampled_from([None, "0.001", "1"]),
            "prices": st.sampled_from([None, {"name": {"inputPer1kTokens": "0", "outputPer1kTokens": "0.02"}}]),
        }
    ),
    latency_ms=st.sampled_from([None, 1.0, 100.0]),
    policy=st.builds(
        RoutingPolicy,
        st.sampled_from([None, frozenset({"eu"}), frozenset({"us"})]),
        st.sampled_from([None, Decimal("0.01")]),
        st.sampled_from([None, 10.0]),
        st.sampled_from([None, frozenset({"this"}), frozenset({"that"})]),
    ),
)
def test_a_policy_suits_exactly_when_there_is_no_reason_against_it(
    metadata: dict[str, Any], latency_ms: float | None, policy: RoutingPolicy
) -> None:
    """The quick question and the one with reasons have one answer."""
    state = serving(metadata, id="this")
    assert suits(MODEL, state, latency_ms, policy) is not bool(codes(state, NodeUsage(latency_ms=latency_ms), policy))


def test_a_fresh_node_without_a_wish_may_serve_exactly_when_the_engine_says_so_and_it_names_the_model() -> None:
    """Nothing here decides again what the matching engine has decided."""
    for runtimes in ([], ["vllm"], ["ollama"]):
        for declared in ([], [DeclaredModel("name", max_tokens=10)], [DeclaredModel("alias")]):
            for beat in ({}, {"availableModels": ["name"]}, {"status": "unhealthy"}):
                for wanted in (MODEL, model({"contextLength": 100, "minVramGb": 81}, name="name")):
                    state = node({"runtimes": runtimes}, declared=declared, beat=beat)
                    allowed = is_available_on(wanted, state, NOW) and serves(wanted, state)
                    assert (codes(state, wanted=wanted) == []) is allowed


@pytest.mark.parametrize(
    ("declared", "reported", "expected"),
    [
        (["alias"], ["name"], "alias"),
        (["other"], ["alias"], "alias"),
        ([], ["other", "alias", "name"], "name"),
        (["alias", "name"], [], "name"),
        ([], [], "name"),
        ([MODEL.id], ["name"], MODEL.id),
    ],
)
def test_a_node_is_asked_for_the_model_as_it_names_it(declared: list[str], reported: list[str], expected: str) -> None:
    """As it declares it, else as it reports it; by id before name before alias."""
    state = node(declared=[DeclaredModel(name) for name in declared], beat={"availableModels": reported})
    assert id_on_node(MODEL, state) == expected


@pytest.mark.parametrize(
    ("metadata", "beat", "idle", "each"),
    [
        ({}, {"load": 0.0, "queueDepth": 0}, 1.0, 1 / ASSUMED_CONCURRENCY),
        ({}, {"load": None, "queueDepth": None}, 1.0, 1 / ASSUMED_CONCURRENCY),
        ({"maxConcurrency": 4}, {"load": 0.0, "queueDepth": 2}, 1.5, 0.25),
        ({"maxConcurrency": 4}, {"load": 1.0, "queueDepth": 2}, 3.0, 0.5),
    ],
)
def test_a_latency_is_stretched_by_load_and_by_what_runs_for_each_place(
    metadata: dict[str, Any], beat: dict[str, Any], idle: float, each: float
) -> None:
    """A node that names no limit is taken to have eight places; unknown is no burden."""
    assert stretch_of(node(metadata, beat=beat)) == pytest.approx((idle, each))
    assert stretch_of(node(age_seconds=None)).idle == 1.0


async def test_a_ranking_says_of_every_node_what_the_rules_say() -> None:
    """Fresh ones first and the least wait first; the others with their reasons, those that name the model first."""
    fleet = SmallFleet()
    elsewhere = fleet.add_node(serves=())
    slow, quick = fleet.add_node(load=1.0), fleet.add_node(load=0.1)
    silent = fleet.add_node(age_seconds=60)
    draining, dead = fleet.add_node(), fleet.add_node(age_seconds=130)
    fleet.fleet.apply_lifecycle(Lifecycle(draining.state.id, {}, NOW, 1, "draining", 1))
    fleet.stats.record_full(dead.state.id, 5)
    ranking = await rank(fleet.fleet, fleet.dispatcher, fleet.criteria(), fleet.now)
    assert [ranked.node for ranked in ranking.shortlist] == [quick, slow, silent]
    assert [ranked.is_fresh for ranked in ranking.shortlist] == [True, True, False]
    assert ranking.shortlist[0].wait_ms == pytest.approx(UNMEASURED_MS * 1.1)
    reasons = {each: [reason.code.value for reason in why] for each, why in ranking.rejected}
    assert reasons == {
        draining: ["DRAINING"],
        dead: ["HEARTBEAT_STALE", "AT_CAPACITY"],
        elsewhere: ["MODEL_NOT_SERVED"],
    }
    assert ranking.rejected[-1][0] is elsewhere
    assert ranking.rejections == Counter(DRAINING=1, HEARTBEAT_STALE=1, AT_CAPACITY=1, MODEL_NOT_SERVED=1)


async def test_a_shortage_is_called_by_how_near_the_nearest_node_came() -> None:
    """A busy node that suits the request comes nearer than a free one that does not; each step is by a nearer node."""
    fleet = SmallFleet()

    async def shortage(**policy: Any) -> Shortage:
        return (await rank(fleet.fleet, fleet.dispatcher, fleet.criteria(RoutingPolicy(**policy)), fleet.now)).shortage

    assert await shortage() is Shortage.NO_NODE
    fleet.add_node(serves=())
    assert await shortage() is Shortage.NO_NODE
    assert await shortage(node_ids=frozenset({"another"})) is Shortage.NO_NODE_SUITS
    fleet.add_node(metadata={"region": "eu"})
    assert await shortage(allow_regions=frozenset({"us"})) is Shortage.NO_NODE_SUITS
    fleet.add_node(metadata={"region": "us"}, status="unhealthy")
    assert await shortage(allow_regions=frozenset({"us"})) is Shortage.NO_HEALTHY_NODE
    failing = fleet.add_node(metadata={"region": "us"})
    while not fleet.fail(failing):
        pass
    assert await shortage(allow_regions=frozenset({"us"})) is Shortage.NODES_FAILING
    busy = fleet.add_node(metadata={"region": "us"})
    fleet.stats.record_full(busy.state.id, 5)
    assert await shortage(allow_regions=frozenset({"us"})) is Shortage.NODES_BUSY


async def test_a_ranking_lists_a_hundred_and_counts_all() -> None:
    """However many nodes there are."""
    fleet = SmallFleet()
    fleet.add_nodes(150)
    fleet.add_nodes(1200, serves=())
    ranking = await rank(fleet.fleet, fleet.dispatcher, fleet.criteria(), fleet.now)
    assert len(ranking.shortlist) == len(ranking.rejected) == 100
    assert ranking.rejections == {"MODEL_NOT_SERVED": 1200}
