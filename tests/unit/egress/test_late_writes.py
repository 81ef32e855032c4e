"""Writes that wait for the end of the loop's turn: in their order, each for itself."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from lucid_compute.egress.write_batching import MAX_WAITING_BYTES, WriteBatch

Pair = tuple[asyncio.Transport, socket.socket]


@pytest.fixture
async def pairs() -> AsyncIterator[list[Pair]]:
    """Three transports, and the other ends of their sockets."""
    made: list[Pair] = []
    for _ in range(3):
        ours, theirs = socket.socketpair()
        theirs.settimeout(5)
        transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, sock=ours)
        made.append((transport, theirs))
    yield made
    for transport, theirs in made:
        transport.abort()
        theirs.close()


def read_all(theirs: socket.socket) -> bytes:
    """Return what came until the end."""
    parts = []
    while part := theirs.recv(1000):
        parts.append(part)
    return b"".join(parts)


async def test_writes_are_made_at_the_end_of_the_turn_in_their_order(pairs: list[Pair]) -> None:
    """Or when somebody has to write at once."""
    (first, its_end), (second, other_end), _ = pairs
    writes = WriteBatch(asyncio.get_running_loop())
    writes.write(first, b"a")
    writes.write(second, b"b")
    writes.flush()
    first.write(b"c")
    writes.write(first, b"d")
    await asyncio.sleep(0)
    first.close()
    second.close()
    await asyncio.sleep(0)
    assert (read_all(its_end), read_all(other_end)) == (b"acd", b"b")


async def test_much_is_written_at_once(pairs: list[Pair]) -> None:
    """So it is known in the same turn that the other side does not read."""
    (first, its_end), _, _ = pairs
    writes = WriteBatch(asyncio.get_running_loop())
    its_end.setblocking(False)
    writes.write(first, b"a" * MAX_WAITING_BYTES)
    with pytest.raises(BlockingIOError):
        its_end.recv(1)
    writes.write(first, b"b")
    assert its_end.recv(1) == b"a"


async def test_a_transport_that_takes_nothing_more_costs_the_others_nothing(pairs: list[Pair]) -> None:
    """It is ended itself."""
    (closed, _), (ended, _), (good, its_end) = pairs
    writes = WriteBatch(asyncio.get_running_loop())
    for transport in (closed, ended, good):
        writes.write(transport, b"late")
    closed.close()
    ended.write_eof()
    await asyncio.sleep(0)
    good.close()
    await asyncio.sleep(0)
    assert read_all(its_end) == b"late"
    assert ended.is_closing()
