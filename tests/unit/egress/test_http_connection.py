"""One response of a provider, fed by hand: whatever its bytes and however they are split, it is read or refused."""

from __future__ import annotations

import pytest

from lucid_compute.egress.connection import MAX_HEAD_BYTES, READ_BYTES, ResponseLimits
from lucid_compute.egress.faults import FaultKind
from tests.fault_answers import BROKEN, SURPLUS
from tests.memory_connection import CHUNKED, JSON_HEAD, SMALL, Exchange, Outcome, exchange, splits

# Good answers, each with the status and the body it has, and whether the connection can be used again.
GOOD: dict[str, tuple[bytes, int, bytes, bool]] = {
    "a length": (SMALL, 200, b"{}", True),
    "a length with spaces": (JSON_HEAD + b"content-LENGTH:  2 \r\n\r\n{}", 200, b"{}", True),
    "chunks": (CHUNKED + b"\r\n", 200, b"{}", True),
    "chunks and a trailer": (CHUNKED + b"Content-Type: text/evil\r\nContent-Encoding: x\r\n\r\n", 200, b"{}", True),
    "until the end": (JSON_HEAD + b"\r\n{}", 200, b"{}", False),
    "a farewell": (JSON_HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}", 200, b"{}", False),
    "HTTP/1.0": (SMALL.replace(b"1.1", b"1.0"), 200, b"{}", False),
    "HTTP/1.0 kept alive": (SMALL.replace(b"1.1 200 OK", b"1.0 200 OK\r\nConnection: keep-alive"), 200, b"{}", True),
    "no body": (b"HTTP/1.1 204 No Content\r\nContent-Type: application/json\r\n\r\n", 204, b"", True),
    "a refusal": (SMALL.replace(b"200 OK", b"503 "), 503, b"{}", True),
    "identity": (JSON_HEAD + b"Content-Encoding: Identity\r\nContent-Length: 2\r\n\r\n{}", 200, b"{}", True),
    "100 before": (b"HTTP/1.1 100 Continue\r\n\r\n" + SMALL, 200, b"{}", True),
    "103 before": (b"HTTP/1.1 103 Hints\r\nContent-Type: x\r\nContent-Length: 9\r\n\r\n" * 3 + SMALL, 200, b"{}", True),
    "103 and no length": (b"HTTP/1.1 103 H\r\nContent-Length: 0\r\n\r\n" + JSON_HEAD + b"\r\n{}", 200, b"{}", False),
    "an upgrade that is none": (JSON_HEAD + b"Upgrade: h2c\r\nContent-Length: 2\r\n\r\n{}", 200, b"{}", True),
}


@pytest.mark.parametrize("name", GOOD)
async def test_a_good_answer_is_read_alike_however_it_is_split(name: str) -> None:
    data, status, body, is_reusable = GOOD[name]
    for pieces in splits(data):
        assert await exchange(*pieces) == Outcome(status, body, None, is_reusable=is_reusable)
        assert await exchange(*pieces, wants_stream=True) == Outcome(status, body, None, is_reusable=is_reusable)


async def test_the_request_is_written_as_it_was_given_with_its_length() -> None:
    assert Exchange().wire.sent == b"POST /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_trailer_and_an_interim_answer_say_nothing_of_the_answer() -> None:
    interim = b"HTTP/1.1 103 Hints\r\nContent-Type: a/b\r\nRetry-After: 9\r\n\r\n"
    unnamed = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    for data, content_type in ((GOOD["chunks and a trailer"][0], b"application/json"), (interim + unnamed, b"")):
        exchanged = Exchange()
        exchanged.feed(data)
        assert (exchanged.connection.content_type, exchanged.connection.retry_after) == (content_type, b"")


@pytest.mark.parametrize("name", BROKEN)
async def test_what_is_no_answer_is_a_bad_response_however_it_is_split(name: str) -> None:
    for pieces in splits(BROKEN[name]):
        exchanged = Exchange()
        exchanged.feed(*pieces)
        exchanged.end()
        assert (await exchanged.outcome())[2:] == (FaultKind.BAD_RESPONSE, False)
        assert exchanged.wire.is_aborted


@pytest.mark.parametrize("name", SURPLUS)
async def test_what_comes_behind_an_answer_ends_the_connection_and_is_no_part_of_it(name: str) -> None:
    as_stream = SURPLUS[name].replace(b"application/json", b"text/event-stream")
    for pieces in [*splits(SURPLUS[name]), *splits(as_stream)]:
        exchanged = Exchange(wants_stream=True)
        exchanged.feed(*pieces)
        assert exchanged.wire.is_aborted
        assert not exchanged.connection.is_reusable
        assert (await exchanged.outcome())[1:3] in {(b"", None), (b"{}", None)}


async def test_an_answer_that_is_whole_stays_good_whatever_comes_in_a_later_read() -> None:
    for surplus in (b"H", b"\r\n", b"garbage", SMALL):
        exchanged = Exchange()
        exchanged.feed(SMALL, surplus)
        assert exchanged.wire.is_aborted
        assert await exchanged.outcome() == Outcome(200, b"{}", None, is_reusable=False)


async def test_what_comes_while_nobody_asks_ends_the_connection() -> None:
    for was_used in (False, True):
        exchanged = Exchange(asks=was_used)
        if was_used:
            exchanged.feed(SMALL)
            exchanged.connection.release()
        exchanged.feed(SMALL)
        assert exchanged.wire.is_aborted
        exchanged.ask()
        assert (await exchanged.outcome()).fault is FaultKind.CONNECTION_LOST


async def test_an_answer_is_of_no_matter_to_the_next_one() -> None:
    exchanged = Exchange()
    for data, status, body, is_reusable in GOOD.values():
        exchanged.feed(b"HTTP/1.1 429 No\r\nContent-Type: a/b\r\nRetry-After: 7\r\nContent-Length: 3\r\n\r\nabc")
        assert await exchanged.outcome() == Outcome(429, b"abc", None, is_reusable=True)
        assert exchanged.connection.retry_after == b"7"
        exchanged.connection.release()
        if is_reusable:
            exchanged.ask()
            exchanged.feed(data)
            assert await exchanged.outcome() == Outcome(status, body, None, is_reusable=True)
            assert (exchanged.connection.content_type, exchanged.connection.retry_after) == (b"application/json", b"")
            exchanged.connection.release()
        exchanged.ask()


def head_of(size: int) -> bytes:
    """A head of so many bytes, in many headers and one long one."""
    short = b"".join(b"X-%04d: %b\r\n" % (number, b"a" * 80) for number in range(size // 200))
    start = JSON_HEAD + short + b"X: "
    return start + b"a" * (size - len(start) - 23) + b"\r\nContent-Length: 2\r\n\r\n"


@pytest.mark.parametrize("step", [1, 100, 1460, 10_000, READ_BYTES])
async def test_a_head_may_have_32_kib_and_no_more_however_it_is_split(step: int) -> None:
    for size, fault in ((MAX_HEAD_BYTES, None), (MAX_HEAD_BYTES + 1, FaultKind.BAD_RESPONSE)):
        data = head_of(size)
        assert len(data) == size
        data += b"{}"
        outcome = await exchange(*(data[at : at + step] for at in range(0, len(data), step)))
        assert (outcome.fault, outcome.is_reusable) == (fault, fault is None)


ENDLESS = {
    "a status": (b"HTTP/1.1 200 O", b"K"),
    "a header's name": (b"HTTP/1.1 200 OK\r\nX", b"a"),
    "a header's value": (b"HTTP/1.1 200 OK\r\nX: ", b"a"),
    "spaces before a value": (b"HTTP/1.1 200 OK\r\nX: ", b" "),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"X: a\r\n"),
    "empty headers": (b"HTTP/1.1 200 OK\r\n", b"X:\r\n"),
    "lines before it": (b"", b"\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a chunk's size": (CHUNKED[:-3], b"0"),
    "a chunk's extension": (CHUNKED[:-2] + b";x=", b"a"),
    "a trailer's value": (CHUNKED + b"X: ", b"a"),
    "a trailer's name": (CHUNKED + b"X", b"a"),
    "trailers": (CHUNKED, b"X: a\r\n"),
}


@pytest.mark.parametrize("wants_stream", [False, True])
@pytest.mark.parametrize("name", ENDLESS)
async def test_what_says_nothing_without_end_is_cut_soon(name: str, *, wants_stream: bool) -> None:
    start, piece = ENDLESS[name]
    for size in (1, 1460, READ_BYTES):
        exchanged = Exchange(wants_stream=wants_stream)
        pieces = piece * (size // len(piece) or 1)
        fed = exchanged.feed(start, *([pieces] * (2 * READ_BYTES // len(pieces))))
        assert exchanged.wire.is_aborted
        assert fed <= MAX_HEAD_BYTES + len(start) + len(pieces)
        assert (await exchanged.outcome()).fault is FaultKind.BAD_RESPONSE


@pytest.mark.parametrize("framing", ["length", "chunks", "end"])
async def test_an_answer_and_a_stream_have_their_limits_to_the_byte(framing: str) -> None:
    limits = ResponseLimits(max_body_bytes=1000, max_stream_bytes=3000)
    for kind, wants_stream, limit in ((b"a/json", True, 1000), (b"text/event-stream", False, 1000), (b"", True, 3000)):
        for size, fault in ((limit, None), (limit + 1, FaultKind.TOO_LARGE)):
            head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n" % (kind or b"Text/Event-Stream")
            if framing == "chunks":
                pieces = [head, b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\na\r\n"] * size, b"0\r\n\r\n"]
            else:
                pieces = [head, b"Content-Length: %d\r\n\r\n" % size if framing == "length" else b"\r\n", b"a" * size]
            outcome = await exchange(*pieces, wants_stream=wants_stream, limits=limits)
            assert outcome.fault is fault
            assert len(outcome.body) == size or fault


async def test_many_small_chunks_are_no_overlong_head_in_one_read_or_in_many() -> None:
    for body in ([b"1\r\na\r\n" * 20_000], [b"1\r\n", b"a", b"\r\n"] * 20_000):
        exchanged = Exchange()
        exchanged.feed(JSON_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *body, b"0\r\n\r\n")
        assert (await exchanged.outcome())[1:] == (b"a" * 20_000, None, True)
