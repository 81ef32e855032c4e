"""Which node may get a request, and how long the request would wait there. Pure, over the matching engine.

The matching engine decides which nodes could run a model. These rules decide which of them may get this request now:
the node must name the model, be fresh (or live, if none is fresh), have capacity, and meet the request's policy.
Source: the contract's table "One clock, two questions", and the reliability page on the breaker.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from decimal import Decimal
from typing import NamedTuple

from lucid_compute.errors import Shortage, endpoint_path
from lucid_compute.registry.domain.node_state import NodeState
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.matching_engine import (
    Reason,
    ReasonCode,
    context_limit,
    declaration_of,
    fit_reasons,
    rejection_reasons,
    serves,
)
from lucid_compute.wire import write_money

TIE_SHARE = 0.25
ASSUMED_CONCURRENCY = 8  # of a node without maxConcurrency, to estimate the wait in its queue


class RoutingPolicy(NamedTuple):
    """What one request requires of its node; None requires nothing. `route_stale` allows nodes that are not fresh."""

    allow_regions: frozenset[str] | None = None
    max_price_per_1k_tokens: Decimal | None = None
    max_latency_ms: float | None = None
    node_ids: frozenset[str] | None = None
    route_stale: bool = True


NO_POLICY = RoutingPolicy()
NO_LIMIT = float("inf")
_Predicate = Callable[[ModelPassport, NodeState, float | None, RoutingPolicy], bool]
_Explanation = Callable[[ModelPassport, NodeState, float | None, RoutingPolicy], Reason]
_NEAREST_FIRST = tuple(Shortage)
_HOW_FAR = dict.fromkeys(ReasonCode, _NEAREST_FIRST.index(Shortage.NO_NODE)) | {
    code: _NEAREST_FIRST.index(shortage)
    for shortage, codes in (
        (Shortage.NODES_BUSY, (ReasonCode.AT_CAPACITY,)),
        (Shortage.NODES_FAILING, (ReasonCode.BREAKER_OPEN,)),
        (
            Shortage.NO_HEALTHY_NODE,
            (
                ReasonCode.HEARTBEAT_STALE,
                ReasonCode.HEARTBEAT_MISSING,
                ReasonCode.REPORTED_UNHEALTHY,
                ReasonCode.DRAINING,
                ReasonCode.NOT_CONNECTED,
            ),
        ),
        (
            Shortage.NO_NODE_SUITS,
            (ReasonCode.REGION_NOT_ALLOWED, ReasonCode.PRICE_TOO_HIGH, ReasonCode.LATENCY_TOO_HIGH),
        ),
    )
    for code in codes
}
FARTHEST = _HOW_FAR[ReasonCode.MODEL_NOT_SERVED]


def how_far(codes: Collection[ReasonCode]) -> int:
    """Return how far a node with these reasons is from getting the request: the index of its worst shortage."""
    return max(map(_HOW_FAR.__getitem__, codes))


def shortage_of(nearest: int, policy: RoutingPolicy) -> Shortage:
    """Return the shortage to report when `nearest` is the lowest `how_far` of all nodes."""
    shortage = _NEAREST_FIRST[nearest]
    if shortage is Shortage.NO_NODE and policy.node_ids is not None:
        return Shortage.NO_NODE_SUITS  # the request restricted the nodes itself
    return shortage


class NodeUsage(NamedTuple):
    """What a replica knows of a node apart from its heartbeats.

    - `in_flight`: its requests over all replicas.
    - `blocked_seconds`: how long the breaker stays open; 0 when it is closed.
    - `full_seconds`: for how long the node said that it is busy; 0 when it did not.
    - `latency_ms`: measured; None while no measurement is recent enough.
    - `lacks`: the endpoint of the request if the node said that it does not offer it, "" if it does not have the model.
    - `failing_seconds`: how long ago the breaker opened; 0 when it is closed.
    """

    in_flight: int = 0
    blocked_seconds: float = 0.0
    full_seconds: float = 0.0
    latency_ms: float | None = None
    lacks: str | None = None
    failing_seconds: float = 0.0


class Stretch(NamedTuple):
    """The wait on a node as a multiple of its latency: `idle` without requests of ours, and `each` more for each.

    The expected wait is `latency_ms * (idle + in_flight * each)`.
    """

    idle: float
    each: float


def id_on_node(model: ModelPassport, node: NodeState) -> str:
    """Return the model's id on the node: the declared one, else the reported one, else the model's name."""
    names = model.known_as
    for names_of_node in (node.declared, node.last_heartbeat.heartbeat.available_models if node.last_heartbeat else ()):
        if names_of_node:
            for name in names:
                if name in names_of_node:
                    return name
    return model.record.name


def limit_of(node: NodeState) -> float:
    """Return the node's limit of requests at a time by its passport; infinite when it names none."""
    return node.passport.max_concurrency or NO_LIMIT


def context_on(model: ModelPassport, node: NodeState) -> int | None:
    """Return how many tokens of context the model has on the node; None is no limit that is known."""
    return context_limit(node, declaration_of(model, node))


def is_at_capacity(limit: float, in_flight: int) -> bool:
    """Return whether a node with this limit (`limit_of`) has no capacity for another request."""
    return in_flight >= limit


def suits(model: ModelPassport, node: NodeState, latency_ms: float | None, policy: RoutingPolicy) -> bool:
    """Return whether the node meets the request's policy. Unknown values never exclude a node, except its region."""
    for holds, _ in _POLICY_RULES:  # noqa: SIM110 - hot: `all` over a generator takes longer
        if not holds(model, node, latency_ms, policy):
            return False
    return True


def routing_reasons(
    model: ModelPassport,
    node: NodeState,
    usage: NodeUsage,
    policy: RoutingPolicy,
    *,
    now: datetime,
    live_since: datetime,
    of_kind: tuple[Reason, ...] | None = None,
) -> tuple[Reason, ...]:
    """Return every failing rule for a request of the model on the node; `of_kind` are its `kind_reasons`, if known.

    A node that is live and not fresh is refused only by a policy without `route_stale`. The dispatcher prefers fresh
    nodes.
    """
    of_kind = kind_reasons(model, node) if of_kind is None else of_kind
    reasons = rejection_reasons(model, node, now, of_kind=of_kind)
    if reasons and policy.route_stale and node.is_live(live_since):
        reasons = tuple(reason for reason in reasons if reason.code is not ReasonCode.HEARTBEAT_STALE)
    by_policy = () if policy is NO_POLICY else _policy_reasons(model, node, usage.latency_ms, policy)
    return (*reasons, *_usage_reasons(model, node, usage), *by_policy)


def kind_reasons(model: ModelPassport, node: NodeState) -> tuple[Reason, ...]:
    """Return why nodes like this get no request of the model; all nodes of one capability class have the same."""
    reasons = fit_reasons(model, node)
    if serves(model, node):
        return reasons
    message = "The node neither declares nor reports this model: PUT /compute/models/{passportId}, or load it."
    return (*reasons, Reason(ReasonCode.MODEL_NOT_SERVED, message, model.record.name, sorted(node.reported_models)))


def stretch_of(node: NodeState) -> Stretch:
    """Return how much the node's reported load and its queue, per concurrent request, stretch its latency."""
    heartbeat = node.last_heartbeat.heartbeat if node.last_heartbeat else None
    waiting = (heartbeat.queue_depth or 0) if heartbeat else 0
    load = (heartbeat.load or 0.0) if heartbeat else 0.0
    concurrency = node.passport.max_concurrency or ASSUMED_CONCURRENCY
    return Stretch((1.0 + load) * (1.0 + waiting / concurrency), (1.0 + load) / concurrency)


def _usage_reasons(model: ModelPassport, node: NodeState, usage: NodeUsage) -> list[Reason]:
    reasons = []
    limit = limit_of(node)
    if is_at_capacity(limit, usage.in_flight):
        message = f"The node takes {limit} requests at a time and has {usage.in_flight}."
        reasons.append(Reason(ReasonCode.AT_CAPACITY, message, f"under {limit}", usage.in_flight))
    if usage.full_seconds > 0:
        message = f"The node answered that it is busy (429 or 503), for {usage.full_seconds:.0f} s more."
        reasons.append(Reason(ReasonCode.AT_CAPACITY, message, "not full", round(usage.full_seconds, 1)))
    if usage.lacks is not None:
        what = f"offer {endpoint_path(usage.lacks)}" if usage.lacks else "have this model"
        message = f"The node answered that it does not {what}; it is asked again within a minute."
        reasons.append(Reason(ReasonCode.MODEL_NOT_SERVED, message, usage.lacks or model.record.name, None))
    if usage.blocked_seconds > 0:
        since = f"for {usage.failing_seconds:.0f} s" if usage.failing_seconds else "again and again"
        message = f"The node has been failing {since}; it is tried again in {usage.blocked_seconds:.0f} s."
        reasons.append(Reason(ReasonCode.BREAKER_OPEN, message, "closed", round(usage.blocked_seconds, 1)))
    return reasons


def _policy_reasons(
    model: ModelPassport, node: NodeState, latency_ms: float | None, policy: RoutingPolicy
) -> list[Reason]:
    """Return why the node does not meet the policy; empty exactly when `suits` is true."""
    asked = (model, node, latency_ms, policy)
    return [explain(*asked) for holds, explain in _POLICY_RULES if not holds(*asked)]


def _is_named(_: ModelPassport, node: NodeState, __: float | None, policy: RoutingPolicy) -> bool:
    return policy.node_ids is None or node.id in policy.node_ids


def _is_in_region(_: ModelPassport, node: NodeState, __: float | None, policy: RoutingPolicy) -> bool:
    return policy.allow_regions is None or node.passport.region in policy.allow_regions


def _is_affordable(model: ModelPassport, node: NodeState, _: float | None, policy: RoutingPolicy) -> bool:
    """Return whether both prices are within the policy's limit. A node without a price is affordable."""
    if policy.max_price_per_1k_tokens is None:
        return True
    price = node.passport.price_of(model.known_as)
    return price is None or price.highest_per_1k <= policy.max_price_per_1k_tokens


def _is_quick(_: ModelPassport, __: NodeState, latency_ms: float | None, policy: RoutingPolicy) -> bool:
    return policy.max_latency_ms is None or latency_ms is None or latency_ms <= policy.max_latency_ms


def _not_named_reason(_: ModelPassport, node: NodeState, __: float | None, policy: RoutingPolicy) -> Reason:
    message = "The request names other nodes in lucid.nodeIds."
    return Reason(ReasonCode.MODEL_NOT_SERVED, message, sorted(policy.node_ids or ()), node.id)


def _region_reason(_: ModelPassport, node: NodeState, __: float | None, policy: RoutingPolicy) -> Reason:
    allowed, region = sorted(policy.allow_regions or ()), node.passport.region
    message = f"The request allows {', '.join(allowed)}; the node is in {region or 'no region'}."
    return Reason(ReasonCode.REGION_NOT_ALLOWED, message, allowed, region)


def _price_reason(model: ModelPassport, node: NodeState, _: float | None, policy: RoutingPolicy) -> Reason:
    price, most = node.passport.price_of(model.known_as), policy.max_price_per_1k_tokens
    wanted = None if most is None else write_money(most)
    found = None if price is None else write_money(price.highest_per_1k)
    message = f"The node's price is {found} USD for 1,000 tokens; the request allows {wanted}."
    return Reason(ReasonCode.PRICE_TOO_HIGH, message, wanted, found)


def _latency_reason(_: ModelPassport, __: NodeState, latency_ms: float | None, policy: RoutingPolicy) -> Reason:
    found, slowest = latency_ms or 0.0, policy.max_latency_ms or 0.0
    message = f"The node takes {found:.0f} ms to begin an answer; the request allows {slowest:.0f}."
    return Reason(ReasonCode.LATENCY_TOO_HIGH, message, policy.max_latency_ms, round(found, 1))


_POLICY_RULES: tuple[tuple[_Predicate, _Explanation], ...] = (
    (_is_named, _not_named_reason),
    (_is_in_region, _region_reason),
    (_is_affordable, _price_reason),
    (_is_quick, _latency_reason),
)
"""A policy's rules, in the order of the reasons: the predicate that must hold, and the reason when it does not."""
