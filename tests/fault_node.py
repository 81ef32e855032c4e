"""A node that misbehaves as configured, on a real socket; with an upstream, a proxy that damages its responses.

    async with FaultNode(Behaviour(delay_seconds=1)) as node:     # at node.url: answers well, a second late
        node.behaviour = Behaviour(answer=redirect("http://elsewhere:8080/"))  # the requests from now on
        node.script += [Behaviour(ending=Ending.RESET)]           # the next request only; each entry serves one
        node.by_path["/health"] = Behaviour()                     # requests to this path
        assert node.requests[-1].body == b"..." and node.connections == 1
        await node.stop()                                         # dies; `start` brings it back on its port

    async with FaultNode(Behaviour(cut_body_after=100, ending=Ending.RESET), upstream=llama.url) as proxy:
        ...                                                       # the real answer, reset after 100 bytes of its body

A request is served by what `script` says next, else `by_path`, else `behaviour`; a proxy passes it on as it came and
delivers the upstream's answer as the behaviour says, unless that has an answer of its own. Who hangs up ends the
delivery at once, and the upstream's with it. Nothing here reads chunked requests or pipelines.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace
from typing import NamedTuple, Self
from urllib.parse import urlsplit

from httptools import HttpResponseParser

from tests.fault_answers import Answer, Pieces, respond_well

_HEAD_END = b"\r\n\r\n"
_MAX_HEAD = 1024 * 1024
_POLL_SECONDS = 0.005


class Ending(Enum):
    """What happens to a connection after a response, complete or cut. A cut one that is kept open stays silent."""

    KEEP = "keep"
    CLOSE = "close"  # FIN
    RESET = "reset"  # RST


class Request(NamedTuple):
    """A received request; `connection` counts from 1, header names are in lower case."""

    connection: int
    method: str
    path: str
    headers: dict[str, str]
    head: bytes
    body: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How one request is served, in the order of these fields.

    Pauses are in seconds, and may be `math.inf`. The body's bytes are counted as they stand on the wire, chunk sizes
    among them. `greeting` belongs to the connection: it is taken from the node's `behaviour` when one is accepted.
    """

    greeting: bytes = b""  # before anything was asked
    answer: Answer | None = None  # None: the upstream's, or a good node's when there is none
    delay_seconds: float = 0.0  # before the first byte
    drip_head_seconds: float = 0.0  # after every `drip_bytes` of the head
    cut_head_after: int | None = None  # bytes of the head, after which `ending` comes at once
    drip_body_seconds: float = 0.0
    drip_bytes: int = 1
    cut_body_after: int | None = None
    surplus: bytes = b""  # behind the answer, in a write of its own
    surplus_after_seconds: float = 0.0
    ending: Ending = Ending.KEEP
    idle_seconds: float = math.inf  # how long the connection is kept for a next request


class FaultNode:
    """Listens on `host` while it is entered. `connections` counts those accepted, `open_connections` those left."""

    def __init__(
        self,
        behaviour: Behaviour | None = None,
        *,
        upstream: str | None = None,
        tls: ssl.SSLContext | None = None,
        host: str = "127.0.0.1",
        accepts: bool = True,
    ) -> None:
        """`upstream`: the URL of a node to pass requests on to. `accepts`: if False, even connects wait for ever."""
        self.behaviour = behaviour or Behaviour()
        self.script: list[Behaviour] = []
        self.by_path: dict[str, Behaviour] = {}
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self._upstream, self._tls, self._host, self._accepts = upstream, tls, host, accepts
        self._open: dict[asyncio.Task[None], asyncio.StreamWriter] = {}
        self._server: asyncio.Server | None = None
        self._sockets: list[socket.socket] = []

    @property
    def url(self) -> str:
        """The URL where it listens, without a path."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    @property
    def open_connections(self) -> int:
        """Return how many connections are open now."""
        return len(self._open)

    async def start(self) -> None:
        """Listen, on the same port as before if it did before."""
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        listening = socket.create_server((self._host, self.port), family=family, backlog=100 if self._accepts else 0)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio sees to it only for its own sockets
        self.port = listening.getsockname()[1]
        if self._accepts:
            self._server = await asyncio.get_running_loop().create_server(self._accept, sock=listening, ssl=self._tls)
            return
        self._sockets = [listening, *(socket.socket(family) for _ in range(4))]
        for filler in self._sockets[1:]:  # the kernel takes in as many as it queues, and lets others wait
            filler.setblocking(False)
            filler.connect_ex((self._host, self.port))

    async def stop(self, *, resets: bool = True) -> None:
        """Stop listening and end every connection."""
        if self._server is not None:
            self._server.close()
        for closing in self._sockets:
            closing.close()
        self._server, self._sockets = None, []
        await self.hang_up(Ending.RESET if resets else Ending.CLOSE)

    async def hang_up(self, ending: Ending = Ending.RESET) -> None:
        """End every connection at once."""
        tasks = [*self._open]
        for task, writer in self._open.items():
            _end(writer, ending)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def __aenter__(self) -> Self:
        """Start."""
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        """Stop."""
        await self.stop()
        await asyncio.sleep(_POLL_SECONDS)  # what was closed is let go

    async def until(self, condition: Callable[[Self], bool], seconds: float = 2.0) -> None:
        """Wait for `condition`, such as `lambda node: not node.open_connections`.

        Raises:
            TimeoutError: it did not come.
        """
        async with asyncio.timeout(seconds):
            while not condition(self):  # noqa: ASYNC110 - anything may be waited for
                await asyncio.sleep(_POLL_SECONDS)

    def _accept(self) -> asyncio.StreamReaderProtocol:
        reader = _Reader(limit=_MAX_HEAD)

        def begin(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer, self.connections))
            self._open[task] = writer
            reader.task = task
            task.add_done_callback(self._open.pop)

        return asyncio.StreamReaderProtocol(reader, begin)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        ending, idle_seconds = Ending.KEEP, math.inf
        try:
            writer.write(self.behaviour.greeting)
            while ending is Ending.KEEP:
                request = await _read_request(reader, number, idle_seconds)
                self.requests.append(request)
                behaviour = self.script.pop(0) if self.script else self.by_path.get(request.path, self.behaviour)
                own = behaviour.answer or (None if self._upstream else respond_well(request.body))
                async with nullcontext(own) if own else _ask(self._upstream or "", request) as answer:
                    ending, idle_seconds = await _deliver(writer, behaviour, answer), behaviour.idle_seconds
        except (EOFError, TimeoutError):
            ending = Ending.CLOSE  # so did the upstream, or the next request did not come in time
        except (OSError, ValueError, asyncio.LimitOverrunError):
            ending = Ending.RESET  # so did the upstream, or the request was none
        finally:
            _end(writer, ending)


class _Reader(asyncio.StreamReader):
    """Cancels the connection's task when its client disconnects."""

    task: asyncio.Task[None] | None = None

    def feed_eof(self) -> None:
        super().feed_eof()
        if self.task is not None:
            self.task.cancel()

    def set_exception(self, exc: Exception) -> None:
        super().set_exception(exc)
        if self.task is not None:
            self.task.cancel()


async def _read_request(reader: asyncio.StreamReader, number: int, idle_seconds: float) -> Request:
    async with asyncio.timeout(None if math.isinf(idle_seconds) else idle_seconds):
        head = await reader.readuntil(_HEAD_END)
    first, *lines = head[: -len(_HEAD_END)].decode("latin-1").split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    method, path, _ = first.split(" ")
    return Request(number, method, path, headers, head, body)


@asynccontextmanager
async def _ask(url: str, request: Request) -> AsyncIterator[Answer]:
    """Pass a request on to the real node; stream its response's body."""
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port, limit=_MAX_HEAD)
    try:
        writer.write(request.head + request.body)
        is_over = asyncio.Event()
        parser = HttpResponseParser(SimpleNamespace(on_message_complete=is_over.set))
        head = await reader.readuntil(_HEAD_END)
        parser.feed_data(head)

        async def body() -> AsyncIterator[bytes]:
            while not is_over.is_set():
                if not (data := await reader.read(_MAX_HEAD)):
                    raise EOFError
                parser.feed_data(data)
                yield data

        yield Answer(head, body)
    finally:
        writer.transport.abort()


async def _deliver(writer: asyncio.StreamWriter, behaviour: Behaviour, answer: Answer) -> Ending:
    """Write a response as the behaviour says; return what happens to the connection."""
    await _pause(behaviour.delay_seconds)
    head = behaviour.cut_head_after, behaviour.drip_head_seconds, behaviour.drip_bytes
    body = behaviour.cut_body_after, behaviour.drip_body_seconds, behaviour.drip_bytes
    if await _write(writer, answer.head, *head) and await _write(writer, answer.body, *body):
        await _pause(behaviour.surplus_after_seconds)
        writer.write(behaviour.surplus)
        await writer.drain()
    elif behaviour.ending is Ending.KEEP:
        await _pause(math.inf)
    return behaviour.ending


async def _write(
    writer: asyncio.StreamWriter, pieces: Pieces, cut_after: int | None, drip_seconds: float, drip_bytes: int
) -> bool:
    """Write the pieces; return False if they were cut."""
    left = math.inf if cut_after is None else cut_after
    async for piece in _each(pieces):
        for drop in [piece[i : i + drip_bytes] for i in range(0, len(piece), drip_bytes)] if drip_seconds else [piece]:
            writer.write(drop if len(drop) <= left else drop[: int(left)])
            left -= len(drop)
            if left <= 0:
                return False
            await writer.drain()
            await _pause(drip_seconds)
    return left > 0


async def _each(pieces: Pieces) -> AsyncIterator[bytes]:
    source = iter([pieces]) if isinstance(pieces, bytes) else pieces()
    if isinstance(source, Iterator):
        for piece in source:
            yield piece
        return
    async for piece in source:
        yield piece


async def _pause(seconds: float) -> None:
    if math.isinf(seconds):
        await asyncio.Event().wait()
    await asyncio.sleep(seconds)  # for no time too, so that one that writes for ever lets others run


def _end(writer: asyncio.StreamWriter, ending: Ending) -> None:
    if ending is Ending.RESET and (used := writer.get_extra_info("socket")) is not None and used.fileno() >= 0:
        used.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    writer.close()
