"""One attempt to have a request served: sent to one node, its answer judged, passed on and entered in the ledger."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from http import HTTPStatus
from typing import NamedTuple

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import BadStatus, EgressFault, FaultKind, NotOffered
from lucid_compute.errors import InvalidRequest
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.event_stream import EventStream
from lucid_compute.gateway.node_stats import ANY_ENDPOINT
from lucid_compute.gateway.request import Call, RunningRequest
from lucid_compute.gateway.tracing import end_attempt
from lucid_compute.gateway.upstreams import Target
from lucid_compute.gateway.usage import Usage, believe, charge, count_answer, count_request, find_usage
from lucid_compute.registry.fleet.fleet import FleetNode
from lucid_compute.registry.routing_rules import id_on_node
from lucid_compute.web.lanes import CutReason
from lucid_compute.wire import FieldFault

CLIENTS_OWN = frozenset({400, 413, 422})
NOT_OFFERED = frozenset({404, 405, 501})
# How servers say that they have not loaded a model: OpenAI's code; vLLM's, SGLang's, Ollama's and llama-swap's words.
_NO_MODEL = re.compile(rb'(?is)"model_not_found"|\bmodel\b.{1,600}?(?:not found|does not exist|not available)')
_LOOKED_AT_BYTES = 4096  # of a refusal, which is a sentence
FULL_SECONDS = 1.0
MAX_FULL_SECONDS = 30.0
JSON = b"application/json"
OK, MULTIPLE_CHOICES = 200, 300  # plain numbers, because HTTPStatus costs a look-up each time


class NodeResponse(NamedTuple):
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

    def __init__(self, tools: GatewayContext, call: Call, node: FleetNode | None, number: int, now: datetime) -> None:
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
        """Return where it is to be sent.

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

    def judge(self, connection: HttpConnection, body: bytes) -> NodeResponse:
        """Return what a whole answer means to the client, and enter it.

        Raises:
            EgressFault: it is one to try the next node after.
        """
        status, job = connection.status, self._job
        job.status = status
        is_json = JSON in connection.content_type or b"+json" in connection.content_type
        if status in CLIENTS_OWN:
            job.outcome, job.reason = Outcome.REJECTED, f"http_{status}"
            return NodeResponse(status, body if is_json and body else b"")
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
        return NodeResponse(status, body)

    def note_first_byte(self) -> None:
        """Enter how long the answer took to begin, and let choices of a node learn from it."""
        job = self._job
        job.first_byte_ms = (time.monotonic() - self._began_at) * 1000
        if self._node_id is not None:
            self._tools.traffic.note_latency(self._node_id, self._call.wanted.kind, job.first_byte_ms)

    def enter(self, usage: Usage | None, body: bytes = b"") -> None:
        """Enter the tokens: the node's word if it can be so, else our count of what was delivered."""
        job, stream = self._job, self._stream
        usage = believe(usage, self._call.request)
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
        """Return whether no ledger has heard of it: what ran for so long has reached the node, and died with it."""
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
    """Return whether the node closed the connection while it was idle, before it saw the request: nobody's failure."""
    return fault.kind is FaultKind.CONNECTION_LOST and not (connection.has_head or connection.heard)


class Ready(NamedTuple):
    """A node that a request can be sent to at once."""

    node: FleetNode
    target: Target
    connection: HttpConnection


class HandedOver(NamedTuple):
    """How a request ends that goes on in a task; `failed` is the node that was tried first and how it failed."""

    failed: tuple[FleetNode, EgressFault] | None


Ending = NodeResponse | HandedOver | CutReason | Exception
OnEnd = Callable[["ExpressExchange", Ending], None]


class ExpressExchange(RunningRequest):
    """One request without a task. It ends once, and tells `on_end` how."""

    __slots__ = ("_attempt", "_on_end", "_ready", "_tools", "call")

    call: Call
    _ready: Ready

    def __init__(self, tools: GatewayContext, on_end: OnEnd) -> None:
        super().__init__()
        self.has_body = True
        self._tools = tools
        self._on_end = on_end
        self._attempt: Attempt | None = None

    @property
    def node_id(self) -> str:
        """Who is asked."""
        return self._ready.node.state.id

    def start(self, call: Call, ready: Ready, now: datetime) -> None:
        """Send the call to the node."""
        self.call = call
        self._ready = ready
        attempt = self._attempt = Attempt(self._tools, call, ready.node, 1, now)
        attempt.begin()
        ready.connection.on_ready = self._take_in
        attempt.send(ready.connection, ready.target)

    def leave(self) -> None:
        """End it because its client left."""
        self.end(CutReason.CLIENT_LEFT)

    def end(self, reason: CutReason) -> None:
        """End it from our side, or because the client left: the node is hung up on at once."""
        attempt = self._attempt
        if attempt is not None:
            self.cut = reason
            attempt.note_cancelled(reason)
            self._finish(attempt)
            self._tell(reason)

    def _take_in(self) -> None:
        """Take the node's answer, or its failure. Nothing may be raised: a transport calls this."""
        attempt, connection = self._attempt, self._ready.connection
        if attempt is None or not connection.is_ready:
            return
        ending: Ending
        try:
            ending = attempt.judge(connection, connection.take())
            attempt.note_success()
        except EgressFault as fault:
            if was_closed_before(connection, fault) and attempt.can_be_undone:
                self._attempt = connection.on_ready = None
                attempt.undo()
                self.call.mistrusts_idle = True
                self._tools.client.give_back(self._ready.target.url, connection)
                self._tell(HandedOver(None))
                return
            attempt.note_fault(fault)
            ending = HandedOver((self._ready.node, fault.with_traceback(None)))  # which holds this frame
        except Exception as error:  # noqa: BLE001 - answered as the ordinary lane answers its own failures
            attempt.note_broken()
            ending = error
        self._finish(attempt)
        self._tell(ending)

    def _tell(self, ending: Ending) -> None:
        self._on_end(self, ending)
        del self.call  # it holds this too, and both would stay until garbage is collected

    def _finish(self, attempt: Attempt) -> None:
        self._attempt = self._ready.connection.on_ready = None  # they hold this, and would until garbage is collected
        attempt.close()
        self._tools.client.give_back(self._ready.target.url, self._ready.connection)


END_SECONDS = 1.0
_EVENTS = b"text/event-stream; charset=utf-8"


class TaskAttempt(Attempt):
    """An `Attempt` that takes its own steps."""

    __slots__ = ()

    async def run(self) -> None:
        """Return the call.

        Raises:
            EgressFault: the node failed; whether the client has got a part of its answer is `call.has_begun`.
        """
        self.begin()
        try:
            answer = await self._talk()
            self.note_success()
        except EgressFault as fault:
            self.note_fault(fault)
            raise
        except asyncio.CancelledError:
            self.note_cancelled(self._call.exchange.cut or CutReason.SHUTDOWN)
            raise
        except Exception:  # a fault of ours, and the job says so
            self.note_broken()
            raise
        finally:
            self.close()
        if answer is not None:
            if answer.refusal is not None:
                raise answer.refusal
            await self._call.start(answer.status, JSON, self._node_id, self._number, len(answer.body))
            await self._call.write(answer.body, more=False)

    async def _talk(self) -> NodeResponse | None:
        """Return what the node answers as a whole; None when it was a stream, which is passed on already."""
        target = self.target()
        client = self._tools.client
        if not self._call.mistrusts_idle and (connection := client.take_idle(target.url)) is not None:
            try:
                return await self._exchange(connection, target)
            except EgressFault as fault:
                if not was_closed_before(connection, fault):
                    raise
                self._call.mistrusts_idle = True
        return await self._exchange(await client.connect(target.url), target)

    async def _exchange(self, connection: HttpConnection, target: Target) -> NodeResponse | None:
        try:
            self.send(connection, target)
            block = await connection.receive()
            if connection.is_stream:
                await self._relay(connection, block)
                return None
            return self.judge(connection, block)
        finally:
            self._tools.client.give_back(target.url, connection)

    async def _relay(self, connection: HttpConnection, block: bytes) -> None:
        """Pass a stream on, event by event, until the node has said that it is done."""
        call = self._call
        stream = self._stream = EventStream(call.request.endpoint, withholds_usage=call.request.adds_usage)
        self._job.status = connection.status
        while block:
            events = stream.take_in(block)
            if stream.failed and not call.has_begun:
                break
            if events:
                is_over = stream.has_ended and connection.is_whole
                await self._pass_on(events, more=not is_over)
                if is_over:
                    break
                if stream.has_ended:
                    await call.write(b"", more=False)
                    await _await_end(connection)
                    break
            if stream.failed:
                break
            block = await connection.receive()
        else:
            await self._end(stream)
        if stream.failed:
            raise EgressFault(FaultKind.BROKEN_STREAM, "The node's stream told of an error.")
        self.enter(stream.usage)
        self._job.outcome = Outcome.REJECTED if stream.is_refused else Outcome.COMPLETED

    async def _pass_on(self, events: bytes, *, more: bool) -> None:
        call = self._call
        if not call.has_begun:
            self.note_first_byte()
            await call.start(OK, _EVENTS, self._node_id, self._number)
        await call.write(events, more=more)

    async def _end(self, stream: EventStream) -> None:
        """End a stream whose node has closed the answer.

        Raises:
            EgressFault: it never said that it was done.
        """
        rest = stream.finish()
        if not stream.has_ended:
            raise EgressFault(FaultKind.BROKEN_STREAM, "The stream ended without saying that it is done.")
        await self._pass_on(rest, more=False)


async def _await_end(connection: HttpConnection) -> None:
    """Let the node close a stream that is done, so that the connection can be used again; for a second at most."""
    connection.total_due_at = time.monotonic() + END_SECONDS
    with suppress(EgressFault):
        while await connection.receive():
            pass
