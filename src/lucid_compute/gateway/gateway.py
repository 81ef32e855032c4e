"""The gateway: serves one request from the node with the least expected wait, and from the next when that one fails.

Failover before the first byte is invisible to the client. A stream that breaks later ends with an error that OpenAI's
clients raise, and what was delivered is billed.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import datetime
from functools import partial
from random import Random
from typing import Any, NamedTuple

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.egress.faults import Blame, ContextTooShort, EgressFault, FaultKind, NodeBusy, NotOffered
from lucid_compute.errors import ModelUnavailable, ResponseNotFound, Shortage
from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.exchange import Exchange
from lucid_compute.gateway.failures import are_passing, busy_count, error_of, is_about_stored, soonest_seconds
from lucid_compute.gateway.ranking import Ranking, narrow, rank
from lucid_compute.gateway.request import Criteria, Failed, GatewayRequest, RunningRequest, TriedNodes
from lucid_compute.gateway.request_body import InferenceRequest, StoredResponse
from lucid_compute.gateway.request_queue import QueuePlace, RequestQueue
from lucid_compute.gateway.tracing import Span, end_choice
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.key_limits import is_model_allowed, require_model
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.fleet.node_ring import place_of
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy, context_on
from lucid_compute.registry.variants import variants_of
from lucid_compute.web.lanes import Wait

MAX_ATTEMPTS = 3
MAX_RANKINGS = 4  # of one model and endpoint at a time, by the policies of requests
Ranker = Callable[[Fleet, Dispatcher, Criteria, datetime], Coroutine[Any, Any, Ranking]]


class _SharedRanking(NamedTuple):
    """A ranking of every node, shared by requests that no node may serve."""

    began_at: float
    ranking: asyncio.Task[Ranking]

    def is_old(self, since: float) -> bool:
        """Return whether the ranking must be made again, because it began before this instant."""
        return self.ranking.done() and self.began_at < since


class ServedRequest(RunningRequest):
    """A running request that the gateway serves: its attempt, its place in the queue, the span of the last choice."""

    exchange: Exchange | None = None
    choice: Span | None = None
    place: QueuePlace | None = None


class Gateway:
    """Serves the requests of one replica."""

    def __init__(
        self,
        context: GatewayContext,
        rank: Ranker = rank,
        queue: RequestQueue | None = None,
        chance: Random | None = None,
    ) -> None:
        self.context = context
        self.rank = rank
        self.queue = queue
        self._retries = RetryBudgets()
        self._rankings: dict[tuple[tuple[str, str], RoutingPolicy, str], _SharedRanking] = {}
        self._chance = chance or Random()  # noqa: S311 - it spreads requests, and makes no secret
        self.dispatcher = Dispatcher(context.fleet, context.stats)
        self.own_endpoints = context.client.own_endpoints
        self.faults: Counter[str] = Counter()
        self.retries = 0
        self.rejections_fresh_seconds = 0.5

    def leave_queue(self, served: ServedRequest) -> None:
        """Give up the request's place in the queue, if it has one."""
        place, served.place = served.place, None
        if place is not None and self.queue is not None:
            self.queue.leave(place)

    def follow_route(self, request: GatewayRequest) -> None:
        """Send the request to the models that its model's route names, if its key may use them.

        A session stays with one of the weighted models, whichever nodes it has.

        Raises:
            ModelNotAllowed: the key may use none of them.
        """
        session = request.criteria.session
        draw = self._chance.random() if session is None else draw_of(session)
        request.use(self.variants_for(request.principal, request.model, draw))

    def variants_for(self, principal: Principal, model: ModelPassport, draw: float) -> list[ModelPassport]:
        """Return the models that requests for the model go to, in their order, without those that the key may not use.

        Raises:
            ModelNotAllowed: the model has a route, and the key may use none of its models.
        """
        variants, limits = variants_of(self.context.fleet, model, draw), principal.limits
        if model.route is None:
            return variants
        allowed = [variant for variant in variants if is_model_allowed(limits, variant.known_as)]
        if not allowed:
            require_model(limits, variants[0].record.name, variants[0].known_as)
        return allowed

    def count_request(self, key_id: str) -> None:
        """Count a request of a key that may be tried again."""
        self._retries.count_request(key_id, self.context.monotonic())

    def serve(self, served: ServedRequest, request: GatewayRequest, now: datetime) -> Wait | None:
        """Send the request to a node, or return what must be awaited before the next call.

        Raises:
            ModelUnavailable: no node may serve it.
            NodeFailed, NodeTimeout, RoutingLoop: every attempt failed. If `request.has_begun`, end its stream.
        """
        while True:
            exchange = served.exchange or self._choose(served, request, now)
            if not isinstance(exchange, Exchange):
                return exchange
            try:
                return exchange.step()
            except EgressFault as fault:
                served.exchange = None
                self._record_failed(request, (exchange.node, fault))

    def record_served(self, request: GatewayRequest) -> None:
        """Blame the nodes that failed a request which another node has served, unless two of them failed alike.

        Nodes that fail alike probably lack what the request asks for, such as tools or pictures; others don't ask that.
        """
        job = request.running.job
        if not request.failed or job is None or job.outcome is not Outcome.COMPLETED:
            return  # the last node refused the request: its clients' fault may be what the others failed at
        for node, fault in request.failed:
            if node is not None and fault.blame is Blame.PERHAPS_THE_REQUEST and not request.failed_alike(fault):
                self.context.stats.record_failure(node, fault.number)

    def _record_failed(self, request: GatewayRequest, last: Failed) -> None:
        """Record an attempt that failed.

        Raises:
            LucidError: no further attempt may be made.
        """
        node, fault = last
        request.failed.append((node, fault.with_traceback(None)))  # else fault and frame would hold each other
        self.faults[fault.reason] += 1
        self._require_another(request)
        if request.model.format is ModelFormat.API:
            request.use(request.others)
            return
        criteria = request.criteria
        if isinstance(fault, ContextTooShort) and node is not None:
            limit = context_on(request.model, node.state)
            criteria.longer_than = max(limit or 0, criteria.longer_than or 0) or None
        criteria.tried = TriedNodes(self.context.fleet, criteria, request.failed)

    def _choose(self, served: ServedRequest, request: GatewayRequest, now: datetime) -> Exchange | Wait:
        """Begin an attempt on the next node, and return it; if a quick search finds no node, return a slower one.

        Raises:
            LucidError: no further attempt may be made.
        """
        if request.span is not None:
            served.choice = request.span.child("choose")
        if request.inference.endpoint.is_stored and request.inference.stored is not None:
            return self._begin(served, request, self._node_with(request.inference, request.inference.stored), now)
        if request.model.format is ModelFormat.API:
            if not request.model.record.metadata.get("upstream"):
                if request.others:
                    _use_next(served, request)
                    return self._choose(served, request, now)
                name = request.model.record.name
                raise ModelUnavailable(name, {ReasonCode.MODEL_NOT_SERVED: 1}, Shortage.NO_UPSTREAM)
            return self._begin(served, request, None, now)
        if self.queue is not None and self.queue.must_wait(request.model.id, served.place):
            if not request.others:
                return partial(self._wait_for_turn, self.queue, served, request)
            _use_next(served, request)
            return self._choose(served, request, now)
        node = self.dispatcher.find_quickly(request.criteria, now)
        return partial(self._search, served, request) if node is None else self._begin(served, request, node, now)

    def knows_node(self, inference: InferenceRequest) -> bool:
        """Return whether the node is there that has the response which a request names, if it names one."""
        stored = inference.stored
        if stored is None or stored.node_id is None:
            return True
        node = self.context.fleet.find_node(stored.node_id)
        return node is not None and not node.record.has_ended

    def _node_with(self, inference: InferenceRequest, stored: StoredResponse) -> FleetNode | None:
        """Return the node that has a stored response, also while it drains, is full or fails; None is the upstream.

        Raises:
            ResponseNotFound: the node has left.
        """
        if stored.node_id is None:
            return None
        node = self.context.fleet.find_node(stored.node_id)
        if node is None or node.record.has_ended:
            raise ResponseNotFound(inference.shown_id)
        return node

    async def _search(self, served: ServedRequest, request: GatewayRequest) -> None:
        """Begin an attempt on a node that a search of all nodes finds, or go on to the next model of the route.

        Raises:
            LucidError: there is none, or no further attempt may be made.
        """
        criteria, failed, clock = request.criteria, request.failed, self.context.clock
        node = await self.dispatcher.find(criteria, clock.now())
        if node is None:
            if request.others:
                _use_next(served, request)
                return
            criteria = request.routed_from or criteria
            if self.queue is not None and await self._is_busy(criteria, failed):
                await self._wait_for_turn(self.queue, served, request)
                return
            if failed and (is_about_stored(failed) or not are_passing(failed)):
                raise error_of(request, failed, ", and there is no other node")
            raise _unavailable(criteria, await self._rank_all(criteria), failed)
        self._begin(served, request, node, clock.now())

    async def _is_busy(self, criteria: Criteria, failed: list[Failed]) -> bool:
        """Return whether nodes are at their capacity and nothing else is in the way, so that waiting may help."""
        if failed:
            return busy_count(failed) == len(failed)
        return (await self._rank_all(criteria)).shortage is Shortage.NODES_BUSY

    async def _wait_for_turn(self, queue: RequestQueue, served: ServedRequest, request: GatewayRequest) -> None:
        """Wait in the queue until the request may look for a node again, in all models of its route.

        Raises:
            ModelUnavailable: the queue is full, or the request has waited long enough.
        """
        criteria = request.routed_from or request.criteria
        if served.choice is not None:
            served.choice.end()
        served.place = served.place or queue.enter(criteria.model.id, request.principal.key_id)
        if served.place is None or not await queue.wait(served.place):
            raise _unavailable(criteria, await self._rank_all(criteria), request.failed, is_busy=True)
        if request.variants:
            request.use(request.variants)
        request.criteria.tried = ()  # nodes that were busy may be free

    def _begin(self, served: ServedRequest, request: GatewayRequest, node: FleetNode | None, now: datetime) -> Exchange:
        """Count the request on the node in the same turn in which it was chosen, so that no drain can come between.

        Raises:
            LucidError: the retry budget is used up.
        """
        if served.choice is not None:
            end_choice(served.choice, node)
        self.leave_queue(served)
        if request.failed:
            self._spend_retry(request)
        exchange = served.exchange = Exchange(self.context, request, node, len(request.failed) + 1, now)
        return exchange

    async def _rank_all(self, criteria: Criteria) -> Ranking:
        """Return why no node may serve the request.

        A ranking inspects every node, so requests with the same criteria share it for a while. So many policies as
        clients can invent share the one without a policy.
        """
        now, rankings = self.context.monotonic(), self._rankings
        since = now - self.rejections_fresh_seconds
        owner = criteria.owner if self.context.stats.has_met_lacks(criteria.owner) else ""
        subject = (criteria.model.id, criteria.endpoint)
        key = (subject, criteria.policy, owner)
        while rankings and (oldest := next(iter(rankings.items())))[1].is_old(since):
            del rankings[oldest[0]]
        shared = rankings.get(key)
        is_special = criteria.policy is not NO_POLICY or owner != ""
        if shared is None and is_special and sum(each[0] == subject for each in rankings) >= MAX_RANKINGS:
            general = await self._rank_all(Criteria(criteria.model, endpoint=criteria.endpoint))
            return narrow(general, self.context.fleet, criteria, self.context.clock.now())
        if shared is None or shared.is_old(since):
            rankings.pop(key, None)  # so that the newest is the last of the dict
            ranking = self.rank(self.context.fleet, self.dispatcher, criteria, self.context.clock.now())
            shared = rankings[key] = _SharedRanking(now, asyncio.create_task(ranking))
        return await asyncio.shield(shared.ranking)

    def _require_another(self, request: GatewayRequest) -> None:
        """Refuse unless another attempt may be made.

        Raises:
            LucidError: the client has a part of its response, or the attempts are used up.
        """
        failed, is_last = request.failed, request.model.format is ModelFormat.API and not request.others
        is_last = is_last or request.inference.endpoint.is_stored
        if request.has_begun or len(failed) >= MAX_ATTEMPTS or is_last:
            raise error_of(request, failed)
        if failed[-1][1].kind is FaultKind.TOO_LARGE:  # and another node's answer would be as large
            raise error_of(request, failed)

    def _spend_retry(self, request: GatewayRequest) -> None:
        """Spend a retry of the request's key, once there is a node for it.

        Raises:
            LucidError: its retry budget is used up.
        """
        failed, now = request.failed, self.context.monotonic()
        if not _is_met_seldom(failed[-1][1]) and not self._retries.spend(request.principal.key_id, now):
            raise error_of(request, failed, ", and as many requests of this key as may be are tried again already")
        self.retries += 1


def _use_next(served: ServedRequest, request: GatewayRequest) -> None:
    """Go on to the next model of the route, after no node was chosen for the last one."""
    if served.choice is not None:
        served.choice.end()
    request.use(request.others)


def draw_of(session: str) -> float:
    """Return which of a route's weighted models the session has, from 0 to 1 without 1, whichever nodes it has."""
    return place_of(f"route of {session}") / 2**64


def _is_met_seldom(fault: EgressFault) -> bool:
    """Return whether another attempt makes no outage worse: the node is not asked again for a while, or was not asked.

    Nodes say at once that they lack something or are busy, and are asked again after a minute, or when they are free.
    A node that finds a request too long has done no work for it.
    """
    if isinstance(fault, NotOffered):
        return fault.is_learned
    if isinstance(fault, ContextTooShort):
        return True
    was_not_asked = fault.kind in {FaultKind.NODE_LEFT, FaultKind.NOT_CONNECTED}
    return was_not_asked or (isinstance(fault, NodeBusy) and fault.retry_after_seconds > 0)


def _unavailable(
    criteria: Criteria, ranking: Ranking, failed: list[Failed], *, is_busy: bool = False
) -> ModelUnavailable:
    """Return why no node may serve a request; the ranking may be a little older than what the request has met."""
    rejections, shortage = Counter(ranking.rejections), ranking.shortage
    busy = max(busy_count(failed), int(is_busy))
    if busy:
        rejections[ReasonCode.AT_CAPACITY] = max(rejections[ReasonCode.AT_CAPACITY], busy)
        shortage = Shortage.NODES_BUSY
    seconds = [each for each in (soonest_seconds(failed), ranking.busy_seconds) if each is not None]
    return ModelUnavailable(
        criteria.model.record.name,
        rejections,
        shortage,
        lacking=ranking.lacking,
        endpoint=criteria.endpoint,
        retry_after_seconds=min(seconds, default=None),
    )
