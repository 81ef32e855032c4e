"""Responses of a node, valid and invalid ones, byte for byte as on the wire, for a `FaultNode`."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain, repeat
from typing import NamedTuple

# Written one after the other; an iterator may never end.
Pieces = bytes | Callable[[], Iterator[bytes] | AsyncIterator[bytes]]

JSON = "application/json"
OK_BODY = b'{"ok":true,"choices":[{"message":{"content":"ok"},"text":"ok"}],"data":[{"embedding":[0]}],"output":[]}'
EVENTS = "text/event-stream"
OK_STREAM = (
    b'data: {"ok":true,"choices":[{"index":0,"delta":{"content":"ok"},"text":"ok","finish_reason":"stop"}]}\n\n'
    b"data: [DONE]\n\n"
)


class Answer(NamedTuple):
    """The exact bytes of a response."""

    head: Pieces
    body: Pieces = b""


def respond(
    body: bytes = OK_BODY, *headers: str, status: int = 200, content_type: str = JSON, length: int | None = None
) -> Answer:
    """Return a response with `body`, and its length or a false `length`."""
    said = len(body) if length is None else length
    return Answer(_head(status, content_type, f"Content-Length: {said}", *headers), body)


def respond_well(request: bytes) -> Answer:
    """Return what a good node responds to a request's body: OK_STREAM if it asks for a stream, else OK_BODY."""
    asks = request.replace(b" ", b"").find(b'"stream":true') >= 0
    return respond_in_chunks(OK_STREAM) if asks else respond()


def respond_in_chunks(*parts: bytes, status: int = 200, content_type: str = EVENTS, ends: bool = True) -> Answer:
    """Return a response in chunks, each a separate write; without the last one unless it `ends`."""
    frames = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts] + [b"0\r\n\r\n"] * ends
    return Answer(_head(status, content_type, "Transfer-Encoding: chunked"), lambda: iter(frames))


def respond_until_close(body: Pieces, content_type: str = EVENTS) -> Answer:
    """Return a response without a length: the connection's end ends it, so use it with `Ending.CLOSE`."""
    return Answer(_head(200, content_type), body)


def chat_stream(*texts: str, done: bool = True) -> Answer:
    """Return a stream of chat completion events, one for each text, and `[DONE]` if `done`."""
    choices = [[{"index": 0, "delta": {"content": text}, "finish_reason": None}] for text in texts]
    events = [json.dumps({"object": "chat.completion.chunk", "choices": choice}) for choice in choices]
    return respond_in_chunks(*(f"data: {event}\n\n".encode() for event in [*events, *["[DONE]"] * done]))


def unfinished_chat(*texts: str) -> Answer:
    """Return such a stream without the last chunk, which would end the response."""
    answer = chat_stream(*texts, done=False)
    assert callable(answer.body)
    frames = [*answer.body()][:-1]  # type: ignore[misc]
    return answer._replace(body=lambda: iter(frames))


def redirect(location: str, status: int = 302) -> Answer:
    """Return a redirect."""
    return respond(b"", f"Location: {location}", status=status)


def gzip_bomb(megabytes: int = 64) -> Answer:
    """Return zeros, compressed although the request forbids it."""
    return respond(gzip.compress(bytes(megabytes << 20), 9), "Content-Encoding: gzip")


def endless_header() -> Answer:
    """Return a response with a header that never ends."""
    return Answer(lambda: chain([b"HTTP/1.1 200 OK\r\nX-Endless: "], repeat(b"a" * 4096)))


def endless_headers() -> Answer:
    """Return a response with endless headers, a hundred at a time."""
    return Answer(lambda: chain([b"HTTP/1.1 200 OK\r\n"], repeat(b"X-Endless: a\r\n" * 100)))


def endless_trailer() -> Answer:
    """Return a response in chunks whose trailer never ends."""
    head = _head(200, JSON, "Transfer-Encoding: chunked")
    return Answer(head, lambda: chain([b"2\r\n{}\r\n0\r\nX-Endless: "], repeat(b"a" * 4096)))


def endless_body(content_type: str = JSON, piece: bytes = b" " * 16384) -> Answer:
    """Return a response with endless chunks."""
    frame = b"%x\r\n%b\r\n" % (len(piece), piece)
    return Answer(_head(200, content_type, "Transfer-Encoding: chunked"), lambda: repeat(frame))


def _head(status: int, content_type: str, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} Said", f"Content-Type: {content_type}", *headers, "", ""]).encode()


# What is no response, or one that two parsers could read differently.
_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
BROKEN: dict[str, bytes] = {
    "garbage": b"\x16\x03\x01\x02\x00 what is this\r\n\r\n",
    "another protocol": b"220 mail.example ESMTP\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00d",
    "a request": b"GET / HTTP/1.1\r\nHost: gateway\r\n\r\n",
    "both lengths": _OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "both lengths, turned round": _OK + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths": _OK + b"Content-Length: 2\r\nContent-Length: 7\r\n\r\n{}",
    "one length twice": _OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": _OK + b"Content-Length: 2, 2\r\n\r\n{}",
    "a negative length": _OK + b"Content-Length: -2\r\n\r\n{}",
    "a signed length": _OK + b"Content-Length: +2\r\n\r\n{}",
    "a length beyond 64 bits": _OK + b"Content-Length: 36893488147419103234\r\n\r\n{}",
    "a space before the colon": _OK + b"Content-Length : 2\r\n\r\n{}",
    "a folded header": _OK + b"X: a\r\n Content-Length: 2\r\n\r\n{}",
    "NUL in a header": _OK + b"X: a\0b\r\nContent-Length: 2\r\n\r\n{}",
    "line feeds alone": b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
    "chunked twice": _OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip, then chunked": _OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "chunked, then gzip": _OK + b"Transfer-Encoding: chunked, gzip\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "identity for a length": _OK + b"Transfer-Encoding: identity\r\n\r\n{}",
    "a chunk beyond 64 bits": _OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}\r\n0\r\n\r\n",
    "a negative chunk": _OK + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "a chunk without its end": _OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}xx0\r\n\r\n",
    "gzip": _OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}",
    "an encoding without a name": _OK + b"Content-Encoding:\r\nContent-Length: 2\r\n\r\n{}",
    "an upgrade": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n",
    "101 without an upgrade": b"HTTP/1.1 101 Switching\r\n\r\n" + _OK + b"Content-Length: 2\r\n\r\n{}",
    "status 0": b"HTTP/1.1 000 No\r\nContent-Length: 2\r\n\r\n[]" + _OK + b"Content-Length: 2\r\n\r\n{}",
    "a status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\n{}",
    "HTTP/1.2": b"HTTP/1.2 200 OK\r\nContent-Length: 2\r\n\r\n{}",
}
# A valid response of two bytes, or of none with 204, followed by surplus bytes.
SURPLUS: dict[str, bytes] = {
    "a body where there is none": b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\n{}",
    "a shorter length": _OK + b"Content-Length: 2\r\n\r\n{}, {}",
    "a second answer": (_OK + b"Content-Length: 2\r\n\r\n{}") * 2,
    "half a second answer": _OK + b"Content-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nX-Evil: ",
    "one more byte": _OK + b"Content-Length: 2\r\n\r\n{}H",
    "more behind a farewell": _OK + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\n",
    "more behind the last chunk": _OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\nHTTP/1.1 ",
}
