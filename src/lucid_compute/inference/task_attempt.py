"""An attempt that a task makes: it may wait for a connection, and passes a stream on."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.http_connection import HttpConnection
from lucid_compute.inference.attempt import JSON, OK, Answer, Attempt, was_closed_before
from lucid_compute.inference.event_stream import EventStream
from lucid_compute.inference.exchange import CutReason
from lucid_compute.inference.targets import Target
from lucid_compute.jobs import Outcome

END_SECONDS = 1.0
_EVENTS = b"text/event-stream; charset=utf-8"


class TaskAttempt(Attempt):
    """An `Attempt` that takes its own steps."""

    __slots__ = ()

    async def run(self) -> None:
        """Answer the call.

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

    async def _talk(self) -> Answer | None:
        """Answer what the node answers as a whole; None when it was a stream, which is passed on already."""
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

    async def _exchange(self, connection: HttpConnection, target: Target) -> Answer | None:
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
