"""Passes a node's stream on, event by event, until its end, which may come in more ways than one."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Protocol

from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.gateway.event_stream import DONE, EventStream

END_SECONDS = 1.0
FINISHED_SECONDS = 2.0  # of silence after every choice has finished; a usage may still come, and [DONE]


class PassOn(Protocol):
    """Sends events to the client; not `more`: they are the last."""

    async def __call__(self, events: bytes, *, more: bool) -> None:
        """Wait while the client does not read."""


async def relay(connection: HttpConnection, stream: EventStream, block: bytes, pass_on: PassOn) -> None:
    """Pass a stream on that begins with `block`.

    Raises:
        EgressFault: the node failed.
    """
    connection.awaits_content, has_begun, is_over = True, False, False
    while block:
        events = stream.feed(block)
        if events and (has_begun or not stream.failed):
            has_begun, is_over = True, stream.has_ended and connection.is_whole
            connection.awaits_content = False
            await pass_on(events, more=not is_over)
        if stream.failed or stream.has_ended:
            break
        block = await _receive_more(connection, stream)
    if not is_over:
        await _end(connection, stream, pass_on)


async def _receive_more(connection: HttpConnection, stream: EventStream) -> bytes:
    """Return the next block; empty at the stream's end, also if it breaks off when every choice has finished."""
    if not stream.is_finished:
        return await connection.receive()
    connection.between_seconds = min(connection.between_seconds, FINISHED_SECONDS)
    try:
        return await connection.receive()
    except EgressFault:
        return b""


async def _end(connection: HttpConnection, stream: EventStream, pass_on: PassOn) -> None:
    """End a stream of which nothing more is passed on.

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
    await pass_on(rest if stream.has_ended else DONE, more=False)  # which some nodes leave out
    if not connection.is_whole:
        await _await_end(connection)


async def _await_end(connection: HttpConnection) -> None:
    """Wait up to a second for the end of a finished response, so that the connection can be used again."""
    connection.total_due_at = time.monotonic() + END_SECONDS
    with suppress(EgressFault):
        while await connection.receive():
            pass
