"""The gateway: serves one request from the node where it waits least, and from the next when that one fails.

Until the first byte has gone to the client a failing node is replaced without it noticing; after that the stream ends
with an error that OpenAI's clients raise, and what was delivered is what is billed.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Hashable
from datetime import datetime
from typing import Any, NamedTuple

from lucid_compute.egress.faults import TIMEOUTS, BadStatus, EgressFault, FaultKind, NotOffered
from lucid_compute.errors import LucidError, ModelUnavailable, NodeFailed, NodeTimeout, RoutingLoop, Shortage
from lucid_compute.gateway.attempt import Ready, TaskAttempt
from lucid_compute.gateway.breakers import RetryBudget
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.dispatcher import Dispatcher
from lucid_compute.gateway.ranking import Ranking, rank
from lucid_compute.gateway.request import Call, Criteria
from lucid_compute.gateway.tracing import end_choice
from lucid_compute.registry.domain.passports import ModelFormat
from lucid_compute.registry.fleet.fleet import FleetNode
from lucid_compute.registry.matching_engine import ReasonCode

MAX_ATTEMPTS = 3
REJECTIONS_KEPT_SECONDS = 0.5
_LOOP_STATUS = RoutingLoop.status
Failed = tuple[FleetNode | None, EgressFault]


class _Look(NamedTuple):
    """A look at every node, for those that none of them may serve."""

    began_at: float
    ranking: asyncio.Task[Ranking]

    def is_old(self, now: float) -> bool:
        """Return whether what it found is no longer to be told."""
        return self.ranking.done() and now - self.began_at > REJECTIONS_KEPT_SECONDS


class Gateway:
    """Serves the calls of one replica."""

    def __init__(self, tools: GatewayContext) -> None:
        self.tools = tools
        self._retries = RetryBudget()
        self._looks: dict[Hashable, _Look] = {}
        self.dispatcher = Dispatcher(tools.fleet, tools.traffic)
        self.own_endpoints = tools.client.own_endpoints
        self.faults: Counter[str] = Counter()
        self.retries = 0

    def find_ready(self, call: Call, now: datetime) -> Ready | None:
        """Return a node that can be sent the call at once and answer it whole; None when a few looks found none."""
        if call.request.is_stream or call.model.format is ModelFormat.API:
            return None
        node = self.dispatcher.find_quickly(call.wanted, now)
        if node is None:
            return None
        try:
            target = self.tools.targets.of_node(node)
        except EgressFault:
            return None
        connection = self.tools.client.take_idle(target.url)
        if connection is None:
            if call.wanted.explores:  # else a node that closes its connections soon would never be looked at
                self.tools.traffic.put_off_exploring(call.wanted.kind)
            return None
        return Ready(node, target, connection)

    def note_request(self) -> None:
        """Count a request that may be tried again."""
        self._retries.note_request(time.monotonic())

    async def serve(self, call: Call, first: Failed | None = None) -> None:
        """Return the call; `first` is the attempt that failed already.

        Raises:
            ModelUnavailable: no node may be sent it.
            NodeFailed, NodeTimeout, RoutingLoop: nobody served it. When `call.has_begun` its stream has to be ended.
        """
        failed: list[Failed] = []
        if first is not None:
            self._note_failed(call, failed, first)
        while True:
            node = await (self._next_node if call.span is None else self._choose_traced)(call, failed)
            try:
                await TaskAttempt(self.tools, call, node, len(failed) + 1, self.tools.clock.now()).run()
            except EgressFault as fault:
                self._note_failed(call, failed, (node, fault))
            else:
                return

    def _note_failed(self, call: Call, failed: list[Failed], last: Failed) -> None:
        """Note an attempt that failed.

        Raises:
            LucidError: there may be no further one.
        """
        node, fault = last
        failed.append((node, fault.with_traceback(None)))  # else the two would hold each other, and the call
        self.faults[fault.reason] += 1
        self._require_another(call, failed)
        call.wanted.tried = {tried.state.id for tried, _ in failed if tried is not None}

    async def _choose_traced(self, call: Call, failed: list[Failed]) -> FleetNode | None:
        """Return as `_next_node`, in a span of its own."""
        if (span := call.span and call.span.child("choose")) is None:
            return await self._next_node(call, failed)
        try:
            node = await self._next_node(call, failed)
        except LucidError as error:
            span.end(error.code)
            raise
        except BaseException:  # mostly that its client left; a span is ended whatever happens
            span.end("cancelled")
            raise
        end_choice(span, node)
        return node

    async def _next_node(self, call: Call, failed: list[Failed]) -> FleetNode | None:
        """Return the node for the next attempt; None is the model's upstream."""
        wanted = call.wanted
        if wanted.model.format is ModelFormat.API:
            if not wanted.model.record.metadata.get("upstream"):
                raise ModelUnavailable(wanted.model.record.name, {ReasonCode.MODEL_NOT_SERVED: 1}, Shortage.NO_UPSTREAM)
            return None
        now = self.tools.clock.now()
        node = self.dispatcher.find_quickly(wanted, now) or await self.dispatcher.find(wanted, now)
        if node is None:
            if failed and not _are_lacking(failed):
                raise _error_of(failed, ", and there is no other node")
            found = await self._look_around(wanted)
            name, counted = wanted.model.record.name, found.rejections
            raise ModelUnavailable(name, counted, found.shortage, lacking=found.lacking, endpoint=wanted.endpoint)
        return node

    async def _look_around(self, wanted: Criteria) -> Ranking:
        """Return why no node may serve what is wanted; for a while it is the same for the next one of that model.

        Every node is looked at for it, so calls that ask at the same time wait for one look.
        """
        now, looks = time.monotonic(), self._looks
        key = (wanted.model.id, wanted.endpoint, wanted.policy)
        while looks and (oldest := next(iter(looks.items())))[1].is_old(now):
            del looks[oldest[0]]
        look = looks.get(key)
        if look is None or look.is_old(now):
            looks.pop(key, None)  # the ones last begun stand last
            ranking = rank(self.tools.fleet, self.dispatcher, wanted, self.tools.clock.now())
            look = looks[key] = _Look(now, asyncio.create_task(ranking))
        return await asyncio.shield(look.ranking)

    def _require_another(self, call: Call, failed: list[Failed]) -> None:
        """Refuse unless another attempt may be made.

        Raises:
            LucidError: the client has a part of its answer, or the attempts or the budget are used up.
        """
        if call.has_begun or len(failed) >= MAX_ATTEMPTS or call.model.format is ModelFormat.API:
            if _are_lacking(failed):
                counted, count = {ReasonCode.MODEL_NOT_SERVED.value: len(failed)}, len(failed)
                name, endpoint = call.model.record.name, call.wanted.endpoint
                raise ModelUnavailable(name, counted, Shortage.NO_NODE, lacking=count, endpoint=endpoint)
            raise _error_of(failed)
        # "Not offered" is said at once and asked for once a minute: to go on after it makes no outage worse.
        if not isinstance(failed[-1][1], NotOffered) and not self._retries.take(time.monotonic()):
            raise _error_of(failed, ", and as many requests as may be are tried again already")
        self.retries += 1


def _error_of(failed: list[Failed], why: str = "") -> LucidError:
    attempts: list[dict[str, Any]] = [
        {"passportId": node.state.id if node else None, "reason": fault.reason} for node, fault in failed
    ]
    if any(_is_loop(fault) for _, fault in failed):
        return RoutingLoop(attempts)
    if all(fault.kind in TIMEOUTS for _, fault in failed):
        return NodeTimeout(attempts)
    return NodeFailed(attempts, why=why)


def _are_lacking(failed: list[Failed]) -> bool:
    """Return whether no node failed: all that were asked do not offer what was asked for."""
    return bool(failed) and all(isinstance(fault, NotOffered) for _, fault in failed)


def _is_loop(fault: EgressFault) -> bool:
    is_answered = isinstance(fault, BadStatus) and fault.status == _LOOP_STATUS
    return is_answered or fault.kind is FaultKind.ROUTING_LOOP
