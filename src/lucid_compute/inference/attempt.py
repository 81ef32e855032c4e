"""One attempt to have a request served: sent to one node, its answer judged, passed on and entered in the ledger."""

from __future__ import annotations

import re
import time
from datetime import datetime
from http import HTTPStatus
from typing import NamedTuple

from lucid_compute.egress.faults import BadStatus, EgressFault, FaultKind, NotOffered
from lucid_compute.egress.http_connection import HttpConnection
from lucid_compute.errors import InvalidRequest
from lucid_compute.field_faults import FieldFault
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.accounting import charge, count_answer, count_request
from lucid_compute.inference.call import Call
from lucid_compute.inference.event_stream import EventStream
from lucid_compute.inference.exchange import CutReason
from lucid_compute.inference.spans import end_attempt
from lucid_compute.inference.targets import Target
from lucid_compute.inference.tools import Tools
from lucid_compute.inference.traffic import ANY_ENDPOINT
from lucid_compute.inference.usage import Usage, find_usage
from lucid_compute.jobs import Job, Outcome
from lucid_compute.routing_rules import id_on_node

CLIENTS_OWN = frozenset({400, 413, 422})
NOT_OFFERED = frozenset({404, 405, 501})
# How servers say that they have not loaded a model: OpenAI's code; vLLM's, SGLang's, Ollama's and llama-swap's words.
_NO_MODEL = re.compile(rb'(?is)"model_not_found"|\bmodel\b.{1,600}?(?:not found|does not exist|not available)')
_LOOKED_AT_BYTES = 4096  # of a refusal, which is a sentence
FULL_SECONDS = 1.0
MAX_FULL_SECONDS = 30.0
JSON = b"application/json"
OK, MULTIPLE_CHOICES = 200, 300  # plain numbers, because HTTPStatus costs a look-up each time


class Answer(NamedTuple):
    """A whole answer to be passed on."""

    status: int
    body: bytes

    @property
    def refusal(self) -> InvalidRequest | None:
        """What to say in place of a node that refused the request and did not say why; None when it said."""
        if self.body:
            return None
        sentence = f"The node refused the request with status {self.status} and did not say why."
        return InvalidRequest([FieldFault("", sentence)], status=self.status)


class Attempt:
    """The attempt `number` (from 1) of a call, on `node`, or on the model's upstream when it is None."""

    __slots__ = (
        "_began_at",
        "_call",
        "_job",
        "_node",
        "_node_id",
        "_number",
        "_passport",
        "_span",
        "_stream",
        "_tools",
        "_turn",
    )

    def __init__(self, tools: Tools, call: Call, node: FleetNode | None, number: int, now: datetime) -> None:
        """Dispatch it at `now`, by the database's clock; nothing is sent yet."""
        self._tools = tools
        self._call = call
        self._node = node
        # As it was when the node was chosen: its price was held against the request's limit then.
        passport = self._passport = None if node is None else node.state.passport
        self._node_id = None if passport is None else passport.id
        self._number = number
        self._turn = 0  # its number among the node's requests
        self._stream: EventStream | None = None
        self._span = None if call.span is None else call.span.child("attempt", is_outgoing=True)
        self._began_at = time.monotonic()
        self._job = call.exchange.job = Job(
            id=call.job_id,
            attempt=number,
            model_id=call.model.id,
            model_name=call.model.record.name,
            node_id=self._node_id,
            node_owner=None if node is None else node.record.owner,
            key_id=call.principal.key_id,
            consumer=call.principal.owner,
            endpoint=call.request.endpoint,
            is_stream=call.request.is_stream,
            started_at=now,
        )

    def begin(self) -> None:
        """Count the request on its node."""
        if self._node_id is not None:
            self._tools.fleet.replicas.begin(self._node_id)
            self._turn = self._tools.traffic.note_start(self._node_id)

    def target(self) -> Target:
        """Answer where it is to be sent.

        Raises:
            EgressFault: nowhere that this service may call.
        """
        targets = self._tools.targets
        if self._node is not None:
            return targets.of_node(self._node)
        target = targets.of_upstream(self._call.model)
        if target is None:
            raise EgressFault(FaultKind.NAME_UNKNOWN, "The model has no upstream.")
        return target

    def send(self, connection: HttpConnection, target: Target) -> None:
        """Write the request; what the connection takes in from now on is its answer."""
        request = self._call.request
        head = target.head(request.endpoint, self._call.job_id)
        if self._span is not None:
            head += b"traceparent: %b\r\n" % self._span.traceparent
        connection.send(head, self._body(), self._tools.deadlines, wants_stream=request.is_stream)

    def judge(self, connection: HttpConnection, body: bytes) -> Answer:
        """Answer what a whole answer means to the client, and enter it.

        Raises:
            EgressFault: it is one to try the next node after.
        """
        status, job = connection.status, self._job
        job.status = status
        is_json = JSON in connection.content_type or b"+json" in connection.content_type
        if status in CLIENTS_OWN:
            job.outcome, job.reason = Outcome.REJECTED, f"http_{status}"
            return Answer(status, body if is_json and body else b"")
        if status in NOT_OFFERED:
            raise self._learn_lack(status, body)
        if not OK <= status < MULTIPLE_CHOICES:
            self._learn_from(status, connection.retry_after)
            raise BadStatus(status)
        if not is_json or not body:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is not JSON.")
        self.note_first_byte()
        self.enter(find_usage(body), body)
        job.outcome = Outcome.COMPLETED
        return Answer(status, body)

    def note_first_byte(self) -> None:
        """Enter how long the answer took to begin, and let choices of a node learn from it."""
        job = self._job
        job.first_byte_ms = (time.monotonic() - self._began_at) * 1000
        if self._node_id is not None:
            self._tools.traffic.note_latency(self._node_id, self._call.wanted.kind, job.first_byte_ms)

    def enter(self, usage: Usage | None, body: bytes = b"") -> None:
        """Enter the tokens: the node's word, else our count of what was delivered."""
        job, stream = self._job, self._stream
        job.are_tokens_counted = usage is None or usage.tokens_in is None
        if usage is None:
            delivered = max(stream.pieces, 0) if stream is not None else count_answer(body)
            usage = Usage(None, delivered)
        job.tokens_in = count_request(self._call.request) if usage.tokens_in is None else usage.tokens_in
        job.tokens_out = usage.tokens_out

    def note_success(self) -> None:
        """Note that the node did what it was asked, or told the client that it could not have."""
        if self._node_id is not None:
            self._tools.traffic.note_success(self._node_id)

    def note_fault(self, fault: EgressFault) -> None:
        """Note that the node failed, or can't do what was asked, and what was delivered until then."""
        job = self._job
        job.outcome, job.reason = Outcome.FAILED, fault.reason
        if isinstance(fault, NotOffered):
            job.outcome = Outcome.REJECTED
        if self._node is not None and self._node_id is not None:
            if isinstance(fault, NotOffered) or job.status == HTTPStatus.TOO_MANY_REQUESTS:
                self._tools.traffic.note_nothing(self._node_id, self._turn)
            else:
                self._tools.traffic.note_failure(self._node, self._turn)
        if self._stream is not None and self._call.has_begun:
            self.enter(self._stream.usage)

    def note_cancelled(self, reason: CutReason) -> None:
        """Note that it was ended from our side or the client's, which says nothing of the node."""
        self._job.outcome, self._job.reason = Outcome.CANCELLED, reason
        if self._node_id is not None:
            self._tools.traffic.note_nothing(self._node_id, self._turn)

    def note_broken(self) -> None:
        """Note that we failed ourselves."""
        self._job.outcome, self._job.reason = Outcome.FAILED, "internal"

    def close(self) -> None:
        """Count it no longer, and hand the job to the ledger and the tally, its price and the call's cost settled."""
        self._uncount()
        job = self._job
        if job.outcome is Outcome.CANCELLED and self._stream is not None and self._call.has_begun:
            self.enter(self._stream.usage)
        job.latency_ms = (time.monotonic() - self._began_at) * 1000
        if job.tokens_in is not None:
            self._call.tokens += job.tokens_in + (job.tokens_out or 0)
            if self._passport is not None:  # an upstream names no price
                job.price_usd = charge(job, self._passport.price_of(self._call.model.known_as))
        self._tools.ledger.finish(job)
        self._tools.tally.note(job)
        if self._span is not None:
            end_attempt(self._span, job)

    @property
    def can_be_undone(self) -> bool:
        """Whether no ledger has heard of it: what ran for so long has reached the node, and died with it."""
        return not self._job.is_written

    def undo(self) -> None:
        """Take back that it was begun: it never reached the node, and no ledger hears of it."""
        self._uncount()
        self._call.exchange.job = None
        if self._node_id is not None:
            self._tools.traffic.note_nothing(self._node_id, self._turn)

    # --- inside

    def _uncount(self) -> None:
        if self._node_id is not None:
            self._tools.fleet.replicas.end(self._node_id)

    def _body(self) -> bytes:
        model = self._call.model
        if self._node is not None:
            return self._call.request.body_for(id_on_node(model, self._node.state))
        return self._call.request.body_for(model.record.metadata["upstream"].get("model") or model.record.name)

    def _learn_from(self, status: int, retry_after: bytes) -> None:
        if self._node_id is None:
            return
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            seconds = float(retry_after) if retry_after.isdigit() else FULL_SECONDS
            self._tools.traffic.note_full(self._node_id, min(seconds, MAX_FULL_SECONDS))

    def _learn_lack(self, status: int, body: bytes) -> NotOffered:
        """Learn that the node does not offer what was asked for, and answer that as a fault.

        It is learnt of this model alone: another one of the node may well be served at the endpoint, and a client that
        asks a chat model for embeddings takes them from nobody.
        """
        request = self._call.request
        fault = NotOffered(status, is_model=_NO_MODEL.search(body[:_LOOKED_AT_BYTES]) is not None)
        if self._node_id is not None and not request.names_stored:
            endpoint = ANY_ENDPOINT if fault.is_model else request.endpoint
            self._tools.traffic.note_lack(self._node_id, endpoint, self._call.model.id)
        return fault


def was_closed_before(connection: HttpConnection, fault: EgressFault) -> bool:
    """Whether the node closed the connection while it was idle, before it saw the request: nobody's failure."""
    return fault.kind is FaultKind.CONNECTION_LOST and not (connection.has_head or connection.heard)
