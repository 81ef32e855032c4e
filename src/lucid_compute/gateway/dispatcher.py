"""Choosing a node: of those that may serve a request, the one with the least expected wait.

`routing_rules` decides which nodes may serve. This file adds what one replica measured (latencies, breakers, requests
in flight) and inspects as few nodes as possible. A model's ring holds nodes that fit, name it and were healthy, so only
what changes quickly is checked here: is the heartbeat fresh, has the node room, does it suit the request.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from random import Random

from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.domain.node_state import FRESH_WINDOW
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.node_ring import NodeRing, place_of, rendezvous
from lucid_compute.registry.matching_engine import has_serving_compute
from lucid_compute.registry.routing_rules import NO_POLICY, TIE_SHARE, NodeUsage, is_at_capacity, suits
from lucid_compute.web.turns import in_batches

FEW = 16  # up to so many nodes are all inspected
EXPLORED = 64  # of more nodes, inspected by a request that explores
SAMPLE = 8  # of more nodes, inspected by any other: twice as many take twice the time, nearly all of it memory
AFFINE_NODES = 3  # of a session, tried before the node with the least wait
AFFINE_WAIT = 2.0  # how long a session waits for its own node, as a multiple of the least wait
AFFINE_SLACK_MS = 30.0  # or so much longer: a warm prefix saves more, and noise of a few ms moves no session
_ROUNDS = 3  # of samples, before every node is inspected
_AFFINE_COUNTS = (AFFINE_NODES, 12, 64)  # of a session's own nodes; more where none of the first suits its policy
_NODES_A_TURN = 500

Candidate = tuple[float, FleetNode]


class Dispatcher:
    """Chooses nodes for one replica."""

    def __init__(self, fleet: Fleet, stats: FleetStats, chance: Random | None = None) -> None:
        self._fleet = fleet
        self._stats = stats
        self._monotonic = stats.monotonic
        self._chance = chance or Random()  # noqa: S311 - it breaks ties, and makes no secret

    def find_quickly(self, criteria: Criteria, now: datetime) -> FleetNode | None:
        """Return the node to send the request to; None when a quick search found none.

        Of more than `FEW` nodes, `SAMPLE` random ones are inspected: the best of eight is among the best quarter of any
        fleet nine times in ten, and replicas do not all choose the same node.
        """
        ring = self._fleet.ring_of(criteria.model)
        if len(ring) > FEW and criteria.policy.node_ids is None:
            return self._best_of_some(ring, criteria, now)
        node_ids = ring.all() if criteria.policy.node_ids is None else self._in_order(ring, criteria)
        silent: list[str] = []
        candidates = self._candidates(node_ids, criteria, now - FRESH_WINDOW, silent)
        if silent:
            living = self._living(silent, criteria, now)
            if not candidates and criteria.policy.route_stale:
                candidates = living
        if not candidates:
            return None
        if criteria.session is None or criteria.policy.node_ids is not None:
            return self._choose(candidates, candidates, criteria)
        return self._choose_own(candidates, ring, place_of(criteria.session), criteria)

    async def find(self, criteria: Criteria, now: datetime) -> FleetNode | None:
        """Return the node to send the request to after inspecting all, fresh ones first; None when there is none."""
        silent: list[str] = []
        node_ids = self._in_order(self._fleet.ring_of(criteria.model), criteria)
        async for some in in_batches(node_ids, _NODES_A_TURN):
            if fresh := _still_on_ring(self._candidates(some, criteria, now - FRESH_WINDOW, silent), criteria):
                return self._least_wait(fresh, fresh if criteria.session else ())
        async for some in in_batches(silent, _NODES_A_TURN):
            living = _still_on_ring(self._living(some, criteria, now), criteria)
            if living and criteria.policy.route_stale:
                return self._least_wait(living, living if criteria.session else ())
        return self._least_blocked(criteria, now)

    def usage_of(self, node: FleetNode, criteria: Criteria) -> NodeUsage:
        """Return what this replica measured of a node, in the form that the rules read."""
        in_flight, now = self._fleet.in_flight(node.state.id), self._monotonic()
        node_stats = self._stats.nodes.get(node.state.id)
        if node_stats is None:
            return NodeUsage(in_flight)
        blocked_seconds = node_stats.breaker.blocked_seconds(now)
        return NodeUsage(
            in_flight,
            blocked_seconds,
            node_stats.free_at - now if node_stats.full_until > now else 0.0,
            node_stats.latency_ms(criteria.kind, now),
            node_stats.lack_of(criteria, now),
            now - node_stats.breaker.opened_at if blocked_seconds else 0.0,
        )

    def wait_ms(self, node: FleetNode, criteria: Criteria) -> float:
        """Return the expected wait on a node in milliseconds."""
        node_stats, kind = self._stats.track(node.state.id), criteria.kind
        typical_ms, in_flight = self._stats.typical_ms(kind), self._fleet.in_flight(node.state.id)
        return node_stats.wait_ms(kind, in_flight, typical_ms, self._monotonic()) if node_stats else typical_ms

    def _best_of_some(self, ring: NodeRing, criteria: Criteria, now: datetime) -> FleetNode | None:
        """Return the best of a few nodes, or the session's own; None when none of them may serve."""
        silent: list[str] = []
        candidates: list[Candidate] = []
        for _ in range(_ROUNDS):
            if candidates := self._candidates(ring.some(SAMPLE), criteria, now - FRESH_WINDOW, silent):
                break
        is_any_fresh = True
        if silent:
            living = self._living(silent, criteria, now)
            if not candidates and criteria.policy.route_stale:
                is_any_fresh = has_serving_compute(
                    criteria.model, self._fleet.serving_candidates(criteria.model, now), now
                )
                candidates = [] if is_any_fresh else living
        if not candidates or criteria.session is None:
            return self._choose(candidates, (), criteria, (ring, now - FRESH_WINDOW)) if candidates else None
        place = place_of(criteria.session)
        if is_any_fresh and (home := ring.home_of(place)) is not None:
            at_home = self._candidates((home,), criteria, now - FRESH_WINDOW, silent)
            if at_home and at_home[0][0] <= _longest_wait(candidates):
                self._stats.count_request(criteria.kind)
                return at_home[0][1]
        own = self._own(ring, place, criteria, now, are_fresh=is_any_fresh)
        return self._choose(candidates, own, criteria) if own else None

    def _choose(
        self,
        candidates: list[Candidate],
        own: Sequence[Candidate],
        criteria: Criteria,
        some_of: tuple[NodeRing, datetime] | None = None,
    ) -> FleetNode:
        """Return one of the candidates, or of the session's own nodes; now and then an idle one, to measure it.

        Otherwise a node that was slow once would be sent no request, and this replica would never measure that it has
        recovered. `some_of` names the ring that the candidates are a sample of, and since when its nodes are fresh:
        an exploration inspects more of that ring.
        """
        stats, kind = self._stats, criteria.kind
        chosen = self._least_wait(candidates, own if criteria.session else ())
        if stats.count_request(kind):
            if some_of is not None:
                ring, since = some_of
                candidates = self._candidates(ring.some(EXPLORED), criteria, since, [])
            explored = stats.least_recently_measured(
                kind, [node for _, node in (own[:1] if criteria.session else candidates)]
            )
            stats.record_exploration(kind)  # even if no node is idle: then the next request need not search
            if explored is not None and explored is not chosen:
                return explored
        return chosen

    def _choose_own(self, candidates: list[Candidate], ring: NodeRing, place: int, criteria: Criteria) -> FleetNode:
        """Return the session's own node; `candidates` are all nodes of the ring that may serve."""
        home = self._fleet.find_node(ring.home_of(place) or "")
        longest = _longest_wait(candidates)
        for wait, node in candidates:
            if node is home and wait <= longest:
                self._stats.count_request(criteria.kind)
                return node
        by_id = {candidate[1].state.id: candidate for candidate in candidates}
        own = [by_id[node_id] for node_id in ring.of_session(place, len(ring)) if node_id in by_id]
        return self._choose(candidates, own, criteria)

    def _own(
        self, ring: NodeRing, place: int, criteria: Criteria, now: datetime, *, are_fresh: bool
    ) -> list[Candidate]:
        """Return the session's own nodes that may take the request, in their order of preference."""
        for count in _AFFINE_COUNTS:
            silent: list[str] = []
            own = self._candidates(ring.of_session(place, count), criteria, now - FRESH_WINDOW, silent)
            if not are_fresh:
                own = self._living(silent, criteria, now)
            if own:
                return own
        return []

    def _in_order(self, ring: NodeRing, criteria: Criteria) -> list[str]:
        """Return all eligible nodes in the order of the request's session; without one, from a random node on.

        Starting at the same node each time would overload the first nodes and never use the last.
        """
        place = self._chance.getrandbits(64) if criteria.session is None else place_of(criteria.session)
        named = criteria.policy.node_ids
        if named is None:
            in_order = ring.onward_from if criteria.session is None else ring.of_session
            return in_order(place, len(ring))
        nodes = filter(None, map(self._fleet.find_node, named))
        node_ids = [node.state.id for node in nodes if _is_on_ring(node, criteria)]
        return rendezvous(place, [(place_of(node_id), node_id) for node_id in node_ids])

    def _living(self, node_ids: Iterable[str], criteria: Criteria, now: datetime) -> list[Candidate]:
        """Return the live nodes that may take the request, each with its wait; remove dead ones from the rings."""
        dead: list[str] = []
        living = self._candidates(node_ids, criteria, self._fleet.live_since(now), dead)
        for node_id in dead:
            if (node := self._fleet.find_node(node_id)) is not None:
                self._fleet.remove_from_rings(node)
        return living

    def _candidates(
        self,
        node_ids: Iterable[str],
        criteria: Criteria,
        since: datetime,
        older: list[str],
        *,
        minds_breaker: bool = True,
    ) -> list[Candidate]:
        """Return the nodes with a heartbeat at `since` or later that may take the request, each with its wait.

        Nodes with an older heartbeat are appended to `older`. Hot: each line costs a tenth of a microsecond.
        """
        stats, count_in_flight = self._stats, self._fleet.replicas.in_flight
        kind, policy, tried = criteria.kind, criteria.policy, criteria.tried
        look_up, typical_ms, now = stats.nodes.get, stats.typical_ms(kind), self._monotonic()
        found = []
        for node_id in node_ids:
            node_stats = look_up(node_id) or stats.track(node_id)
            if node_stats is None:
                continue
            node = node_stats.node
            if node_stats.state is not node.state:
                node_stats.read_state()
            if node_stats.received_at < since:
                older.append(node_id)
                continue
            in_flight = count_in_flight(node_id)
            if is_at_capacity(node_stats.limit, in_flight) or node_id in tried:
                continue
            if node_stats.has_doubts:
                node_stats.forget_old_doubts(now)
                if not node_stats.may_serve(criteria, now, minds_breaker=minds_breaker):
                    continue
            if policy is NO_POLICY or suits(criteria.model, node.state, node_stats.latency_ms(kind, now), policy):
                found.append((node_stats.wait_ms(kind, in_flight, typical_ms, now), node))
        return found

    def _least_blocked(self, criteria: Criteria, now: datetime) -> FleetNode | None:
        """Return the blocked node to try first, if breakers block more than half of a model's live nodes; else None.

        Breakers open for at most half of a model's nodes. More are blocked only if other nodes have left since.
        """
        blocked = [node.state.id for node in self._stats.blocked_on(criteria.model.id)]
        live_since = self._fleet.live_since(now)
        since = live_since if criteria.policy.route_stale else now - FRESH_WINDOW
        free = [node for _, node in self._candidates(blocked, criteria, since, [], minds_breaker=False)]
        if not free:
            return None
        nodes = map(self._fleet.find_node, self._fleet.ring_of(criteria.model).all())
        live_count = sum(node is not None and node.state.is_live(live_since) for node in nodes)
        if len(blocked) * 2 <= live_count:
            return None
        return min(free, key=lambda node: self._stats.blocked_seconds(node.state.id))

    def _least_wait(self, candidates: list[Candidate], own: Sequence[Candidate] = ()) -> FleetNode:
        """Return the first of the session's own nodes unless its wait is far longer, else a node with the least wait.

        The latter is a random node of those whose wait is at most a quarter longer than the least.
        """
        least = min([wait for wait, _ in candidates])
        if own:
            longest = _longest_wait(candidates)
            for wait, node in own[:AFFINE_NODES]:
                if wait <= longest:
                    return node
        longest = least * (1.0 + TIE_SHARE)
        tied = [node for wait, node in candidates if wait <= longest]
        return tied[int(self._chance.random() * len(tied))]


def _still_on_ring(candidates: list[Candidate], criteria: Criteria) -> list[Candidate]:
    """Return the candidates still on the ring: a node that left during the search may be draining."""
    return [candidate for candidate in candidates if _is_on_ring(candidate[1], criteria)]


def _is_on_ring(node: FleetNode, criteria: Criteria) -> bool:
    return node.capability_class.has_on_ring(node, criteria.model.id)


def _longest_wait(candidates: list[Candidate]) -> float:
    """Return how many milliseconds a session may wait for a node of its own instead of the node with the least wait."""
    least = min([wait for wait, _ in candidates])
    return max(least * AFFINE_WAIT, least + AFFINE_SLACK_MS)
