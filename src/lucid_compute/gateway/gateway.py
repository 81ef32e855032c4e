"""The gateway: serves one request from the node with the least expected wait, and from the next when that one fails.

Failover before the first byte is invisible to the client. A stream that breaks later ends with an error that OpenAI's
clients raise, and what was delivered is billed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable
from datetime import datetime
from typing import Any, NamedTuple

from lucid_compute.egress.faults import TIMEOUTS, BadStatus, EgressFault, FaultKind, NotOffered
from lucid_compute.errors import LucidError, ModelUnavailable, NodeFailed, NodeTimeout, RoutingLoop, Shortage
from lucid_compute.gateway.attempt import ReadyNode, TaskAttempt
from lucid_compute.gateway.breakers import RetryBudget
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.ranking import Ranking, rank
from lucid_compute.gateway.request import Criteria, GatewayRequest
from lucid_compute.gateway.tracing import end_choice
from lucid_compute.registry.domain.passports import ModelFormat
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.matching_engine import ReasonCode

MAX_ATTEMPTS = 3
REJECTIONS_FRESH_SECONDS = 0.5
_LOOP_STATUS = RoutingLoop.status
_TOO_LARGE = (
    ": the answer is larger than this service passes on. Ask for less at a time, or ask its operator to raise "
    "LUCID_ANSWER_MAX_MIB, LUCID_STREAM_MAX_MIB or LUCID_EVENT_MAX_MIB"
)
Failed = tuple[FleetNode | None, EgressFault]
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
        self._retries = RetryBudget()
        self._rankings: dict[Hashable, _SharedRanking] = {}
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

    def count_request(self) -> None:
        """Count a request that may be tried again."""
        self._retries.count_request(time.monotonic())

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
            try:
                await TaskAttempt(self.context, request, node, len(failed) + 1, self.context.clock.now()).run()
            except EgressFault as fault:
                self._record_failed(request, failed, (node, fault))
            else:
                return

    def _record_failed(self, request: GatewayRequest, failed: list[Failed], last: Failed) -> None:
        """Record an attempt that failed.

        Raises:
            LucidError: no further attempt may be made.
        """
        node, fault = last
        failed.append((node, fault.with_traceback(None)))  # else fault and frame would hold each other, and the request
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
            if failed and not _are_lacking(failed):
                raise _error_of(failed, ", and there is no other node")
            ranking = await self._rank_all(criteria)
            name, counted = criteria.model.record.name, ranking.rejections
            raise ModelUnavailable(name, counted, ranking.shortage, lacking=ranking.lacking, endpoint=criteria.endpoint)
        return node

    async def _rank_all(self, criteria: Criteria) -> Ranking:
        """Return why no node may serve the request.

        A ranking inspects every node, so requests with the same criteria share it for a while.
        """
        now, rankings = time.monotonic(), self._rankings
        key = (criteria.model.id, criteria.endpoint, criteria.policy)
        while rankings and (oldest := next(iter(rankings.items())))[1].is_old(now):
            del rankings[oldest[0]]
        shared = rankings.get(key)
        if shared is None or shared.is_old(now):
            rankings.pop(key, None)  # so that the newest is the last of the dict
            ranking = self.rank(self.context.fleet, self.dispatcher, criteria, self.context.clock.now())
            shared = rankings[key] = _SharedRanking(now, asyncio.create_task(ranking))
        return await asyncio.shield(shared.ranking)

    def _require_another(self, request: GatewayRequest, failed: list[Failed]) -> None:
        """Refuse unless another attempt may be made.

        Raises:
            LucidError: the client has a part of its response, or the attempts or the retry budget are used up.
        """
        if request.has_begun or len(failed) >= MAX_ATTEMPTS or request.model.format is ModelFormat.API:
            if _are_lacking(failed):
                counted, count = {ReasonCode.MODEL_NOT_SERVED.value: len(failed)}, len(failed)
                name, endpoint = request.model.record.name, request.criteria.endpoint
                raise ModelUnavailable(name, counted, Shortage.NO_NODE, lacking=count, endpoint=endpoint)
            raise _error_of(failed, has_begun=request.has_begun)
        if failed[-1][1].kind is FaultKind.TOO_LARGE:  # and another node's would be as large
            raise _error_of(failed)
        # Nodes say "not offered" at once, and are asked once a minute: another attempt makes no outage worse.
        if not isinstance(failed[-1][1], NotOffered) and not self._retries.spend(time.monotonic()):
            raise _error_of(failed, ", and as many requests as may be are tried again already")
        self.retries += 1


def _error_of(failed: list[Failed], why: str = "", *, has_begun: bool = False) -> LucidError:
    attempts: list[dict[str, Any]] = [
        {"passportId": node.state.id if node else None, "reason": fault.reason} for node, fault in failed
    ]
    if any(_is_loop(fault) for _, fault in failed):
        return RoutingLoop(attempts)
    if all(fault.kind in TIMEOUTS for _, fault in failed):
        return NodeTimeout(attempts, has_begun=has_begun)
    return NodeFailed(attempts, why=_TOO_LARGE if failed[-1][1].kind is FaultKind.TOO_LARGE else why)


def _are_lacking(failed: list[Failed]) -> bool:
    """Return whether no node failed: every node that was tried does not offer what was asked for."""
    return bool(failed) and all(isinstance(fault, NotOffered) for _, fault in failed)


def _is_loop(fault: EgressFault) -> bool:
    came_back = isinstance(fault, BadStatus) and fault.status == _LOOP_STATUS
    return came_back or fault.kind is FaultKind.ROUTING_LOOP
