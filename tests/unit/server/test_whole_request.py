"""Which packets are a whole request that may be served at once, and which are left to uvicorn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.server.fast_path import CompleteRequest, CompleteRequestReader

HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: lucid\r\nAuthorization: Bearer k\r\n"
BODY = b'{"model": "m"}'
WHOLE = HEAD + b"Content-Length: 14\r\n\r\n" + BODY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n"
NOT_ONE = {
    "half a head": HEAD,
    "two requests": WHOLE + WHOLE,
    "one and a half": WHOLE + HEAD,
    "one and a letter": WHOLE + b"P",
    "one and a method": WHOLE + b"POST ",
    "chunks": CHUNKED,
    "a client that waits": HEAD + b"Expect: 100-continue\r\nContent-Length: 14\r\n\r\n",
    "another protocol": HEAD + b"Connection: upgrade\r\nUpgrade: h2c\r\nContent-Length: 14\r\n\r\n" + BODY,
    "the last one": HEAD + b"Connection: close\r\nContent-Length: 14\r\n\r\n" + BODY,
    "HTTP/1.0": WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    "two lengths": HEAD + b"Content-Length: 14\r\nContent-Length: 15\r\n\r\n" + BODY,
    "two keys": HEAD + b"Authorization: Bearer l\r\nContent-Length: 14\r\n\r\n" + BODY,
    "two keys in two cases": HEAD + b"authorization: Bearer l\r\nContent-Length: 14\r\n\r\n" + BODY,
    "a header that goes on in a second line": HEAD + b"X: a\r\n b\r\nContent-Length: 14\r\n\r\n" + BODY,
    "both framings": HEAD + b"Content-Length: 14\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "an answer": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "noise": b"POST /v1/\x00\xff",
    "nothing": b"",
}


def test_a_whole_request_is_read() -> None:
    """Path, headers by their names in lower case, body."""
    expected = {b"host": b"lucid", b"authorization": b"Bearer k", b"content-length": b"14"}
    assert CompleteRequestReader().read(WHOLE) == CompleteRequest(b"/v1/chat/completions", expected, BODY)


@pytest.mark.parametrize("data", NOT_ONE.values(), ids=NOT_ONE)
def test_anything_else_is_left_and_leaves_nothing_behind(data: bytes) -> None:
    """The next whole request is read as if nothing had been."""
    reader = CompleteRequestReader()
    assert reader.read(data) is None
    assert isinstance(reader.read(WHOLE), CompleteRequest)


@given(st.integers(1, len(BODY)))
def test_what_is_missing_of_a_body_is_counted(missing: int) -> None:
    """The headers are whole, so it is known how much comes."""
    reader = CompleteRequestReader()
    assert reader.read(WHOLE[:-missing]) == missing
    assert isinstance(reader.read(WHOLE), CompleteRequest)


@given(st.lists(st.binary(max_size=200), max_size=5))
def test_no_bytes_harm_the_reader(noise: list[bytes]) -> None:
    """Whatever it is fed, it answers, and reads the next request right."""
    reader = CompleteRequestReader()
    for data in noise:
        reader.read(b"POST /v1/" + data)
        reader.read(data)
    assert isinstance(reader.read(WHOLE), CompleteRequest)
