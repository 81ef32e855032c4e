"""One attempt to serve a request, as the job ledger and the statistics of nodes record it."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import (
    TIMEOUTS,
    BadStatus,
    Blame,
    ContextTooShort,
    EgressFault,
    FaultKind,
    NodeBusy,
    NotOffered,
)
from lucid_compute.egress.lookups import SLOW_NAME_SECONDS
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.endpoints import Billed
from lucid_compute.gateway.event_stream import EventStream, add_cost
from lucid_compute.gateway.node_json import clients_own_status, error_in, is_answer, read_answer, read_object
from lucid_compute.gateway.node_stats import ANY_ENDPOINT, Suspicion
from lucid_compute.gateway.node_words import message_in, names_stored, refusal_of, says_no_model, says_too_long
from lucid_compute.gateway.request import GatewayRequest
from lucid_compute.gateway.tracing import end_attempt
from lucid_compute.gateway.usage import (
    COUNTED_BYTES,
    Usage,
    charge,
    count_request,
    count_response,
    count_tokens,
    find_usage,
    plausible_usage,
)
from lucid_compute.registry.domain.prices import TokenPrice
from lucid_compute.registry.fleet.fleet import FleetNode
from lucid_compute.registry.routing_rules import context_on, id_on_node
from lucid_compute.web.lanes import CutReason
from lucid_compute.wire import write_money

CLIENTS_OWN = frozenset({400, 413, 422})
NOT_OFFERED = frozenset({404, 405, 501})
_UNKNOWN = Usage(None, None)
JSON = b"application/json"
_MAX_TYPE_BYTES = 100  # of a Content-Type that is passed on
OK, MULTIPLE_CHOICES = 200, 300  # plain numbers, because HTTPStatus costs a look-up each time


class NodeResponse(NamedTuple):
    """A complete response to be passed on."""

    status: int
    body: bytes
    content_type: bytes = JSON


class Attempt:
    """The attempt `number` (from 1) of a request, on `node`, or on the model's upstream when it is None.

    `Exchange` talks to the node.
    """

    __slots__ = (
        "_asks_usage",
        "_began_at",
        "_context",
        "_has_told_price",
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
        self._has_told_price = False  # in its stream, so nothing that follows changes it
        self._asks_usage = request.inference.adds_usage and not context.stats.refuses_question(self._question_id)
        self._span = None if request.span is None else request.span.child("attempt", is_outgoing=True)
        self._began_at = context.monotonic()
        self._job = request.running.job = Job(
            id=request.job_id,
            attempt=number,
            model_id=request.model.id,
            model_name=request.model.record.name,
            node_id=self._node_id,
            node_owner=None if node is None else node.record.owner,
            key_id=request.principal.key_id,
            consumer=request.principal.owner,
            endpoint=request.inference.endpoint.name,
            is_stream=request.inference.is_stream,
            started_at=now,
        )

    def begin(self) -> None:
        """Count the request as in flight on its node."""
        if self._node_id is not None:
            self._context.fleet.replicas.begin(self._node_id)
            self._number_on_node = self._context.stats.record_start(self._node_id)

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
        endpoint = self._request.inference.endpoint
        if endpoint.shape.media and (media := connection.content_type.strip().lower()).startswith(endpoint.shape.media):
            return self._accept_media(connection, media, body)
        value = read_answer(endpoint.shape, body)
        if value is None:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is not JSON.")
        if (error := error_in(value)) is not None:
            if (clients := clients_own_status(value, error)) is not None:
                return self._reject(clients, body)
            raise EgressFault(FaultKind.BAD_RESPONSE, f"The node's answer of status {status} holds an error.")
        if not is_answer(endpoint.shape, value, body):
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is JSON, but not a response of the endpoint.")
        if self._request.inference.is_stream and endpoint.stream is not None:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is one JSON object in place of a stream.")
        self.record_first_byte(connection.last_read_at)
        self.record_tokens(find_usage(body, counts_cached=endpoint.counts_cached), body)
        self._job.outcome = Outcome.COMPLETED
        return NodeResponse(status, body)

    def _accept_media(self, connection: HttpConnection, media: bytes, body: bytes) -> NodeResponse:
        """Return an answer that is no JSON, such as speech, with its own type.

        Raises:
            EgressFault: there is nothing in it.
        """
        if not body or len(media) > _MAX_TYPE_BYTES:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is empty, or its Content-Type is too long.")
        text_tokens = count_tokens(body[:COUNTED_BYTES]) if media.startswith(b"text/") else 0
        self.record_first_byte(connection.last_read_at)
        self.record_tokens(Usage(None, text_tokens), body)
        self._job.outcome = Outcome.COMPLETED
        return NodeResponse(connection.status, body, media)

    def _reject(self, status: int, body: bytes) -> NodeResponse:
        """Record that the node refused the request as the client's fault; return its response.

        Raises:
            ContextTooShort: the request is too long for this node, and another one may have a longer context.
        """
        if says_too_long(body) and self._may_be_longer_elsewhere():
            raise ContextTooShort(status, body)
        self._job.outcome, self._job.reason = Outcome.REJECTED, f"http_{status}"
        return NodeResponse(status, body)

    def _may_be_longer_elsewhere(self) -> bool:
        """Return whether a further model of the route, or another node, may have a longer context."""
        request, fleet = self._request, self._context.fleet
        if request.others or self._node is None:
            return bool(request.others)
        limit = context_on(request.model, self._node.state)
        if limit is None:
            return len(fleet.ring_of(request.model)) > 1
        nodes = fleet.serving_candidates(request.model, self._context.clock.now())
        return any((other := context_on(request.model, node)) is None or other > limit for node in nodes)

    def record_first_byte(self, at: float) -> None:
        """Record that the response began at this instant, for the job and for the next choices of a node."""
        job = self._job
        job.first_byte_ms = (at - self._began_at) * 1000
        if self._node_id is not None:
            self._context.stats.record_latency(self._node_id, self._request.criteria.kind, job.first_byte_ms)

    def record_tokens(self, usage: Usage | None, body: bytes = b"") -> None:
        """Record the tokens: the node's numbers if they are plausible, else our count of what was delivered."""
        job, stream = self._job, self._stream
        if self._has_told_price:
            return
        delivered_bytes = len(body) if stream is None else stream.delivered_bytes
        inference = self._request.inference
        if inference.endpoint.billed is Billed.NOTHING:
            job.are_tokens_counted, job.tokens_in, job.tokens_out = False, 0, 0
            return
        tokens_in, tokens_out = plausible_usage(usage, inference, delivered_bytes) or _UNKNOWN
        job.are_tokens_counted = tokens_in is None or tokens_out is None
        if tokens_out is None:
            delivered = 0
            if inference.endpoint.billed is Billed.TEXT:
                delivered = max(stream.pieces, 0) if stream is not None else count_response(body)
            most = inference.max_tokens_out
            tokens_out = delivered if most is None else min(delivered, most)
        job.tokens_in = count_request(inference) if tokens_in is None else tokens_in
        job.tokens_out = tokens_out

    def tell_price(self, usage: Usage, events: bytes) -> bytes:
        """Return the events with the request's price beside its usage, if the client asked for that and it is the last.

        What is told is what is billed.
        """
        price = self._price
        if price is None or self._asks_usage or self._has_told_price:
            return events
        self.record_tokens(usage)
        told = add_cost(events, write_money(price.of(self._job.tokens_in or 0, self._job.tokens_out or 0)))
        self._has_told_price = told != events
        return told

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
                asked = Suspicion(self._request.model.id, self._request.principal.key_id, fault.kind in TIMEOUTS)
                stats.record_suspicion(self._node_id, self._number_on_node, suspicion=asked)
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
        job.latency_ms = (self._context.monotonic() - self._began_at) * 1000
        if job.tokens_in is not None:
            self._request.tokens += job.tokens_in + (job.tokens_out or 0)
            job.price_usd = charge(job, self._price)
        self._context.ledger.finish(job)
        self._context.metrics.record(job)
        if self._span is not None:
            end_attempt(self._span, job)

    # --- inside

    @property
    def _price(self) -> TokenPrice | None:
        """The node's price for the model; None without one. An upstream names none."""
        return None if self._passport is None else self._passport.price_of(self._request.model.known_as)

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
            endpoint, owner = ANY_ENDPOINT if is_model else inference.endpoint.name, self._request.principal.owner
            self._context.stats.record_lack(self._node_id, endpoint, self._request.model.id, owner)
        return NotOffered(status, message_in(body), is_model=is_model, is_learned=is_learned)
