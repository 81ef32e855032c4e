"""The clients of the soak: most are well behaved, and the others leave, do not read, send 10 MB, or nonsense.

Run by `benchmarks.gateway_soak`, which writes a `Plan` to its standard input as JSON; it prints what became of its
requests, once a second, as JSON. One process, so that it can be kept off the core of what is soaked.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import uvloop

from benchmarks.gateway_backend import PACE_SECONDS, PACED_CHUNKS
from benchmarks.gateway_load import find_body, is_completion
from benchmarks.gateway_targets import request_for

BIG_BYTES = 10 * 1024 * 1024 - 2048  # of a body: just under the limit of 10 MiB
ANSWER_SECONDS = 60.0
_READ_BYTES = 64 * 1024
_SMALL_BUFFER = 8 * 1024  # of a reader's socket, so that what it does not read stays where it came from
_STREAM_END = b"\r\n0\r\n\r\n"
_DONE = b"data: [DONE]"


class Plan(NamedTuple):
    """So many requests, over so many clients at a time. `big_share` of them have 10 MB."""

    port: int
    key: str
    requests: int
    clients: int
    big_share: float


class Connection(NamedTuple):
    """A client's connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Clients:
    """All the clients. `outcomes` counts what became of their requests."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._left = plan.requests
        self._random = random.Random(7)
        self.outcomes: Counter[str] = Counter()
        self._completion, self._stream = (request_for(plan.key, stream=streams).encode() for streams in (False, True))
        self._paced = request_for(plan.key, content="At a paced rate.", stream=True).encode()
        self._long = request_for(plan.key, content="Say it at length.", stream=True).encode()
        self._big = request_for(plan.key, content="x" * BIG_BYTES).encode()
        self._too_big = request_for(plan.key, content="x" * (BIG_BYTES + 4096)).encode()
        broken = request_for(plan.key)
        self._nonsense = [broken.replace('{"model', "{,model").encode(), broken.replace('"Say', '"\\qy').encode()]
        kinds: dict[Callable[[], Awaitable[str]], float] = {
            self._leave_a_stream: 0.04,
            self._leave_before_the_answer: 0.02,
            self._read_at_a_pace: 0.005,
            self._read_slowly: 0.004,
            self._send_nonsense: 0.01,
            self._send_much: plan.big_share,
            self._send_too_much: plan.big_share / 5,
        }
        self._kinds, self._weights = list(kinds), list(kinds.values())

    async def run(self) -> None:
        """Send everything, and say once a second what became of it."""
        telling = asyncio.create_task(self._tell())
        await asyncio.gather(*(self._work() for _ in range(self._plan.clients)))
        telling.cancel()
        self._print()

    async def _work(self) -> None:
        """Send one request after the other; nine of ten on one connection that is kept."""
        kept: Connection | None = None
        while self._left > 0:
            self._left -= 1
            other = self._random.choices([*self._kinds, None], [*self._weights, 1 - sum(self._weights)])[0]
            try:
                async with asyncio.timeout(ANSWER_SECONDS):
                    if other is not None:
                        self.outcomes[await other()] += 1
                        continue
                    kept = kept or await self._connect()
                    self.outcomes[await self._ask(kept)] += 1
            except TimeoutError:
                self.outcomes["NO ANSWER IN TIME"] += 1
                kept = None
            except (OSError, asyncio.IncompleteReadError):
                self.outcomes["connection lost"] += 1
                kept = None
        if kept is not None:
            kept.writer.close()

    async def _connect(self, buffer_bytes: int = 0) -> Connection:
        made = socket.socket()
        if buffer_bytes:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        made.setblocking(False)
        await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", self._plan.port))
        limit = buffer_bytes or _READ_BYTES
        return Connection(*await asyncio.open_connection(sock=made, limit=limit))

    async def _ask(self, connection: Connection) -> str:
        """Ask for a completion, or for a stream once in eight times, and read all of it."""
        streams = self._random.random() < 1 / 8
        connection.writer.write(self._stream if streams else self._completion)
        answer = await _read_answer(connection.reader)
        return _judge(answer, is_stream=streams)

    async def _leave_a_stream(self) -> str:
        return await self._leave(self._random.choice((self._stream, self._paced, self._long)), 30_000)

    async def _leave_before_the_answer(self) -> str:
        return await self._leave(self._random.choice((self._completion, self._paced, self._big)), 0)

    async def _leave(self, request: bytes, most_bytes: int) -> str:
        connection = await self._connect()
        connection.writer.write(request[: self._random.choice((len(request), len(request) // 2))])
        if most_bytes:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.2):
                    await connection.reader.readexactly(self._random.randrange(1, most_bytes))
        connection.writer.transport.abort()
        return "left"

    async def _read_at_a_pace(self) -> str:
        return await self._once(self._paced, is_stream=True)

    async def _send_much(self) -> str:
        return await self._once(self._big)

    async def _send_too_much(self) -> str:
        return await self._once(self._too_big)

    async def _send_nonsense(self) -> str:
        return await self._once(self._random.choice(self._nonsense))

    async def _once(self, request: bytes, *, is_stream: bool = False) -> str:
        connection = await self._connect()
        try:
            connection.writer.write(request)
            return _judge(await _read_answer(connection.reader), is_stream=is_stream)
        finally:
            connection.writer.transport.abort()

    async def _read_slowly(self) -> str:
        """Take a long stream into a small buffer, sleep, then read on or leave."""
        connection = await self._connect(_SMALL_BUFFER)
        try:
            connection.writer.write(self._long)
            await asyncio.sleep(PACE_SECONDS * PACED_CHUNKS * self._random.random())
            if self._random.random() < 0.5:  # noqa: PLR2004 - as many read on as leave
                return "did not read, and left"
            return _judge(await _read_answer(connection.reader), is_stream=True)
        finally:
            connection.writer.transport.abort()

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._print()

    def _print(self) -> None:
        print(json.dumps(self.outcomes), flush=True)


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    """Return the bytes of one response; of a long stream only the checked parts, its beginning and its end."""
    answer = await reader.readuntil(b"\r\n\r\n")
    if b"transfer-encoding: chunked" not in answer.lower():
        while find_body(answer) is None:
            if not (piece := await reader.read(_READ_BYTES)):
                raise ConnectionError
            answer += piece
        return answer
    tail = b""
    while not tail.endswith(_STREAM_END):
        if not (piece := await reader.read(_READ_BYTES)):
            raise ConnectionError
        tail = (tail + piece)[-2 * _READ_BYTES :]
    return answer + tail


def _judge(answer: bytes, *, is_stream: bool) -> str:
    status = answer[9:12].decode(errors="replace")
    if status != "200":
        return f"answered {status}"
    if is_stream:
        return "streamed" if _DONE in answer[-200:] else "stream ended with an error"
    return "completed" if is_completion(find_body(answer) or b"") else "WRONG ANSWER"


if __name__ == "__main__":
    uvloop.run(Clients(Plan(**json.load(sys.stdin))).run())
