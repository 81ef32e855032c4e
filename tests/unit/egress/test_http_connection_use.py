"""What a connection is to those who use it: streams, slow readers, deadlines, what can be used again, and fuzzing."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.egress.connection import MAX_BUFFERED_BYTES, READ_BYTES, Deadlines, HttpConnection
from lucid_compute.egress.faults import EgressFault, FaultKind
from tests.memory_connection import CHUNKED, EVENT, JSON_HEAD, SMALL, STREAM_HEAD, Exchange, Outcome, exchange, splits


async def test_a_stream_is_answered_as_it_comes_and_said_to_be_over() -> None:
    exchanged = Exchange(wants_stream=True)
    exchanged.feed(STREAM_HEAD + EVENT, EVENT)
    assert await exchanged.connection.receive() == b"data\n\n" * 2
    waiting = asyncio.ensure_future(exchanged.connection.receive())
    await asyncio.sleep(0)
    assert not waiting.done()
    exchanged.feed(EVENT[:3])
    exchanged.feed(EVENT[3:5])
    assert await waiting == b"da"
    exchanged.feed(EVENT[5:] + b"0\r\n\r\n")
    assert [await exchanged.connection.receive() for _ in range(3)] == [b"ta\n\n", b"", b""]
    assert exchanged.connection.is_reusable


async def test_what_came_of_a_stream_before_it_broke_is_answered_first() -> None:
    exchanged = Exchange(wants_stream=True)
    exchanged.feed(STREAM_HEAD + EVENT + b"garbage")
    assert (await exchanged.outcome())[1:3] == (b"data\n\n", FaultKind.BAD_RESPONSE)


async def test_a_slow_reader_of_a_stream_keeps_the_socket_waiting_and_little_in_memory() -> None:
    exchanged = Exchange(wants_stream=True)
    exchanged.feed(STREAM_HEAD)
    buffered = 0
    while not exchanged.wire.is_paused:
        buffered += exchanged.feed(b"fff\r\n" + b"a" * 4095 + b"\r\n")
        assert buffered < 64 * 1024
    assert buffered <= MAX_BUFFERED_BYTES + READ_BYTES
    exchanged.connection.last_read_at -= 3600
    assert exchanged.connection.overdue(exchanged.connection.last_read_at + 1000) is None
    assert len(await exchanged.connection.receive()) > buffered * 0.99
    assert not exchanged.wire.is_paused


@pytest.mark.parametrize("ending", ["in the middle", "never connected", "answered"])
async def test_a_connection_that_is_lost_is_freed_at_once(ending: str) -> None:
    """Not when garbage is collected next, which in a worker may be after thousands of them."""
    gc.collect()
    gc.disable()
    try:
        if ending == "never connected":
            HttpConnection(memoryview(bytearray(1)))
        else:
            exchanged = Exchange()
            exchanged.feed(SMALL if ending == "answered" else SMALL[:-1])
            exchanged.connection.connection_lost(None)
            del exchanged
        await asyncio.sleep(0)
        assert not [known for known in gc.get_objects() if isinstance(known, HttpConnection)]
    finally:
        gc.enable()


async def test_the_time_in_which_nobody_read_is_not_the_nodes() -> None:
    exchanged = Exchange(wants_stream=True)
    exchanged.feed(STREAM_HEAD, *[b"fff\r\n" + b"a" * 4095 + b"\r\n"] * 9)
    exchanged.connection.last_read_at -= 3600
    now = exchanged.connection.last_read_at + 3600
    assert exchanged.connection.overdue(now) is None
    await exchanged.connection.receive()
    assert exchanged.connection.overdue(now) is None
    fault = exchanged.connection.overdue(now + 100)
    assert fault is not None
    assert fault.kind is FaultKind.IDLE_TIMEOUT


@pytest.mark.parametrize("wants_stream", [False, True])
async def test_a_whole_answer_never_leaves_its_connection_paused(*, wants_stream: bool) -> None:
    body = b"a" * 30_000
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 30000\r\n\r\n"
    exchanged = Exchange(wants_stream=wants_stream)
    exchanged.feed(head + body)
    assert exchanged.connection.is_reusable
    assert not exchanged.wire.is_paused


# What had come, whether a stream was asked for, seconds since the request and since the last byte, and the fault.
LATE = [
    (b"", True, 9.9, 9.9, None),
    (b"", True, 10, 10, FaultKind.FIRST_BYTE_TIMEOUT),
    (b"HTTP/1.1 2", True, 10, 0.1, FaultKind.FIRST_BYTE_TIMEOUT),  # a head that drips
    (b"HTTP/1.1 100 Continue\r\n\r\n" * 9, True, 10, 0.1, FaultKind.FIRST_BYTE_TIMEOUT),
    (STREAM_HEAD, True, 10, 0.1, FaultKind.FIRST_BYTE_TIMEOUT),
    (STREAM_HEAD + b"0000", True, 10, 0.1, FaultKind.FIRST_BYTE_TIMEOUT),
    (SMALL[:-1], True, 10, 0.1, FaultKind.FIRST_BYTE_TIMEOUT),  # no stream, although one was asked for
    (STREAM_HEAD + EVENT, True, 10, 4.9, None),
    (STREAM_HEAD + EVENT, True, 10, 5, FaultKind.IDLE_TIMEOUT),
    (STREAM_HEAD + EVENT, True, 99.9, 0.1, None),
    (STREAM_HEAD + EVENT, True, 100, 0.1, FaultKind.TOTAL_TIMEOUT),
    (STREAM_HEAD + EVENT + b"0\r\n\r\n", True, 1000, 1000, None),
    (b"", False, 29.9, 29.9, None),
    (b"", False, 30, 30, FaultKind.ANSWER_TIMEOUT),
    (SMALL[:-1], False, 29.9, 20, None),
    (SMALL[:-1], False, 30, 0.1, FaultKind.ANSWER_TIMEOUT),
    (STREAM_HEAD + EVENT, False, 30, 0.1, FaultKind.ANSWER_TIMEOUT),
    (SMALL, False, 1000, 1000, None),
]


@pytest.mark.parametrize(("data", "wants_stream", "seconds", "silent_seconds", "kind"), LATE)
async def test_each_deadline_is_kept_and_what_drips_does_not_extend_it(
    data: bytes, seconds: float, silent_seconds: float, kind: FaultKind | None, *, wants_stream: bool
) -> None:
    deadlines = Deadlines(first_byte_seconds=10, between_seconds=5, total_seconds=100, answer_seconds=30)
    exchanged = Exchange(wants_stream=wants_stream, deadlines=deadlines)
    began_at = exchanged.connection.last_read_at
    exchanged.feed(*(data[at : at + 1] for at in range(len(data))))
    exchanged.connection.last_read_at = began_at + seconds - silent_seconds
    fault = exchanged.connection.overdue(began_at + seconds)
    assert (fault and fault.kind) == kind


async def test_a_connection_that_was_not_asked_yet_is_late_with_nothing() -> None:
    connection = HttpConnection(memoryview(bytearray(READ_BYTES)))
    assert connection.overdue(connection.made_at + 1e9) is None


async def test_whoever_waits_is_told_at_once_that_the_exchange_failed() -> None:
    for wants_stream, data in ((True, b""), (True, STREAM_HEAD), (False, SMALL[:-1])):
        exchanged = Exchange(wants_stream=wants_stream)
        exchanged.feed(data)
        waiting = asyncio.ensure_future(exchanged.outcome())
        await asyncio.sleep(0)
        exchanged.connection.fail(EgressFault(FaultKind.TOTAL_TIMEOUT, "late"))
        assert exchanged.wire.is_aborted
        assert (await waiting)[1:] == (b"", FaultKind.TOTAL_TIMEOUT, False)
        exchanged.end()
        assert (await exchanged.outcome()).fault is FaultKind.TOTAL_TIMEOUT


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 2", SMALL[:-2], SMALL[:-1], CHUNKED, STREAM_HEAD + EVENT])
async def test_an_answer_that_breaks_off_is_a_lost_connection(data: bytes) -> None:
    for error in (None, ConnectionResetError()):
        exchanged = Exchange()
        exchanged.feed(data)
        exchanged.end(error)
        assert (await exchanged.outcome())[1:] == (b"", FaultKind.CONNECTION_LOST, False)


async def test_an_answer_without_a_length_is_whole_only_if_its_connection_ended_well() -> None:
    for error, fault in ((None, None), (ConnectionResetError(), FaultKind.CONNECTION_LOST)):
        exchanged = Exchange()
        exchanged.feed(JSON_HEAD + b"\r\n{}")
        exchanged.end(error)
        assert (await exchanged.outcome()).fault == fault
    exchanged = Exchange()
    exchanged.feed(JSON_HEAD + b"\r\n{}")
    exchanged.connection.fail(EgressFault(FaultKind.CONNECTION_LOST, "we hung up"))
    exchanged.end()
    assert (await exchanged.outcome()).fault is FaultKind.CONNECTION_LOST


async def test_a_connection_with_an_unsent_request_an_unfinished_answer_or_an_end_is_not_used_again() -> None:
    exchanged = Exchange()
    seen = [exchanged.connection.is_reusable]
    for part in (SMALL[:-1], SMALL[-1:]):
        exchanged.feed(part)
        seen.append(exchanged.connection.is_reusable)
    exchanged.wire.unsent_bytes = 1
    seen.append(exchanged.connection.is_reusable)
    exchanged.wire.unsent_bytes = 0
    seen.append(exchanged.connection.is_reusable)
    exchanged.end()
    seen.append(exchanged.connection.is_reusable)
    assert seen == [False, False, True, False, True, False]
    exchanged.ask()
    assert (await exchanged.outcome()).fault is FaultKind.CONNECTION_LOST


async def test_a_connection_whose_node_said_goodbye_is_not_used_again_although_it_is_not_closed_yet() -> None:
    exchanged = Exchange()
    exchanged.feed(SMALL)
    assert not exchanged.connection.eof_received()
    assert exchanged.connection.is_lost
    assert not exchanged.connection.is_reusable


@pytest.mark.parametrize("wants_stream", [False, True])
@pytest.mark.parametrize("step", [7, READ_BYTES])
async def test_a_body_in_tiny_chunks_takes_little_more_memory_than_its_bytes(step: int, *, wants_stream: bool) -> None:
    head = STREAM_HEAD if wants_stream else JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    exchanged = Exchange(wants_stream=wants_stream)
    exchanged.feed(head)
    joined: list[bytes] = []
    counts = set()
    for turn in range(1, 3):
        chunks = b"2\r\n{}\r\n" * 12_000
        exchanged.feed(*(chunks[at : at + step] for at in range(0, len(chunks), step)))
        parts = exchanged.connection._parts
        assert sum(map(sys.getsizeof, [*parts, parts])) < (1 if wants_stream else turn) * 24_000 * 2 + 10_000
        if wants_stream:
            counts.add(len(parts))
            assert len(counts) == 1  # the second time as the first
            assert await exchanged.connection.receive() == b"{}" * 12_000
        else:
            assert parts[0] is (joined or parts)[0]  # and is not joined again and again
            joined = [*parts]
    exchanged.feed(b"0\r\n\r\n")
    assert (await exchanged.outcome()).body == (b"" if wants_stream else b"{}" * 24_000)


async def test_a_reader_that_gave_up_does_not_disturb_what_comes() -> None:
    exchanged = Exchange()
    waiting = asyncio.ensure_future(exchanged.connection.receive())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait([waiting])
    exchanged.feed(SMALL)
    assert exchanged.connection.is_reusable


async def test_a_failed_exchange_is_let_go_without_the_garbage_collector() -> None:
    class Body(bytearray):
        """Can be referred to weakly."""

    async def fail() -> weakref.ref[Body]:
        body = Body(1000)
        exchanged.feed(b"garbage")
        try:
            await exchanged.connection.receive()
        except EgressFault:
            exchanged.connection.release()
        return weakref.ref(body)

    exchanged = Exchange()
    gc.disable()
    try:
        assert (await fail())() is None
    finally:
        gc.enable()


STATUSES = st.sampled_from([b"100 C", b"101 S", b"200 OK", b"200 OK", b"204 N", b"304 N", b"500 E", b"000 Z", b"20"])
NAMED = (b"Content-Length: 2", b"Content-Length: 0", b"Transfer-Encoding: chunked", b"Connection: close", b"A: b\nC: d")
OTHERS = (b"Content-Type: text/event-stream", b"Upgrade: a", b"Connection: upgrade", b"Content-Encoding: gzip", b"\0")
HEADERS = st.lists(st.sampled_from([*NAMED, *OTHERS]).map(lambda header: header + b"\r\n"), max_size=3)
HEADS = st.builds(lambda status, headers: b"HTTP/1.1 %b\r\n%b\r\n" % (status, b"".join(headers)), STATUSES, HEADERS)
PIECES = [
    b"{}",
    b"2\r\n{}\r\n",
    b"0\r\n\r\n",
    b"0\r\n",
    b"\r\n",
    b"\n",
    b"\0",
    b"HTTP/1.1 ",
    b"X",
    SMALL,
    CHUNKED,
    EVENT,
]
# Pieces as they may be read, each a byte at least.
ANSWERS = st.lists(HEADS | st.sampled_from(PIECES) | st.binary(min_size=1, max_size=50), min_size=1, max_size=6)


@given(ANSWERS, st.booleans())
async def test_whatever_comes_is_an_answer_or_a_fault_and_the_same_however_it_is_split(
    pieces: list[bytes], wants_stream: bool
) -> None:
    data = b"".join(pieces)
    outcomes = [await exchange(*split, wants_stream=wants_stream) for split in ([data], pieces, splits(data)[-1])]
    whole = {outcome[:3] for outcome in outcomes if outcome.fault is None}
    assert len(whole) <= 1
    if {outcome.fault is None for outcome in outcomes} == {False, True}:  # an answer and more, seen at once or not
        assert not any(outcome.is_reusable for outcome in outcomes)


@given(ANSWERS, st.booleans())
async def test_whatever_came_the_next_request_gets_its_own_answer_or_another_connection(
    pieces: list[bytes], wants_stream: bool
) -> None:
    exchanged = Exchange(wants_stream=wants_stream)
    exchanged.feed(*pieces)
    if exchanged.connection.is_reusable:
        await exchanged.outcome()
        exchanged.connection.release()
        exchanged.ask()
        exchanged.feed(SMALL)
        assert await exchanged.outcome() == Outcome(200, b"{}", None, is_reusable=True)
