"""The gateway: serves one request from the node with the least expected wait, and from the next when that one fails.

Failover before the first byte is invisible to the client. A stream that breaks later ends with an error that OpenAI's
clients raise, and what was delivered is billed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, NamedTuple

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.egress.faults import Blame, EgressFault, FaultKind, NodeBusy, NotOffered
from lucid_compute.errors import LucidError, ModelUnavailable, Shortage
from lucid_compute.gateway.attempt import ReadyNode, TaskAttempt
from lucid_compute.gateway.breakers import RetryBudgets
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.failures import Failed, are_passing, busy_count, error_of, is_about_stored, soonest_seconds
from lucid_compute.gateway.ranking import Ranking, narrow, rank
from lucid_compute.gateway.request import Criteria, GatewayRequest
from lucid_compute.gateway.tracing import end_choice
from lucid_compute.registry.domain.passports import ModelFormat
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy

MAX_ATTEMPTS = 3
MAX_RANKINGS = 4  # of one model and endpoint at a time, by the policies of requests
REJECTIONS_FRESH_SECONDS = 0.5
Ranker = Callable[[Fleet, Dispatcher, Criteria, datetime], Coroutine[Any, Any, Ranking]]


class _SharedRanking(NamedTuple):
    """A ranking of every node, shared by requests that no node may serve."""

    began_at: float
    ranking: asyncio.Task[Ranking]

    def is_old(self, now: float) -> bool:
        """Return whether the ranking must be made again."""
        return self.ranking.done() and now - self.began_at > REJECTIONS_FRESH_SECONDS


class Gateway:
    """Serves the requests of one replica."""

    def __init__(self, context: GatewayContext, rank: Ranker = rank) -> None:
        self.context = context
        self.rank = rank
        self._retries = RetryBudgets()
        self._rankings: dict[tuple[tuple[str, str], RoutingPolicy, str], _SharedRanking] = {}
        self.dispatcher = Dispatcher(context.fleet, context.stats)
        self.own_endpoints = context.client.own_endpoints
        self.faults: Counter[str] = Counter()
        self.retries = 0

    def find_ready_node(self, request: GatewayRequest, now: datetime) -> ReadyNode | None:
        """Return a node that can be sent the request at once; None for streams, and if a quick search found none."""
        if request.inference.is_stream or request.model.format is ModelFormat.API:
            return None
        node = self.dispatcher.find_quickly(request.criteria, now)
        if node is None:
            return None
        try:
            target = self.context.upstreams.of_node(node)
        except EgressFault:
            return None
        connection = self.context.client.acquire_idle(target.url)
        if connection is None:
            if request.criteria.is_exploration:  # else a node that soon closes its connections would never be measured
                self.context.stats.postpone_exploration(request.criteria.kind)
            return None
        return ReadyNode(node, target, connection)

    def count_request(self, key_id: str) -> None:
        """Count a request of a key that may be tried again."""
        self._retries.count_request(key_id, time.monotonic())

    async def serve(self, request: GatewayRequest, first: Failed | None = None) -> None:
        """Serve the request; `first` is an attempt that failed already.

        Raises:
            ModelUnavailable: no node may serve it.
            NodeFailed, NodeTimeout, RoutingLoop: every attempt failed. If `request.has_begun`, end its stream.
        """
        failed: list[Failed] = []
        if first is not None:
            self._record_failed(request, failed, first)
        while True:
            node = await (self._next_node if request.span is None else self._choose_traced)(request, failed)
            if failed:
                self._spend_retry(request, failed)
            try:
                await TaskAttempt(self.context, request, node, len(failed) + 1, self.context.clock.now()).run()
            except EgressFault as fault:
                self._record_failed(request, failed, (node, fault))
            else:
                self._blame(request, failed)
                return

    def _blame(self, request: GatewayRequest, failed: list[Failed]) -> None:
        """Blame the nodes that failed a request which another node has served, unless two of them failed alike.

        Nodes that fail alike probably lack what the request asks for, such as tools or pictures; others don't ask that.
        """
        job = request.running.job
        if job is None or job.outcome is not Outcome.COMPLETED:
            return  # the last node refused the request: its clients' fault may be what the others failed at
        for node, fault in failed:
            if node is not None and fault.blame is Blame.PERHAPS_THE_REQUEST and not request.failed_alike(fault):
                self.context.stats.record_failure(node, fault.number)

    def _record_failed(self, request: GatewayRequest, failed: list[Failed], last: Failed) -> None:
        """Record an attempt that failed.

        Raises:
            LucidError: no further attempt may be made.
        """
        node, fault = last
        failed.append((node, fault.with_traceback(None)))  # else fault and frame would hold each other, and the request
        request.faults.append(fault)
        self.faults[fault.reason] += 1
        self._require_another(request, failed)
        request.criteria.tried = {tried.state.id for tried, _ in failed if tried is not None}

    async def _choose_traced(self, request: GatewayRequest, failed: list[Failed]) -> FleetNode | None:
        """Return what `_next_node` returns, and trace the choice in its own span."""
        if (span := request.span and request.span.child("choose")) is None:
            return await self._next_node(request, failed)
        try:
            node = await self._next_node(request, failed)
        except LucidError as error:
            span.end(error.code)
            raise
        except BaseException:  # mostly a disconnected client; the span must end in any case
            span.end("cancelled")
            raise
        end_choice(span, node)
        return node

    async def _next_node(self, request: GatewayRequest, failed: list[Failed]) -> FleetNode | None:
        """Return the node for the next attempt; None is the model's upstream."""
        criteria = request.criteria
        if criteria.model.format is ModelFormat.API:
            if not criteria.model.record.metadata.get("upstream"):
                raise ModelUnavailable(
                    criteria.model.record.name, {ReasonCode.MODEL_NOT_SERVED: 1}, Shortage.NO_UPSTREAM
                )
            return None
        now = self.context.clock.now()
        node = self.dispatcher.find_quickly(criteria, now) or await self.dispatcher.find(criteria, now)
        if node is None:
            if failed and (is_about_stored(failed) or not are_passing(failed)):
                raise error_of(request, failed, ", and there is no other node")
            raise _unavailable(criteria, await self._rank_all(criteria), failed)
        return node

    async def _rank_all(self, criteria: Criteria) -> Ranking:
        """Return why no node may serve the request.

        A ranking inspects every node, so requests with the same criteria share it for a while. So many policies as
        clients can invent share the one without a policy.
        """
        now, rankings = time.monotonic(), self._rankings
        owner = criteria.owner if self.context.stats.has_met_lacks(criteria.owner) else ""
        subject = (criteria.model.id, criteria.endpoint)
        key = (subject, criteria.policy, owner)
        while rankings and (oldest := next(iter(rankings.items())))[1].is_old(now):
            del rankings[oldest[0]]
        shared = rankings.get(key)
        is_special = criteria.policy is not NO_POLICY or owner != ""
        if shared is None and is_special and sum(each[0] == subject for each in rankings) >= MAX_RANKINGS:
            general = await self._rank_all(Criteria(criteria.model, endpoint=criteria.endpoint))
            return narrow(general, self.context.fleet, criteria, self.context.clock.now())
        if shared is None or shared.is_old(now):
            rankings.pop(key, None)  # so that the newest is the last of the dict
            ranking = self.rank(self.context.fleet, self.dispatcher, criteria, self.context.clock.now())
            shared = rankings[key] = _SharedRanking(now, asyncio.create_task(ranking))
        return await asyncio.shield(shared.ranking)

    def _require_another(self, request: GatewayRequest, failed: list[Failed]) -> None:
        """Refuse unless another attempt may be made.

        Raises:
            LucidError: the client has a part of its response, or the attempts are used up.
        """
        if request.has_begun or len(failed) >= MAX_ATTEMPTS or request.model.format is ModelFormat.API:
            raise error_of(request, failed)
        if failed[-1][1].kind is FaultKind.TOO_LARGE:  # and another node's answer would be as large
            raise error_of(request, failed)

    def _spend_retry(self, request: GatewayRequest, failed: list[Failed]) -> None:
        """Spend a retry of the request's key, once there is a node for it.

        Raises:
            LucidError: its retry budget is used up.
        """
        if not _is_met_seldom(failed[-1][1]) and not self._retries.spend(request.principal.key_id, time.monotonic()):
            raise error_of(request, failed, ", and as many requests of this key as may be are tried again already")
        self.retries += 1


def _is_met_seldom(fault: EgressFault) -> bool:
    """Return whether another attempt makes no outage worse: the node is not asked again for a while, or was not asked.

    Nodes say at once that they lack something or are busy, and are asked again after a minute, or when they are free.
    """
    if isinstance(fault, NotOffered):
        return fault.is_learned
    return fault.kind is FaultKind.NODE_LEFT or (isinstance(fault, NodeBusy) and fault.retry_after_seconds > 0)


def _unavailable(criteria: Criteria, ranking: Ranking, failed: list[Failed]) -> ModelUnavailable:
    """Return why no node may serve a request; the ranking may be a little older than what the request has met."""
    rejections, shortage, busy = Counter(ranking.rejections), ranking.shortage, busy_count(failed)
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
