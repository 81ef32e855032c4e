"""An attempt's exchange with its node, by callbacks: it writes the request, and passes the response on.

A task runs only while a connection is opened. A stream is passed on event by event until its end, which may come in
more ways than one.
"""

from __future__ import annotations

from datetime import datetime

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.gateway.attempt import MULTIPLE_CHOICES, OK, Attempt
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.event_stream import DONE, EventStream
from lucid_compute.gateway.request import GatewayRequest
from lucid_compute.gateway.tracing import begin_attempt
from lucid_compute.gateway.upstreams import Target
from lucid_compute.registry.fleet.fleet import FleetNode
from lucid_compute.web.lanes import CutReason, Wait
from lucid_compute.wire import write_money

FINISHED_SECONDS = 2.0  # of silence after every choice has finished; a usage may still come, and [DONE]
_EVENTS = b"text/event-stream; charset=utf-8"


class Exchange(Attempt):
    """An attempt that talks to its node. `node` is None for the model's upstream.

    It ends in one of four ways: it calls `succeed` or `fail` of the running request, `step` raises the node's fault, or
    `cut` is called. When the node must be connected to, or has failed, it calls `advance`, which calls `step`.
    """

    __slots__ = ("_connection", "_fault", "_is_asked_again", "_is_closed", "_running", "_target", "node")

    def __init__(
        self, context: GatewayContext, request: GatewayRequest, node: FleetNode | None, number: int, now: datetime
    ) -> None:
        super().__init__(context, request, node, number, now)
        self.node = node
        self._running = request.running
        self._target: Target | None = None
        self._connection: HttpConnection | None = None
        self._fault: EgressFault | None = None
        self._is_asked_again = False  # without our question for the usage
        self._is_closed = False
        self.begin()

    def step(self) -> Wait | None:
        """Send the request; return how to connect to the node first if no connection is idle.

        Raises:
            EgressFault: the attempt has failed.
        """
        if self._fault is not None:
            raise self._fault
        try:
            target = self._target = self._target or self._find_target()
        except EgressFault as fault:
            self._close_failed(fault)
            raise
        connection = self._connection
        if connection is None and not self._request.avoids_idle:
            connection = self._connection = self._context.client.acquire_idle(target.url)
        if connection is None:
            return self._connect
        connection.on_ready = self._receive
        inference = self._request.inference
        head = target.head(inference.endpoint, self._request.job_id, inference.resource)
        if content_type := inference.content_type:
            head += b"Content-Type: %b\r\n" % content_type
        if self._span is not None:
            path = target.path_of(inference.resource or inference.endpoint.name)
            begin_attempt(self._span, target.url, path, inference.endpoint, self._number)
            head += b"traceparent: %b\r\n" % self._span.traceparent
        connection.send(head, self._body(), self._context.deadlines, wants_stream=inference.is_stream)
        return None

    def go_on(self) -> None:
        """Continue: the client has read what was written."""
        self._receive()

    def cut(self, reason: CutReason) -> None:
        """End the attempt before its response is complete: close the connection to the node at once."""
        self.record_cancelled(reason)
        self._close()

    def abandon(self) -> None:
        """End the attempt if it runs, because this service failed."""
        if not self._is_closed:
            self.record_internal_error()
            self._close()

    # --- inside

    def _find_target(self) -> Target:
        """Return where the request is sent.

        Raises:
            EgressFault: the egress policy forbids the URL, or the model has no upstream.
        """
        upstreams = self._context.upstreams
        if self.node is not None:
            return upstreams.of_node(self.node)
        target = upstreams.of_api_model(self._request.model)
        if target is None:
            raise EgressFault(FaultKind.NAME_UNKNOWN, "The model has no upstream.")
        return target

    async def _connect(self) -> None:
        """Open a connection to the node. Its failure is kept for the next step."""
        target, node, client = self._target, self.node, self._context.client
        if target is None:
            return
        try:
            connection = self._connection = await client.connect(target.url, owner=target.owner)
            if node is not None and (node.state.is_draining or node.record.has_ended):
                raise EgressFault(FaultKind.NODE_LEFT, "The node was drained while it was connected to.")
            if connection.is_lost:
                raise EgressFault(FaultKind.CONNECTION_LOST, "The node closed the connection.")
        except EgressFault as fault:
            self._close_failed(fault)

    def _receive(self) -> None:
        """Read what the node sent, or its failure. This must not raise, because a transport calls it."""
        connection = self._connection
        if connection is None or not connection.is_ready:
            return
        try:
            if connection.is_stream:
                self._relay(connection)
            else:
                self._read_response(connection)
        except EgressFault as fault:
            if self._was_closed_while_idle(connection, fault):
                self._request.avoids_idle = True
                self._release()
            else:
                self._close_failed(fault)
            self._running.advance()
        except Exception as error:  # noqa: BLE001 - becomes a response of our shape
            self._running.fail(error)

    def _was_closed_while_idle(self, connection: HttpConnection, fault: EgressFault) -> bool:
        """Return whether the node closed the idle connection before it read the request, which is no failure.

        A job in the ledger ran so long that the node had received it.
        """
        if fault.kind is not FaultKind.CONNECTION_LOST or connection.has_head or connection.has_received:
            return False
        return connection.used > 1 and not self._job.is_written

    def _read_response(self, connection: HttpConnection) -> None:
        """Pass a complete response on.

        A server that refuses our question for the usage is sent the request without it.
        """
        response = self.judge(connection, connection.read_available())
        if self._asks_usage and b"stream_options" in response.body:
            self._asks_usage, self._is_asked_again, self._job.reason = False, True, None
            self._release()
            self._running.advance()
            return
        self._record_served(accepts=response.status < MULTIPLE_CHOICES)
        self._close()
        headers = self._request.response_headers(response.content_type, self._node_id, self._number, len(response.body))
        if self._job.price_usd is not None:
            headers.append((b"x-lucid-price-usd", write_money(self._job.price_usd).encode()))
        self._running.succeed((response.status, headers, response.body))

    def _relay(self, connection: HttpConnection) -> None:
        """Pass on what came of a stream.

        Raises:
            EgressFault: the node failed.
        """
        stream, running = self._stream or self._begin_stream(connection), self._running
        while True:
            if running.client.is_full:  # then the rest stays in the connection
                running.sending_since = running.sending_since or connection.last_read_at
                return
            try:
                block = connection.read_available()
            except EgressFault:
                if not stream.is_finished:
                    raise
                block = b""  # the end, since every choice has finished
            if self._pass_on(connection, stream, block):
                return
            if not connection.is_ready:
                break
        if stream.is_finished:
            connection.between_seconds = min(connection.between_seconds, FINISHED_SECONDS)

    def _pass_on(self, connection: HttpConnection, stream: EventStream, block: bytes) -> bool:
        """Pass a block on; an empty one is the end. Return whether the response is complete.

        Raises:
            EgressFault: the node failed.
        """
        running = self._running
        events = stream.feed(block) if block else b""
        if stream.failed and not running.has_begun:
            events = b""
        if events and stream.usage is not None:
            events = self.tell_price(stream.usage, events)
        if events and self.shows_ids:
            events = self.show_ids(events)
        if stream.has_ended and connection.is_whole and events:
            self._end_stream(connection, stream, events)
            return True
        if events:
            if not running.has_begun:
                self._begin_response(connection)
            running.client.write(events, more=True)
        if block and not (stream.failed or stream.has_ended):
            return False
        self._end_stream(connection, stream, self._last_part(stream))
        return True

    def _begin_stream(self, connection: HttpConnection) -> EventStream:
        inference = self._request.inference
        self._job.status = connection.status
        connection.awaits_content = True
        stream = self._stream = self._context.event_stream(
            inference.endpoint,
            withholds_usage=self._asks_usage,
            choices=inference.choice_count,
            max_event_bytes=self._context.max_event_bytes,
        )
        return stream

    def _begin_response(self, connection: HttpConnection) -> None:
        running = self._running
        connection.awaits_content = False
        self.record_first_byte(connection.last_read_at)
        running.has_begun = True
        running.client.begin(OK, self._request.response_headers(_EVENTS, self._node_id, self._number))

    def _last_part(self, stream: EventStream) -> bytes:
        """Return what completes the response to the client after the last block.

        Raises:
            EgressFault: the node reported an error, never said that the stream is done, or sent no answer in it.
        """
        if stream.failed:
            raise EgressFault(FaultKind.BROKEN_STREAM, "The node's stream told of an error.")
        rest = b"" if stream.has_ended else stream.finish()
        if not (stream.has_ended or stream.is_finished):
            raise EgressFault(FaultKind.BROKEN_STREAM, "The stream ended without saying that it is done.")
        if not stream.has_begun:
            raise EgressFault(FaultKind.BROKEN_STREAM, "The stream ended without an answer in it.")
        return rest if stream.has_ended else DONE  # which some nodes leave out

    def _end_stream(self, connection: HttpConnection, stream: EventStream, last: bytes) -> None:
        """End with the last part. The connection can be used again once the response has ended as HTTP requires."""
        if not self._running.has_begun:
            self._begin_response(connection)
        self.record_tokens(stream.usage)
        self._job.outcome = Outcome.REJECTED if stream.is_refused else Outcome.COMPLETED
        if not stream.is_refused:
            self.bill_background(stream.usage)
        self._record_served(accepts=True)
        self._connection = None
        if self._target is not None:
            self._context.client.release_at_end(self._target.url, connection)
        self._close()
        self._running.succeed(last)

    def _record_served(self, *, accepts: bool) -> None:
        """Record a response. A server refuses our question if it `accepts` the request without it.

        Otherwise the client has made it name the field.
        """
        if self._is_asked_again and accepts:
            self._context.stats.record_question_refused(self._question_id)
        self.record_success()

    def _close_failed(self, fault: EgressFault) -> None:
        """End the attempt with the node's fault, which the next step raises."""
        self._fault = fault.with_traceback(None)  # its traceback holds this frame
        self.record_fault(fault)
        self._close()

    def _close(self) -> None:
        self._is_closed = True
        self._release()
        self.close()

    def _release(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and self._target is not None:
            connection.on_ready = None  # a cycle, which only garbage collection would free
            self._context.client.release(self._target.url, connection)
