"""The express lane's protocol over real sockets, before a lane that answers when the test says so."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import pytest
import uvicorn

from lucid_compute.api.app import EXPRESS
from lucid_compute.cli import express_protocol, guarded_protocol
from lucid_compute.cli.express_protocol import ExpressProtocol
from lucid_compute.cli.whole_request import WholeRequestReader
from lucid_compute.egress.late_writes import LateWrites
from lucid_compute.inference.exchange import CutReason
from tests.raw_client import PATIENCE_SECONDS, Client, assert_refused
from tests.served import eventually

SECONDS = 1.0
LARGE = 16_000_000  # as long as an answer may be, and far more than sockets hold
WAITS, AT_ONCE, LONG = "/v1/waits", "/v1/at-once", "/v1/long"
Opener = Callable[[], Awaitable[Client]]


def post(path: str, body: bytes = b"{}") -> bytes:
    """Answer a request's bytes."""
    return b"POST %b HTTP/1.1\r\nHost: lucid\r\nContent-Length: %d\r\n\r\n%b" % (path.encode(), len(body), body)


class Taken:
    """A request that the lane has taken, in place of an exchange."""

    def __init__(self, lane: Lane, client: ExpressProtocol) -> None:
        """Wait."""
        self._lane, self._client = lane, client

    def end(self, reason: CutReason) -> None:
        """End as an exchange does whose client left."""
        self._lane.taken.remove(self)
        self._lane.ended.append(reason)
        self._client.hang_up()

    def answer(self, body: bytes) -> None:
        """Have it answered."""
        self._lane.taken.remove(self)
        self._client.answer(200, [(b"content-length", b"%d" % len(body))], body)


class Lane:
    """Takes requests to two paths: one is answered with its own body, the other when the test says so."""

    def __init__(self) -> None:
        """Serve none yet."""
        self.taken: list[Taken] = []
        self.ended: list[CutReason] = []

    def take(self, client: ExpressProtocol, path: bytes, headers: dict[bytes, bytes], body: bytes) -> Taken | None:  # noqa: ARG002 - as the real one's
        """Take a request, unless it is for another path."""
        if path.decode() not in {WAITS, AT_ONCE}:
            return None
        taken = Taken(self, client)
        self.taken.append(taken)
        if path.decode() == AT_ONCE:
            asyncio.get_running_loop().call_soon(taken.answer, body)
        return taken

    def answer_all(self, body: bytes) -> None:
        """Answer all that wait, in one turn of the loop."""
        for taken in [*self.taken]:
            taken.answer(body)


class Service:
    """A server in a thread, on uvloop as in a worker; its application answers with what it was sent."""

    def __init__(self) -> None:
        """Listen, and start."""
        self.lane = Lane()
        self.faults: list[dict[str, Any]] = []  # what went wrong in callbacks
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        self._started = threading.Event()
        config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            loop="uvloop",
            http=ExpressProtocol,
            ws="none",
            lifespan="on",
            log_config=None,
            timeout_keep_alive=1,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE_SECONDS)

    async def is_alone(self) -> bool:
        """Whether no connection is left."""
        await asyncio.sleep(SECONDS / 2)  # it may not have come yet
        return not self._server.server_state.connections

    async def takes(self, count: int) -> None:
        """Return once so many requests wait in the lane."""

        async def does() -> bool:
            return len(self.lane.taken) == count

        await eventually(does)

    def answer_all(self, body: bytes = b"waited") -> None:
        """Answer all that wait, in one turn of the loop."""
        self._loop.call_soon_threadsafe(self.lane.answer_all, body)

    def answer_and_shut_down(self) -> None:
        """Answer all that wait, and tell every connection in the same turn to end."""

        def both() -> None:
            self.lane.answer_all(b"waited")
            for connection in [*self._server.server_state.connections]:
                connection.shutdown()

        self._loop.call_soon_threadsafe(both)

    def stop(self) -> None:
        """End it, and whatever is open."""
        self._server.should_exit = True
        self._thread.join(PATIENCE_SECONDS)
        self._listener.close()
        assert not self._thread.is_alive()
        assert not self.faults

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        if scope["path"] in {LONG, WAITS}:
            body = b"x" * LARGE
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _live(self, scope: Any, receive: Any, send: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.faults.append(context))
        scope["state"][EXPRESS] = self.lane
        await receive()
        await send({"type": "lifespan.startup.complete"})
        self._started.set()
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A server whose deadlines are short."""
    monkeypatch.setattr(guarded_protocol, "HEAD_SECONDS", SECONDS)
    monkeypatch.setattr(guarded_protocol, "GOODBYE_SECONDS", SECONDS)
    monkeypatch.setattr(guarded_protocol, "READ_SECONDS", SECONDS)
    monkeypatch.setattr(guarded_protocol, "SWEEP_SECONDS", 0.05)
    monkeypatch.setattr(express_protocol, "_late_writes", LateWrites())  # a loop's, and each test has its own
    monkeypatch.setattr(express_protocol, "_reader", WholeRequestReader())
    started = Service()
    yield started
    started.stop()


@pytest.fixture
async def open_client(service: Service) -> AsyncIterator[Opener]:
    """Open connections that are closed when the test ends."""
    opened: list[Client] = []

    async def opener() -> Client:
        opened.append(await Client.open(service.port))
        return opened[-1]

    yield opener
    for client in opened:
        await client.close()


async def test_what_follows_an_answer_at_once_is_written_after_it(service: Service, open_client: Opener) -> None:
    """Also a refusal, which is written at once: it must neither overtake the answer nor cost others theirs."""
    bad, good = await open_client(), await open_client()
    bad.send(post(WAITS))
    await service.takes(1)
    bad.send(b"garbage\r\n\r\n")
    await asyncio.sleep(0.1)
    good.send(post(WAITS))
    await service.takes(2)
    service.answer_all()
    answer = await asyncio.wait_for(good.answer(), PATIENCE_SECONDS / 10)
    assert answer.endswith(b"\r\n\r\nwaited")
    answer = await bad.rest()
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert_refused(answer, 400, answers_before=1)


async def test_an_answer_of_the_turn_in_which_the_service_stops_is_written(
    service: Service, open_client: Opener
) -> None:
    """Then the connection is closed."""
    client = await open_client()
    client.send(post(WAITS))
    await service.takes(1)
    service.answer_and_shut_down()
    assert (await client.rest()).endswith(b"\r\n\r\nwaited")


@pytest.mark.parametrize("begun", [1, 5, 10, 40])
async def test_a_request_that_hardly_began_with_the_one_before_it_is_not_lost(open_client: Opener, begun: int) -> None:
    """Nor does it leave anything behind for the next."""
    client, other = await open_client(), await open_client()
    first, second = post(AT_ONCE, b"one"), post(AT_ONCE, b"two")
    client.send(first + second[:begun])
    assert (await client.answer()).endswith(b"\r\n\r\none")
    other.send(post(AT_ONCE, b"other"))
    assert (await other.answer()).endswith(b"\r\n\r\nother")
    client.send(second[begun:])
    assert (await client.answer()).endswith(b"\r\n\r\ntwo")


@pytest.mark.parametrize("waits", [True, False])
async def test_half_a_head_after_an_answer_is_cut_in_time(
    service: Service, open_client: Opener, *, waits: bool
) -> None:
    """Whether it came while the answer was awaited or after it."""
    client, half = await open_client(), b"POST /v1/wai"
    client.send(post(WAITS))
    await service.takes(1)
    if waits:
        client.send(half)
        await asyncio.sleep(0.1)
    service.answer_all()
    await client.answer()
    began = time.monotonic()
    answer, _ = await asyncio.wait_for(client.drip(b"" if waits else half, b"t", SECONDS / 10), 10 * SECONDS)
    assert time.monotonic() - began > SECONDS / 2
    assert_refused(answer, 408)


async def test_a_client_that_leaves_is_noticed_although_it_asked_for_more(
    service: Service, open_client: Opener
) -> None:
    """What it sent behind its request does not hide that it left."""
    client = await open_client()
    client.send(post(WAITS))
    await service.takes(1)
    client.send(post(WAITS))
    await asyncio.sleep(0.1)
    await client.close()
    await asyncio.wait_for(service.takes(0), 10 * SECONDS)
    assert service.lane.ended == [CutReason.CLIENT_LEFT]


async def open_slow_reader(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Answer a connection whose receiving side holds little."""
    connecting = socket.socket()
    connecting.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    await asyncio.to_thread(connecting.connect, ("127.0.0.1", port))
    return await asyncio.open_connection(sock=connecting, limit=65536)


@pytest.mark.parametrize("ending", ["", "Connection: close\r\n"])
@pytest.mark.parametrize("path", [WAITS, LONG])
@pytest.mark.parametrize("reads", [True, False])
async def test_a_client_is_cut_only_when_it_does_not_read(
    service: Service, path: str, ending: str, *, reads: bool
) -> None:
    """In both lanes, however long an answer takes that is read; what nobody reads is not kept for ever."""
    reader, writer = await open_slow_reader(service.port)
    writer.write(post(path).replace(b"Host", ending.encode() + b"Host"))
    if path == WAITS and not ending:
        await service.takes(1)
        service.answer_all(b"x" * LARGE)
    if not reads:
        await eventually(service.is_alone, 10 * SECONDS)
        writer.transport.abort()
        return
    got, began = 0, time.monotonic()
    while got < LARGE and (data := await reader.read(65536)):
        got += len(data)
        if time.monotonic() - began < 3.5 * SECONDS:
            await asyncio.sleep(0.02)
    writer.close()
    assert got > LARGE
