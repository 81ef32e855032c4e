"""Choosing a node: of those that the rules let serve a request, the one where it would wait least.

The rules are `routing_rules`'; here is what a replica knows beside them (latency it measured, breakers, requests in
flight) and how few nodes it has to look at. A model's ring holds nodes that fit, name it and were healthy, so only what
changes by the moment is asked of each: is its heartbeat young enough, has it room, does it suit the request.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from datetime import datetime

from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.domain.node_state import FRESH_WINDOW
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.node_ring import NodeRing, place_of, rendezvous
from lucid_compute.registry.matching_engine import has_serving_compute
from lucid_compute.registry.routing_rules import NO_POLICY, TIE_SHARE, NodeUsage, is_at_capacity, suits
from lucid_compute.web.turns import in_batches

FEW = 16  # nodes that are all looked at
EXPLORED = 64  # of more than that, by a request that explores
SAMPLE = 8  # of more than that: twice as many cost twice the time, nearly all of it waiting for memory
AFFINE_NODES = 3  # how many nodes a session tries before it goes where it waits least
AFFINE_WAIT = 2.0  # how long a session waits for its own node, as a multiple of the least wait
AFFINE_SLACK_MS = 30.0  # or how much longer than that: a warm prefix saves more, and noise of a few ms moves nobody
_ROUNDS = 3  # of samples, before every node is looked at
_AFFINE_LOOKS = (AFFINE_NODES, 12, 64)  # for a session's own nodes; more where none of the first suits its policy
_NODES_A_TURN = 500

Candidate = tuple[float, FleetNode]


class Dispatcher:
    """Chooses nodes for one replica."""

    def __init__(self, fleet: Fleet, traffic: FleetStats) -> None:
        """Look at `fleet`, and at what `traffic` knows of its nodes."""
        self._fleet = fleet
        self._traffic = traffic

    def find_quickly(self, wanted: Criteria, now: datetime) -> FleetNode | None:
        """Return the node to send the request to; None when a few looks found none.

        Where there are more than `FEW` nodes, `SAMPLE` of them are looked at, at random: the best of eight is among the
        best quarter of any fleet nine times in ten, and no two replicas run for the same one.
        """
        ring = self._fleet.ring_of(wanted.model)
        if len(ring) > FEW and wanted.policy.node_ids is None:
            return self._best_of_some(ring, wanted, now)
        node_ids = ring.all() if wanted.policy.node_ids is None else self._in_order(ring, wanted)
        silent: list[str] = []
        candidates = self._candidates(node_ids, wanted, now - FRESH_WINDOW, silent)
        if silent:
            living = self._living(silent, wanted, now)
            if not candidates and wanted.policy.route_stale:
                candidates = living
        if not candidates:
            return None
        if wanted.session is None or wanted.policy.node_ids is not None:
            return self._choose(candidates, candidates, wanted)
        return self._choose_own(candidates, ring, place_of(wanted.session), wanted)

    async def find(self, wanted: Criteria, now: datetime) -> FleetNode | None:
        """Return the node to send the request to, looking at every one: fresh ones first; None when there is none."""
        silent: list[str] = []
        node_ids = self._in_order(self._fleet.ring_of(wanted.model), wanted)
        async for some in in_batches(node_ids, _NODES_A_TURN):
            if fresh := _still_on_ring(self._candidates(some, wanted, now - FRESH_WINDOW, silent), wanted):
                return _least_wait(fresh, fresh if wanted.session else ())
        async for some in in_batches(silent, _NODES_A_TURN):
            living = _still_on_ring(self._living(some, wanted, now), wanted)
            if living and wanted.policy.route_stale:
                return _least_wait(living, living if wanted.session else ())
        return self._least_blocked(wanted, now)

    def usage_of(self, node: FleetNode, wanted: Criteria) -> NodeUsage:
        """Return what this replica knows of a node, as the rules read it."""
        in_flight, now = self._fleet.in_flight(node.state.id), time.monotonic()
        known = self._traffic.nodes.get(node.state.id)
        if known is None:
            return NodeUsage(in_flight)
        return NodeUsage(
            in_flight,
            known.breaker.blocked_seconds(now),
            max(0.0, known.full_until - now),
            known.latency_ms(wanted.kind, now),
            known.lack_of(wanted, now),
        )

    def wait_ms(self, node: FleetNode, wanted: Criteria) -> float:
        """Return the expected wait on a node, as choices weigh it."""
        known, kind = self._traffic.find(node.state.id), wanted.kind
        typical_ms, in_flight = self._traffic.typical_ms(kind), self._fleet.in_flight(node.state.id)
        return known.wait_ms(kind, in_flight, typical_ms, time.monotonic()) if known else typical_ms

    def _best_of_some(self, ring: NodeRing, wanted: Criteria, now: datetime) -> FleetNode | None:
        """Return the best of a few nodes, or the session's own; None when none of them will do."""
        silent: list[str] = []
        candidates: list[Candidate] = []
        for _ in range(_ROUNDS):
            if candidates := self._candidates(ring.some(SAMPLE), wanted, now - FRESH_WINDOW, silent):
                break
        is_any_fresh = True
        if silent:
            living = self._living(silent, wanted, now)
            if not candidates and wanted.policy.route_stale:
                is_any_fresh = has_serving_compute(wanted.model, self._fleet.serving_candidates(wanted.model, now), now)
                candidates = [] if is_any_fresh else living
        if not candidates or wanted.session is None:
            return self._choose(candidates, (), wanted, (ring, now - FRESH_WINDOW)) if candidates else None
        place = place_of(wanted.session)
        if is_any_fresh and (home := ring.home_of(place)) is not None:
            at_home = self._candidates((home,), wanted, now - FRESH_WINDOW, silent)
            if at_home and at_home[0][0] <= _longest_wait(candidates):
                self._traffic.count_request(wanted.kind)
                return at_home[0][1]
        own = self._own(ring, place, wanted, now, are_fresh=is_any_fresh)
        return self._choose(candidates, own, wanted) if own else None

    def _choose(
        self,
        candidates: list[Candidate],
        own: Sequence[Candidate],
        wanted: Criteria,
        some_of: tuple[NodeRing, datetime] | None = None,
    ) -> FleetNode:
        """Return one of the candidates, or of the session's own nodes; now and then not by what is known of it.

        Else a node that was slow once would be sent nothing, and nobody learn that it is slow no more. Where the
        candidates are only some of a ring, more of it are looked at for that: those heard of since then.
        """
        traffic, kind = self._traffic, wanted.kind
        chosen = _least_wait(candidates, own if wanted.session else ())
        wanted.explores = False
        if traffic.count_request(kind):
            if some_of is not None:
                ring, since = some_of
                candidates = self._candidates(ring.some(EXPLORED), wanted, since, [])
            explored = traffic.stalest(kind, [node for _, node in (own[:1] if wanted.session else candidates)])
            traffic.note_exploring(kind)  # also when there is nothing to explore: then it is not looked for each time
            if explored is not None and explored is not chosen:
                wanted.explores = True
                return explored
        return chosen

    def _choose_own(self, candidates: list[Candidate], ring: NodeRing, place: int, wanted: Criteria) -> FleetNode:
        """Return the session's own node, of candidates that are all there are; the order of others only if need be."""
        home = self._fleet.find_node(ring.home_of(place) or "")
        longest = _longest_wait(candidates)
        for wait, node in candidates:
            if node is home and wait <= longest:
                self._traffic.count_request(wanted.kind)
                return node
        by_id = {candidate[1].state.id: candidate for candidate in candidates}
        own = [by_id[node_id] for node_id in ring.of_session(place, len(ring)) if node_id in by_id]
        return self._choose(candidates, own, wanted)

    def _own(self, ring: NodeRing, place: int, wanted: Criteria, now: datetime, *, are_fresh: bool) -> list[Candidate]:
        """Return the session's own nodes that may take the request, the first one before the next."""
        for count in _AFFINE_LOOKS:
            silent: list[str] = []
            own = self._candidates(ring.of_session(place, count), wanted, now - FRESH_WINDOW, silent)
            if not are_fresh:
                own = self._living(silent, wanted, now)
            if own:
                return own
        return []

    def _in_order(self, ring: NodeRing, wanted: Criteria) -> list[str]:
        """Return all nodes that come into question, in the order of the request's session, else from any of them on.

        Not always from the same one: then the first ones would be worked hard and the last ones never.
        """
        place = random.getrandbits(64) if wanted.session is None else place_of(wanted.session)
        named = wanted.policy.node_ids
        if named is None:
            in_order = ring.onward_from if wanted.session is None else ring.of_session
            return in_order(place, len(ring))
        nodes = filter(None, map(self._fleet.find_node, named))
        node_ids = [node.state.id for node in nodes if _is_on_ring(node, wanted)]
        return rendezvous(place, [(place_of(node_id), node_id) for node_id in node_ids])

    def _living(self, node_ids: Iterable[str], wanted: Criteria, now: datetime) -> list[Candidate]:
        """Return the live nodes that may take the request, each with its wait; those not live leave the rings."""
        dead: list[str] = []
        living = self._candidates(node_ids, wanted, self._fleet.live_since(now), dead)
        for node_id in dead:
            if (node := self._fleet.find_node(node_id)) is not None:
                self._fleet.remove_from_rings(node)
        return living

    def _candidates(
        self,
        node_ids: Iterable[str],
        wanted: Criteria,
        since: datetime,
        older: list[str],
        *,
        minds_breaker: bool = True,
    ) -> list[Candidate]:
        """Return the nodes heard of at `since` or later that may take the request, each with its wait.

        Those that were last heard of before that are put into `older`. Hot: each line costs a tenth of a microsecond.
        """
        traffic, count_in_flight = self._traffic, self._fleet.replicas.in_flight
        kind, policy, tried = wanted.kind, wanted.policy, wanted.tried
        look_up, typical_ms, now = traffic.nodes.get, traffic.typical_ms(kind), time.monotonic()
        found = []
        for node_id in node_ids:
            known = look_up(node_id) or traffic.find(node_id)
            if known is None:
                continue
            node = known.node
            if known.state is not node.state:
                known.read()
            if known.received_at < since:
                older.append(node_id)
                continue
            in_flight = count_in_flight(node_id)
            if is_at_capacity(known.limit, in_flight) or node_id in tried:
                continue
            if known.has_doubts:
                known.forget_old_doubts(now)
                if not known.may_serve(wanted, now, minds_breaker=minds_breaker):
                    continue
            if policy is NO_POLICY or suits(wanted.model, node.state, known.latency_ms(kind, now), policy):
                found.append((known.wait_ms(kind, in_flight, typical_ms, now), node))
        return found

    def _least_blocked(self, wanted: Criteria, now: datetime) -> FleetNode | None:
        """Return the blocked node to try first, when the breakers hold more than half of a model's nodes.

        They open for half of them at most; that more are blocked is because others went away since.
        """
        blocked = [node.state.id for node in self._traffic.blocked_on(wanted.model.id)]
        live_since = self._fleet.live_since(now)
        since = live_since if wanted.policy.route_stale else now - FRESH_WINDOW
        free = [node for _, node in self._candidates(blocked, wanted, since, [], minds_breaker=False)]
        if not free:
            return None
        nodes = map(self._fleet.find_node, self._fleet.ring_of(wanted.model).all())
        live_count = sum(node is not None and node.state.is_live(live_since) for node in nodes)
        if len(blocked) * 2 <= live_count:
            return None
        return min(free, key=lambda node: self._traffic.blocked_seconds(node.state.id))


def _still_on_ring(candidates: list[Candidate], wanted: Criteria) -> list[Candidate]:
    """Return the nodes without those that left the ring while others were answered: they may be draining."""
    return [candidate for candidate in candidates if _is_on_ring(candidate[1], wanted)]


def _is_on_ring(node: FleetNode, wanted: Criteria) -> bool:
    return node.capability_class.has_on_ring(node.state.id, wanted.model.id)


def _least_wait(candidates: list[Candidate], own: Sequence[Candidate] = ()) -> FleetNode:
    """Return the first of the session's own nodes unless it would wait far longer there, else one with the least wait.

    That is a node at random among those whose wait is at most a quarter longer than the least.
    """
    least = min([wait for wait, _ in candidates])
    if own:
        longest = _longest_wait(candidates)
        for wait, node in own[:AFFINE_NODES]:
            if wait <= longest:
                return node
    longest = least * (1.0 + TIE_SHARE)
    tied = [node for wait, node in candidates if wait <= longest]
    return tied[int(random.random() * len(tied))]  # noqa: S311 - a tie is broken, no secret made


def _longest_wait(candidates: list[Candidate]) -> float:
    """Return how long a session waits for a node of its own before it goes where it would wait least."""
    least = min([wait for wait, _ in candidates])
    return max(least * AFFINE_WAIT, least + AFFINE_SLACK_MS)
