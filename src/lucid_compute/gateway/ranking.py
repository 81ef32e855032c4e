"""A ranking of all nodes for a request: which may serve it, best first, and why the others may not."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from heapq import nsmallest
from math import inf
from typing import NamedTuple

from lucid_compute.errors import Shortage
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.fleet.capability_index import CapabilityClass
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import Reason, ReasonCode, is_healthy
from lucid_compute.registry.routing_rules import (
    FARTHEST,
    NodeUsage,
    how_far,
    kind_reasons,
    routing_reasons,
    shortage_of,
)
from lucid_compute.web.turns import in_turns

MAX_LISTED = 100
_NODES_A_TURN = 500


class Ranked(NamedTuple):
    """A node that may serve the request, with its expected wait."""

    node: FleetNode
    wait_ms: float
    is_fresh: bool
    usage: NodeUsage


class Ranking(NamedTuple):
    """The nodes that may serve, fresh ones first, then by expected wait; and the others with every reason.

    `shortage` says why no node may serve, if none may. `busy_seconds`: when the first node that is only busy said that
    it is free; None if no node said so.
    """

    shortlist: list[Ranked]
    rejected: list[tuple[FleetNode, tuple[Reason, ...]]]
    rejections: Counter[str]
    lacking: int  # nodes that said that they do not offer the model or endpoint
    shortage: Shortage
    busy_seconds: float | None = None


async def rank(fleet: Fleet, dispatcher: Dispatcher, criteria: Criteria, now: datetime) -> Ranking:
    """Return the ranking of every node. The event loop serves other requests in between."""
    shortlist: list[Ranked] = []
    rejected: list[tuple[FleetNode, tuple[Reason, ...]]] = []
    rejections: Counter[ReasonCode] = Counter()
    lacking, nearest, busy_seconds = 0, FARTHEST, inf
    live_since = fleet.live_since(now)
    of_kinds: dict[CapabilityClass, tuple[Reason, ...]] = {}
    async for node in in_turns(fleet.nodes(), _NODES_A_TURN):
        of_kind = of_kinds.get(node.capability_class)
        if of_kind is None:
            of_kind = of_kinds[node.capability_class] = kind_reasons(criteria.model, node.state)
        usage = dispatcher.usage_of(node, criteria)
        reasons = routing_reasons(
            criteria.model, node.state, usage, criteria.policy, now=now, live_since=live_since, of_kind=of_kind
        )
        lacking += usage.lacks is not None
        if reasons:
            codes = {reason.code for reason in reasons}
            nearest = min(nearest, how_far(codes))
            rejections.update(codes)
            rejected.append((node, reasons))
            if usage.full_seconds > 0 and codes == {ReasonCode.AT_CAPACITY}:
                busy_seconds = min(busy_seconds, usage.full_seconds)
        else:
            is_fresh = is_healthy(node.state, now)  # no rule forbids it, but its heartbeat may be old
            shortlist.append(Ranked(node, dispatcher.wait_ms(node, criteria), is_fresh, usage))
    best = nsmallest(MAX_LISTED, shortlist, key=lambda ranked: (not ranked.is_fresh, ranked.wait_ms))
    worst = nsmallest(MAX_LISTED, rejected, key=_nearest_first)
    counted = Counter({code.value: count for code, count in rejections.items()})
    soonest = None if busy_seconds == inf else busy_seconds
    return Ranking(best, worst, counted, lacking, shortage_of(nearest, criteria.policy), soonest)


def narrow(ranking: Ranking, fleet: Fleet, criteria: Criteria, now: datetime) -> Ranking:
    """Return a ranking that was made without the request's policy, with the policy's reasons against its shortlist."""
    rejections, codes_of_all = Counter(ranking.rejections), list[set[ReasonCode]]()
    shortlist = []
    for ranked in ranking.shortlist:
        reasons = routing_reasons(
            criteria.model, ranked.node.state, ranked.usage, criteria.policy, now=now, live_since=fleet.live_since(now)
        )
        if reasons:
            codes_of_all.append({reason.code for reason in reasons})
            rejections.update(code.value for code in codes_of_all[-1])
        else:
            shortlist.append(ranked)
    if not codes_of_all:
        return ranking
    shortage = shortage_of(min(map(how_far, codes_of_all)), criteria.policy)
    return ranking._replace(shortlist=shortlist, rejections=rejections, shortage=shortage)


def _nearest_first(entry: tuple[FleetNode, tuple[Reason, ...]]) -> tuple[bool, bool, int]:
    """Sort nodes that name the model by how few rules they fail, then the others, then deregistered ones."""
    node, reasons = entry
    return node.record.has_ended, any(reason.code is ReasonCode.MODEL_NOT_SERVED for reason in reasons), len(reasons)
