"""One attempt to have a request served: sent to one node, its answer judged, passed on and entered in the ledger."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from http import HTTPStatus
from typing import NamedTuple

from lucid_compute.egress.faults import BadStatus, EgressFault, FaultKind
from lucid_compute.egress.http_connection import HttpConnection
from lucid_compute.errors import InvalidRequest
from lucid_compute.field_faults import FieldFault
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.accounting import charge, count_answer, count_request
from lucid_compute.inference.call import Call
from lucid_compute.inference.event_stream import EventStream
from lucid_compute.inference.targets import Target
from lucid_compute.inference.tools import Tools
from lucid_compute.inference.usage import Usage, find_usage
from lucid_compute.jobs import Job, Outcome
from lucid_compute.routing_rules import id_on_node

CLIENTS_OWN = frozenset({400, 413, 422})
NOT_OFFERED = frozenset({404, 405, 501})
FULL_SECONDS = 1.0
MAX_FULL_SECONDS = 30.0
END_SECONDS = 1.0
_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"


class Answer(NamedTuple):
    """A whole answer to be passed on."""

    status: int
    body: bytes


class Attempt:
    """The attempt `number` (from 1) of a call, on `node`, or on the model's upstream when it is None."""

    __slots__ = ("_began_at", "_call", "_job", "_node", "_node_id", "_number", "_stream", "_tools")

    def __init__(self, tools: Tools, call: Call, node: FleetNode | None, number: int) -> None:
        """Dispatch it; nothing is sent yet."""
        self._tools = tools
        self._call = call
        self._node = node
        self._node_id = None if node is None else node.state.id
        self._number = number
        self._stream: EventStream | None = None
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
            started_at=tools.clock.now(),
        )

    async def run(self) -> None:
        """Answer the call.

        Raises:
            EgressFault: the node failed; whether the client has got a part of its answer is `call.has_begun`.
        """
        traffic, node_id, job = self._tools.traffic, self._node_id, self._job
        if node_id is not None:
            self._tools.fleet.replicas.begin(node_id)
            traffic.note_start(node_id)
        try:
            answer = await self._talk()
            if node_id is not None:
                traffic.note_success(node_id)
        except EgressFault as fault:
            self._note_fault(fault)
            raise
        except asyncio.CancelledError:
            job.outcome, job.reason = Outcome.CANCELLED, self._call.exchange.cut or "shutdown"
            if node_id is not None:
                traffic.note_nothing(node_id)
            raise
        except Exception:
            job.outcome, job.reason = Outcome.FAILED, "internal"
            raise
        finally:
            if node_id is not None:
                self._tools.fleet.replicas.end(node_id)
            self._close()
        if answer is not None:
            if not answer.body:
                sentence = f"The node refused the request with status {answer.status} and did not say why."
                raise InvalidRequest([FieldFault("", sentence)], status=answer.status)
            await self._call.start(answer.status, _JSON, node_id, self._number, len(answer.body))
            await self._call.write(answer.body, more=False)

    async def _talk(self) -> Answer | None:
        """Answer what the node answers as a whole; None when it was a stream, which is passed on already."""
        target = self._target()
        client = self._tools.client
        if (connection := client.take_idle(target.url)) is not None:
            try:
                return await self._exchange(connection, target)
            except EgressFault as fault:
                if fault.kind is not FaultKind.CONNECTION_LOST or connection.has_head or connection.heard:
                    raise  # else the node closed it while it was idle: nobody's failure
        return await self._exchange(await client.connect(target.url), target)

    def _target(self) -> Target:
        targets = self._tools.targets
        if self._node is not None:
            return targets.of_node(self._node)
        target = targets.of_upstream(self._call.model)
        if target is None:
            raise EgressFault(FaultKind.NAME_UNKNOWN, "The model has no upstream.")
        return target

    async def _exchange(self, connection: HttpConnection, target: Target) -> Answer | None:
        request, tools = self._call.request, self._tools
        try:
            head = target.head(request.endpoint, self._call.job_id)
            connection.send(head, self._body(), tools.deadlines, wants_stream=request.is_stream)
            block = await connection.receive()
            if connection.is_stream:
                await self._relay(connection, block)
                return None
            return self._judge(connection, block)
        finally:
            tools.client.give_back(target.url, connection)

    def _body(self) -> bytes:
        model = self._call.model
        if self._node is not None:
            return self._call.request.body_for(id_on_node(model, self._node.state))
        return self._call.request.body_for(model.record.metadata["upstream"].get("model") or model.record.name)

    def _judge(self, connection: HttpConnection, body: bytes) -> Answer:
        """Answer what a whole answer means to the client, and enter it.

        Raises:
            EgressFault: it is one to try the next node after.
        """
        status, job = connection.status, self._job
        job.status = status
        is_json = _JSON in connection.content_type or b"+json" in connection.content_type
        if status in CLIENTS_OWN:
            job.outcome, job.reason = Outcome.REJECTED, f"http_{status}"
            return Answer(status, body if is_json and body else b"")
        if not HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            self._learn_from(status, connection.retry_after)
            raise BadStatus(status)
        if not is_json or not body:
            raise EgressFault(FaultKind.BAD_RESPONSE, "The node's answer is not JSON.")
        self._note_first_byte()
        self._enter(find_usage(body), body)
        job.outcome = Outcome.COMPLETED
        return Answer(status, body)

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
        self._enter(stream.usage)
        self._job.outcome = Outcome.REJECTED if stream.is_refused else Outcome.COMPLETED

    async def _pass_on(self, events: bytes, *, more: bool) -> None:
        call = self._call
        if not call.has_begun:
            self._note_first_byte()
            await call.start(HTTPStatus.OK, _EVENTS, self._node_id, self._number)
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

    def _note_first_byte(self) -> None:
        job = self._job
        job.first_byte_ms = (time.monotonic() - self._began_at) * 1000
        if self._node_id is not None:
            self._tools.traffic.note_latency(self._node_id, self._call.wanted.kind, job.first_byte_ms)

    def _learn_from(self, status: int, retry_after: bytes) -> None:
        if self._node_id is None:
            return
        if status == HTTPStatus.TOO_MANY_REQUESTS:
            seconds = float(retry_after) if retry_after.isdigit() else FULL_SECONDS
            self._tools.traffic.note_full(self._node_id, min(seconds, MAX_FULL_SECONDS))
        elif status in NOT_OFFERED and self._call.request.endpoint == "responses":
            self._tools.traffic.note_lack(self._node_id, "responses")

    def _note_fault(self, fault: EgressFault) -> None:
        job = self._job
        job.outcome, job.reason = Outcome.FAILED, fault.reason
        is_failure = job.status != HTTPStatus.TOO_MANY_REQUESTS
        if job.status in NOT_OFFERED and self._call.request.endpoint == "responses":
            job.outcome, job.reason, is_failure = Outcome.REJECTED, "endpoint_not_offered", False
        if self._node is not None and is_failure:
            self._tools.traffic.note_failure(self._node)
        if self._stream is not None and self._call.has_begun:
            self._enter(self._stream.usage)

    def _enter(self, usage: Usage | None, body: bytes = b"") -> None:
        """Enter the tokens: the node's word, else our count of what was delivered."""
        job, stream = self._job, self._stream
        job.are_tokens_counted = usage is None or usage.tokens_in is None
        if usage is None:
            delivered = max(stream.pieces, 0) if stream is not None else count_answer(body)
            usage = Usage(None, delivered)
        job.tokens_in = count_request(self._call.request) if usage.tokens_in is None else usage.tokens_in
        job.tokens_out = usage.tokens_out

    def _close(self) -> None:
        """Hand the job to the ledger, its price and the call's cost settled."""
        job = self._job
        if job.outcome is Outcome.CANCELLED and self._stream is not None and self._call.has_begun:
            self._enter(self._stream.usage)
        job.latency_ms = (time.monotonic() - self._began_at) * 1000
        if job.tokens_in is not None:
            self._call.tokens += job.tokens_in + (job.tokens_out or 0)
            job.price_usd = charge(job, self._node)
        self._tools.ledger.finish(job)


async def _await_end(connection: HttpConnection) -> None:
    """Let the node close a stream that is done, so that the connection can be used again; for a second at most."""
    connection.total_due_at = time.monotonic() + END_SECONDS
    with suppress(EgressFault):
        while await connection.receive():
            pass
