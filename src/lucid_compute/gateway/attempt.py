"""One attempt to serve a request: send it to a node, judge the response, pass it on, write the job to the ledger."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime
from typing import NamedTuple

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import BadStatus, Blame, EgressFault, FaultKind, NodeBusy, NotOffered
from lucid_compute.egress.lookups import SLOW_NAME_SECONDS
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.event_stream import EventStream
from lucid_compute.gateway.node_json import clients_own_status, error_in, is_response, read_object
from lucid_compute.gateway.node_stats import ANY_ENDPOINT
from lucid_compute.gateway.node_words import message_in, names_stored, refusal_of, says_no_model
from lucid_compute.gateway.relay import relay
from lucid_compute.gateway.request import GatewayRequest, RunningRequest
from lucid_compute.gateway.tracing import end_attempt
from lucid_compute.gateway.upstreams import Target
from lucid_compute.gateway.usage import Usage, charge, count_request, count_response, find_usage, plausible_usage
from lucid_compute.registry.fleet.fleet import FleetNode
from lucid_compute.registry.routing_rules import id_on_node
from lucid_compute.web.lanes import CutReason

CLIENTS_OWN = frozenset({400, 413, 422})
NOT_OFFERED = frozenset({404, 405, 501})
JSON = b"application/json"
OK, MULTIPLE_CHOICES = 200, 300  # plain numbers, because HTTPStatus costs a look-up each time


class NodeResponse(NamedTuple):
    """A complete response to be passed on."""

    status: int
    body: bytes


class Attempt:
    """The attempt `number` (from 1) of a request, on `node`, or on the model's upstream when it is None."""

    __slots__ = (
        "_asks_usage",
        "_began_at",
        "_context",
        "_job",
        "_node",
        "_node_id",
        "_number",
        "_number_on_node",
        "_passport",
        "_request",
        "_span",
        "_stream",
    )

    def __init__(
        self, context: GatewayContext, request: GatewayRequest, node: FleetNode | None, number: int, now: datetime
    ) -> None:
        """Create its job, dispatched at `now` by the database's clock; nothing is sent yet."""
        self._context = context
        self._request = request
        self._node = node
        # As of the choice of the node, when its price was compared with the request's limit.
        passport = self._passport = None if node is None else node.state.passport
        self._node_id = None if passport is None else passport.id
        self._number = number
        self._number_on_node = 0  # from `FleetStats.record_start`
        self._stream: EventStream | None = None
        # As the client did not, and unless the node is known to refuse that.
        self._asks_usage = request.inference.adds_usage and not context.stats.refuses_question(self._question_id)
        self._span = None if request.span is None else request.span.child("attempt", is_outgoing=True)
        self._began_at = time.monotonic()
        self._job = request.running.job = Job(
            id=request.job_id,
            attempt=number,
            model_id=request.model.id,
            model_name=request.model.record.name,
            node_id=self._node_id,
            node_owner=None if node is None else node.record.owner,
            key_id=request.principal.key_id,
            consumer=request.principal.owner,
            endpoint=request.inference.endpoint,
            is_stream=request.inference.is_stream,
            started_at=now,
        )

    def begin(self) -> None:
        """Count the request as in flight on its node."""
        if self._node_id is not None:
            self._context.fleet.replicas.begin(self._node_id)
            self._number_on_node = self._context.stats.record_start(self._node_id)

    def target(self) -> Target:
        """Return where the request is sent.

        Raises:
            EgressFault: the egress policy forbids the URL, or the model has no upstream.
        """
        upstreams = self._context.upstreams
        if self._node is not None:
            return upstreams.of_node(self._node)
        target = upstreams.of_api_model(self._request.model)
        if target is None:
            raise EgressFault(FaultKind.NAME_UNKNOWN, "The model has no upstream.")
        return target

    def send(self, connection: HttpConnection, target: Target) -> None:
        """Write the request; what the connection receives from now on is the response."""
        inference = self._request.inference
        head = target.head(inference.endpoint, self._request.job_id)
        if self._span is not None:
            head += b"traceparent: %b\r\n" % self._span.traceparent
        connection.send(head, self._body(), self._context.deadlines, wants_stream=inference.is_stream)

    def judge(self, connection: HttpConnection, body: bytes) -> NodeResponse:
        """Return what a complete response means to the client, and record it in the job.

        Raises:
            EgressFault: the node failed; the next one may be tried.
        """
        status = self._job.status = connection.status
        if status in CLIENTS_OWN and read_object(body) is not None:
            return self._reject(status, body)
        if status in NOT_OFFERED:
            raise self._record_lack(status, body)
        if not OK <= status < MULTIPLE_CHOICES:
            raise self._record_refusal(status, connection.retry_after, body)
        value = read_object(body)
        if value is None:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is not JSON.")
        if (error := error_in(value)) is not None:
            if (clients := clients_own_status(value, error)) is not None:
                return self._reject(clients, body)
            raise EgressFault(FaultKind.BAD_RESPONSE, f"The node's answer of status {status} holds an error.")
        if not is_response(self._request.inference.endpoint, value, body):
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is JSON, but not a response of the endpoint.")
        self.record_first_byte()
        self.record_tokens(find_usage(body), body)
        self._job.outcome = Outcome.COMPLETED
        return NodeResponse(status, body)

    def _reject(self, status: int, body: bytes) -> NodeResponse:
        """Record that the node refused the request as the client's fault; return its response."""
        self._job.outcome, self._job.reason = Outcome.REJECTED, f"http_{status}"
        return NodeResponse(status, body)

    def record_first_byte(self) -> None:
        """Record how long the response took to begin, for the job and for the next choices of a node."""
        job = self._job
        job.first_byte_ms = (time.monotonic() - self._began_at) * 1000
        if self._node_id is not None:
            self._context.stats.record_latency(self._node_id, self._request.criteria.kind, job.first_byte_ms)

    def record_tokens(self, usage: Usage | None, body: bytes = b"") -> None:
        """Record the tokens: the node's numbers if they are plausible, else our count of what was delivered."""
        job, stream = self._job, self._stream
        delivered_bytes = len(body) if stream is None else stream.delivered_bytes
        inference = self._request.inference
        usage = plausible_usage(usage, inference, delivered_bytes)
        job.are_tokens_counted = usage is None or usage.tokens_in is None
        if usage is None:
            delivered = max(stream.pieces, 0) if stream is not None else count_response(body)
            most = inference.max_tokens_out
            usage = Usage(None, delivered if most is None else min(delivered, most))
        job.tokens_in = count_request(inference) if usage.tokens_in is None else usage.tokens_in
        job.tokens_out = usage.tokens_out

    def record_success(self) -> None:
        """Record that the node served the request, or refused it as the client's fault."""
        if self._node_id is not None:
            self._context.stats.record_success(self._node_id)

    def record_fault(self, fault: EgressFault) -> None:
        """Record that the node failed or does not offer what was asked, and what was delivered until then.

        Whether the node or the request is to blame may be known only when another node was tried: see `Gateway`.
        """
        job, stats = self._job, self._context.stats
        fault.number = self._number_on_node
        blame = fault.blame
        job.outcome, job.reason = Outcome.FAILED, fault.reason
        if blame is Blame.NOT_THE_PROVIDER or self._request.failed_alike(fault):
            job.outcome = Outcome.REJECTED
        if self._node is not None and self._node_id is not None:
            if fault.kind is FaultKind.OUR_RESOLVER:
                stats.record_suspicion(self._node_id, self._number_on_node, SLOW_NAME_SECONDS)
            elif blame is Blame.NOT_THE_PROVIDER:
                stats.record_inconclusive(self._node_id, self._number_on_node)
            elif blame is Blame.PERHAPS_THE_REQUEST and not self._request.has_begun:
                stats.record_suspicion(self._node_id, self._number_on_node)
            else:
                stats.record_failure(self._node, self._number_on_node)
        if self._stream is not None and self._request.has_begun:
            self.record_tokens(self._stream.usage)

    def record_cancelled(self, reason: CutReason) -> None:
        """Record that the client or this service ended the request, which is no evidence about the node."""
        self._job.outcome, self._job.reason = Outcome.CANCELLED, reason
        if self._node_id is not None:
            self._context.stats.record_inconclusive(self._node_id, self._number_on_node)

    def record_internal_error(self) -> None:
        """Record that this service failed."""
        self._job.outcome, self._job.reason = Outcome.FAILED, "internal"

    def close(self) -> None:
        """End the attempt: compute its price and tokens, and pass the job to the ledger and the metrics."""
        self._uncount()
        job = self._job
        if job.outcome is Outcome.CANCELLED and self._stream is not None and self._request.has_begun:
            self.record_tokens(self._stream.usage)
        job.latency_ms = (time.monotonic() - self._began_at) * 1000
        if job.tokens_in is not None:
            self._request.tokens += job.tokens_in + (job.tokens_out or 0)
            if self._passport is not None:  # an upstream names no price
                job.price_usd = charge(job, self._passport.price_of(self._request.model.known_as))
        self._context.ledger.finish(job)
        self._context.metrics.record(job)
        if self._span is not None:
            end_attempt(self._span, job)

    @property
    def can_be_undone(self) -> bool:
        """Return whether the ledger lacks the job. One in the ledger ran so long that the node had received it."""
        return not self._job.is_written

    def undo(self) -> None:
        """Undo `begin`: the request never reached the node, and nothing is written to the ledger."""
        self._uncount()
        self._request.running.job = None
        if self._node_id is not None:
            self._context.stats.record_inconclusive(self._node_id, self._number_on_node)

    # --- inside

    def _uncount(self) -> None:
        if self._node_id is not None:
            self._context.fleet.replicas.end(self._node_id)

    def _body(self) -> bytes:
        return self._request.inference.body_for(self._model_id(), asks_usage=self._asks_usage)

    def _model_id(self) -> str:
        """Return the id under which the node or the upstream knows the model."""
        model = self._request.model
        if self._node is not None:
            return id_on_node(model, self._node.state)
        return str(model.record.metadata["upstream"].get("model") or model.record.name)

    @property
    def _question_id(self) -> str:
        """What is remembered to refuse our question for a stream's usage: the node, or the model's upstream."""
        return self._node_id or self._request.model.id

    def _record_refusal(self, status: int, retry_after: bytes, body: bytes) -> BadStatus:
        """Return what a status outside 2xx means as a fault; record if it means that the node is busy."""
        fault = refusal_of(status, retry_after, body, self._context.clock.now())
        if isinstance(fault, NodeBusy) and self._node_id is not None:
            self._context.stats.record_full(self._node_id, fault.retry_after_seconds)
        return fault

    def _record_lack(self, status: int, body: bytes) -> NotOffered:
        """Record that the node does not offer what was asked for; return that as a fault.

        It is recorded for this model alone: the node may serve other models at the endpoint. So a client that asks a
        chat model for embeddings takes them from no other model. A request that may name a thing which another node has
        stored proves nothing, since its 404 may be about that.
        """
        inference = self._request.inference
        is_learned = not any(map(names_stored, inference.parts))
        is_model = is_learned and says_no_model(body, self._model_id())
        if self._node_id is not None and is_learned:
            endpoint, owner = ANY_ENDPOINT if is_model else inference.endpoint, self._request.principal.owner
            self._context.stats.record_lack(self._node_id, endpoint, self._request.model.id, owner)
        return NotOffered(status, message_in(body), is_model=is_model, is_learned=is_learned)


def was_closed_while_idle(connection: HttpConnection, fault: EgressFault) -> bool:
    """Return whether the node closed the idle connection before it read the request, which is no failure."""
    return fault.kind is FaultKind.CONNECTION_LOST and not (connection.has_head or connection.has_received)


class ReadyNode(NamedTuple):
    """A node with an idle connection: a request can be sent to it at once."""

    node: FleetNode
    target: Target
    connection: HttpConnection


class NeedsTask(NamedTuple):
    """The ending of a fast-path request that continues in a task; `failed` is the first node and its fault, if any."""

    failed: tuple[FleetNode, EgressFault] | None


Ending = NodeResponse | NeedsTask | CutReason | Exception
OnEnd = Callable[["TasklessRequest", Ending], None]


class TasklessRequest(RunningRequest):
    """A request of the fast path, served without a task. It ends once, and then calls `on_end` with its ending."""

    __slots__ = ("_attempt", "_context", "_on_end", "_ready", "request")
    __deletable__ = ("request",)

    request: GatewayRequest
    _ready: ReadyNode

    def __init__(self, context: GatewayContext, on_end: OnEnd) -> None:
        super().__init__()
        self.has_body = True
        self._context = context
        self._on_end = on_end
        self._attempt: Attempt | None = None

    @property
    def node_id(self) -> str:
        """The node that serves the request."""
        return self._ready.node.state.id

    def start(self, request: GatewayRequest, ready: ReadyNode, now: datetime) -> None:
        """Send the request to the node."""
        self.request = request
        self._ready = ready
        attempt = self._attempt = Attempt(self._context, request, ready.node, 1, now)
        attempt.begin()
        ready.connection.on_ready = self._receive
        attempt.send(ready.connection, ready.target)

    def leave(self) -> None:
        """End the request because its client disconnected."""
        self.end(CutReason.CLIENT_LEFT)

    def end(self, reason: CutReason) -> None:
        """End the request before its response is complete: close the connection to the node at once."""
        attempt = self._attempt
        if attempt is not None:
            self.cut = reason
            attempt.record_cancelled(reason)
            self._finish(attempt)
            self._report(reason)

    def _receive(self) -> None:
        """Read the node's response or its failure. This must not raise, because a transport calls it."""
        attempt, connection = self._attempt, self._ready.connection
        if attempt is None or not connection.is_ready:
            return
        ending: Ending
        try:
            ending = attempt.judge(connection, connection.read_available())
            attempt.record_success()
        except EgressFault as fault:
            if was_closed_while_idle(connection, fault) and attempt.can_be_undone:
                self._attempt = connection.on_ready = None
                attempt.undo()
                self.request.avoids_idle = True
                self._context.client.release(self._ready.target.url, connection)
                self._report(NeedsTask(None))
                return
            attempt.record_fault(fault)
            ending = NeedsTask((self._ready.node, fault.with_traceback(None)))  # its traceback holds this frame
        except Exception as error:  # noqa: BLE001 - becomes the same response as in a task
            attempt.record_internal_error()
            ending = error
        self._finish(attempt)
        self._report(ending)

    def _report(self, ending: Ending) -> None:
        self._on_end(self, ending)
        del self.request  # a cycle, which only garbage collection would free

    def _finish(self, attempt: Attempt) -> None:
        self._attempt = self._ready.connection.on_ready = None  # a cycle, which only garbage collection would free
        attempt.close()
        self._context.client.release(self._ready.target.url, self._ready.connection)


_EVENTS = b"text/event-stream; charset=utf-8"


class TaskAttempt(Attempt):
    """An `Attempt` that a task runs."""

    __slots__ = ()

    async def run(self) -> None:
        """Serve the request.

        Raises:
            EgressFault: the node failed; `request.has_begun` says whether the client has a part of its response.
        """
        self.begin()
        try:
            response = await self._send_and_receive()
            self.record_success()
        except EgressFault as fault:
            self.record_fault(fault)
            raise
        except asyncio.CancelledError:
            self.record_cancelled(self._request.running.cut or CutReason.SHUTDOWN)
            raise
        except Exception:  # a fault of ours, and the job says so
            self.record_internal_error()
            raise
        finally:
            self.close()
        if response is not None:
            await self._request.start(response.status, JSON, self._node_id, self._number, len(response.body))
            await self._request.write(response.body, more=False)

    async def _send_and_receive(self) -> NodeResponse | None:
        """Return the node's complete response; None for a stream, which has been passed on already.

        A server that refuses our question for the usage is sent the request without it. That it refuses the question is
        remembered if it then accepts the request: else the client has made it name the field.
        """
        response = await self._send_once()
        if response is None or not self._asks_usage or b"stream_options" not in response.body:
            return response
        self._asks_usage, self._job.reason = False, None
        response = await self._send_once()
        if response is None or response.status < MULTIPLE_CHOICES:
            self._context.stats.record_question_refused(self._question_id)
        return response

    async def _send_once(self) -> NodeResponse | None:
        target = self.target()
        client = self._context.client
        if not self._request.avoids_idle and (connection := client.acquire_idle(target.url)) is not None:
            try:
                return await self._exchange(connection, target)
            except EgressFault as fault:
                if not was_closed_while_idle(connection, fault):
                    raise
                self._request.avoids_idle = True
        connection = await client.connect(target.url, owner=target.owner)
        if self._has_left():
            client.release(target.url, connection)
            raise EgressFault(FaultKind.NODE_LEFT, "The node was drained while it was connected to.")
        return await self._exchange(connection, target)

    def _has_left(self) -> bool:
        """Return whether the node drains or has ended, maybe since it was chosen: connecting takes seconds at worst."""
        node = self._node
        return node is not None and (node.state.is_draining or node.record.has_ended)

    async def _exchange(self, connection: HttpConnection, target: Target) -> NodeResponse | None:
        try:
            self.send(connection, target)
            block = await connection.receive()
            if connection.is_stream:
                await self._relay(connection, block)
                return None
            return self.judge(connection, block)
        finally:
            self._context.client.release(target.url, connection)

    async def _relay(self, connection: HttpConnection, block: bytes) -> None:
        """Pass a stream on, event by event, until the node says that it is done."""
        inference = self._request.inference
        stream = self._stream = self._context.event_stream(
            inference.endpoint,
            withholds_usage=self._asks_usage,
            choices=inference.choice_count,
            max_event_bytes=self._context.max_event_bytes,
        )
        self._job.status = connection.status
        await relay(connection, stream, block, self._pass_on)
        self.record_tokens(stream.usage)
        self._job.outcome = Outcome.REJECTED if stream.is_refused else Outcome.COMPLETED

    async def _pass_on(self, events: bytes, *, more: bool) -> None:
        request = self._request
        if not request.has_begun:
            self.record_first_byte()
            await request.start(OK, _EVENTS, self._node_id, self._number)
        await request.write(events, more=more)
