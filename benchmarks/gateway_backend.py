"""The backend behind the gateway benchmark: chat completions from prepared bytes, on a bare uvloop protocol.

One process serves every port, and each port is a node. A request whose body has `"stream": true` is answered
with a stream; one whose body has the word `paced` anywhere gets it at the pace of a busy GPU, one that has the words
`at length` a long one at once, and one with `ponder` a completion after a while. Run by `benchmarks.gateway_targets`;
`benchmarks.gateway_load` knows by the constants what a right answer is.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import sys
from typing import Any, cast

import uvloop

MODEL = "bench-model"
TEXT = "The quick brown fox jumps over the lazy dog, and the router carries every word of it unchanged. " * 3
CHUNKS = 200
PACED_CHUNKS = 40
PACE_SECONDS = 0.05
PONDER_SECONDS = 0.1
LONG_CHUNKS = 20_000  # 4 MB: more than the sockets on the way hold for a client that does not read

_USAGE = {"prompt_tokens": 12, "completion_tokens": 60, "total_tokens": 72}
_HEAD_END = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)")
_STREAMS = re.compile(rb'"stream"\s*:\s*true')
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


def word(number: int) -> str:
    """Return the text of the chunk with this number."""
    return f" word{number}"


def _answer(status: str, body: Any) -> bytes:
    text = json.dumps(body, separators=(",", ":")).encode()
    head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n\r\n"
    return head.encode() + text


def _completion() -> bytes:
    message: dict[str, Any] = {"role": "assistant", "content": TEXT, "refusal": None, "tool_calls": []}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    head = {"id": "chatcmpl-benchmark", "object": "chat.completion", "created": 1_767_225_600, "model": MODEL}
    return _answer("200 OK", head | {"choices": [choice], "usage": _USAGE})


def _frame(event: str) -> bytes:
    """Return one event as one HTTP chunk."""
    payload = f"data: {event}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def _stream(chunks: int) -> list[bytes]:
    """Return what is written in turn: the head with the first chunk, each other chunk, and the end."""
    head = {"id": "chatcmpl-benchmark", "object": "chat.completion.chunk", "created": 1_767_225_600, "model": MODEL}
    frames = []
    for number in range(chunks):
        delta = {"content": word(number)} | ({} if number else {"role": "assistant"})
        finish = "stop" if number == chunks - 1 else None
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        frames.append(_frame(json.dumps(head | {"choices": [choice]}, separators=(",", ":"))))
    return [_STREAM_HEAD + frames[0], *frames[1:], _frame("[DONE]") + b"0\r\n\r\n"]


COMPLETION, STREAM, PACED = _completion(), _stream(CHUNKS), _stream(PACED_CHUNKS)
_LONG = b"".join([STREAM[0], *STREAM[1:-1] * (LONG_CHUNKS // CHUNKS), STREAM[-1]])
_HEALTH = _answer("200 OK", {"status": "ok"})
_MODELS = _answer("200 OK", {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "benchmark"}]})
_NOT_FOUND = _answer("404 Not Found", {"error": {"message": "There is no such path.", "code": 404}})
_NO_CHUNKS = _answer("411 Length Required", {"error": {"message": "Send a content-length.", "code": 411}})


class Engine:
    """Writes the streams. Those without a pace get a chunk each at every turn of the loop, as a batch on a GPU would.

    A chunk is a write of its own, so that a router that keeps up reads it alone.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._streams: list[tuple[Connection, int]] = []
        self._joining: list[tuple[Connection, int]] = []

    def start(self, connection: Connection) -> None:
        """Write a stream as fast as it goes."""
        if not self._streams and not self._joining:
            self._loop.call_soon(self._turn)
        self._joining.append((connection, 0))

    def ponder(self, connection: Connection) -> None:
        """Write a completion after a while."""
        self._loop.call_later(PONDER_SECONDS, connection.write, COMPLETION)

    def start_paced(self, connection: Connection) -> None:
        """Write a chunk now and the others one pace after the other."""
        self._pace(connection, 0, self._loop.time())

    def _turn(self) -> None:
        streams, self._joining = self._streams + self._joining, []
        last = len(STREAM) - 1
        self._streams = [
            (connection, number + 1)
            for connection, number in streams
            if connection.write(STREAM[number]) and number < last
        ]
        if self._streams:
            self._loop.call_soon(self._turn)

    def _pace(self, connection: Connection, number: int, began: float) -> None:
        if connection.write(PACED[number]) and number + 1 < len(PACED):
            due = began + (number + 1) * PACE_SECONDS
            self._loop.call_at(due, self._pace, connection, number + 1, began)


class Connection(asyncio.Protocol):
    """One connection, kept open; requests are answered in their order, and none is read inside a stream."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = b""
        self._is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's is no subclass of it
        self._is_open = True

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """End the streams of it."""
        self._is_open = False

    def write(self, data: bytes) -> bool:
        """Write, and return whether anybody is there to read."""
        if self._is_open:
            self._transport.write(data)
        return self._is_open

    def data_received(self, data: bytes) -> None:
        """Take in requests, or a part of one."""
        buffer = self._buffer + data if self._buffer else data
        while (end := buffer.find(_HEAD_END)) >= 0:
            head = buffer[:end].lower()
            length = _LENGTH.search(head)
            start = end + len(_HEAD_END)
            stop = start + (int(length[1]) if length else 0)
            if len(buffer) < stop:
                break
            self._respond(head, buffer[start:stop])
            buffer = buffer[stop:]
        self._buffer = buffer

    def _respond(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"post /v1/chat/completions "):
            if b"ponder" in body:
                self._engine.ponder(self)
            elif not _STREAMS.search(body):
                self.write(COMPLETION if b"\r\ntransfer-encoding:" not in head else _NO_CHUNKS)
            elif b"paced" in body:
                self._engine.start_paced(self)
            elif b"at length" in body:
                self.write(_LONG)
            else:
                self._engine.start(self)
        elif head.startswith(b"get /health "):
            self.write(_HEALTH)
        else:
            self.write(_MODELS if head.startswith(b"get /v1/models ") else _NOT_FOUND)


async def _serve(listeners: list[socket.socket]) -> None:
    loop = asyncio.get_running_loop()
    engine = Engine(loop)
    for listener in listeners:
        await loop.create_server(lambda: Connection(engine), sock=listener, backlog=2048)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve([socket.socket(fileno=int(descriptor)) for descriptor in sys.argv[1:]]))
