"""The protocol of one worker over real sockets, with deadlines so short that each can be waited for."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn

from lucid_compute.server.http_protocol import ABORT, ConnectionLimits, HttpProtocol
from lucid_compute.web.request_guard import RequestGuard
from tests.lucid_serve import wait_until
from tests.raw_client import Client, assert_refused

SECONDS = 1.0
GET = b"GET / HTTP/1.1\r\nHost: lucid\r\n\r\n"
HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: lucid\r\n"
HEADER = b"X-Filler: " + b"x" * 1000 + b"\r\n"


class HastyProtocol(HttpProtocol):
    """The protocol with short deadlines."""

    limits = ConnectionLimits(head_seconds=SECONDS, goodbye_seconds=2 * SECONDS, sweep_seconds=0.05)


class Service:
    """A server in a thread, on uvloop as in a worker."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.port: int = self._listener.getsockname()[1]
        config = uvicorn.Config(
            RequestGuardBut("/early", "/endless"),
            loop="uvloop",
            http=HastyProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_graceful_shutdown=10,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listener],), daemon=True)
        self._thread.start()

    @property
    def connections(self) -> int:
        """Return how many are open."""
        return len(self._server.server_state.connections)

    def stop(self) -> None:
        """End it, and whatever is open."""
        self._server.should_exit = True
        self._thread.join(20)
        self._listener.close()
        assert not self._thread.is_alive()


class RequestGuardBut:
    """The application behind the request guard, except a few paths that read no body."""

    def __init__(self, *paths: str) -> None:
        self._paths = paths
        self._guarded = RequestGuard(answer, body_seconds=SECONDS)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        await (answer if scope["path"] in self._paths else self._guarded)(scope, receive, send)


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Return with the path, after a while for /late; for /endless send more than anyone reads, and hang up."""
    if scope["path"] == "/late":
        await asyncio.sleep(2.5 * SECONDS)
    body = scope["path"].encode()
    length = str(10**9 if body == b"/endless" else len(body)).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    try:
        async with asyncio.timeout(0.3):
            while body == b"/endless":
                await send({"type": "http.response.body", "body": b"x" * 100_000, "more_body": True})
    except TimeoutError:
        scope["extensions"][ABORT]()
    else:
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def service() -> Iterator[Service]:
    """A server whose deadlines are short."""
    started = Service()
    yield started
    started.stop()


async def drip(service: Service, start: bytes, drop: bytes, *first: bytes) -> tuple[bytes, float]:
    """Send each of `first` in two pieces and get it answered, then drip; return what came then, and after how long."""
    opened_at = time.monotonic()
    client = await Client.open(service.port)
    for data in first:
        client.send(data[:10])
        await asyncio.sleep(0.05)
        client.send(data[10:])
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    await asyncio.sleep(1.5 * SECONDS if first else 0)  # a kept connection may be idle for longer
    answer, seconds = await client.drip(start, drop, pause_seconds=SECONDS / 10)
    return answer, seconds if first else time.monotonic() - opened_at


def assert_ended_in_time(seconds: float, at_least: float = SECONDS) -> None:
    """It took as long as is allowed and not much longer, as far as busy machines go."""
    assert at_least - 0.15 < seconds < at_least * 3 + 2


async def test_a_body_that_drips_is_answered_and_then_cut(service: Service) -> None:
    """At its deadline it is answered 400; if it drips on, the connection ends when headers would have to be there."""
    start = b"POST / HTTP/1.1\r\nHost: lucid\r\nContent-Length: 1000\r\n\r\n"
    answer, seconds = await drip(service, start, b"x")
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"INVALID_REQUEST"' in answer
    assert answer.count(b"HTTP/1.1 ") == 1
    assert_ended_in_time(seconds, at_least=2 * SECONDS)


async def test_whatever_drips_on_a_connection_is_cut(service: Service) -> None:
    """A first request gets a word, later ones an end; blank lines and bodies nobody reads are no way around."""
    early = b"POST /early HTTP/1.1\r\nHost: lucid\r\nContent-Length: 1000\r\n\r\n"
    first, silent, blank, later, later_blank, unread = await asyncio.gather(
        drip(service, HALF_A_HEAD, b"X: y\r\n"),
        drip(service, b"", b""),
        drip(service, b"\r\n", b"\r\n"),
        drip(service, HALF_A_HEAD, b"X: y\r\n", GET, GET),
        drip(service, b"", b"\r\n", GET),
        drip(service, b"x", b"x", GET, early),
    )
    assert_refused(first[0], 408)
    assert_refused(blank[0], 408)
    assert [answer for answer, _ in (silent, later, later_blank, unread)] == [b""] * 4
    for _, seconds in (first, silent, blank, later, later_blank, unread):
        assert_ended_in_time(seconds)
    wait_until(lambda: service.connections == 0, 5)


async def test_a_request_that_runs_is_answered_whatever_drips_behind_it(service: Service) -> None:
    """What it waits for is ours, so only then does the time of the next one's headers run out."""
    late = b"GET /late HTTP/1.1\r\nHost: lucid\r\n\r\n"
    dripped, flooded, garbled = await asyncio.gather(
        drip(service, late + HALF_A_HEAD, b"X: y\r\n"),
        drip(service, late + HALF_A_HEAD, HEADER * 30),
        drip(service, late + b"\x00", b"\x00"),
    )
    for answer, seconds in (dripped, flooded, garbled):
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.endswith(b"/late")
        assert seconds > 2 * SECONDS


async def test_a_body_answered_before_it_came_keeps_its_connection_when_it_is_small(service: Service) -> None:
    """The client that sends on is not cut off: headers that follow count from their own first byte."""
    client = await Client.open(service.port)
    client.send(b"POST /early HTTP/1.1\r\nHost: lucid\r\nContent-Length: 30000\r\n\r\n")
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    client.send(b"x" * 30000)
    await asyncio.sleep(0.6 * SECONDS)
    client.send(HALF_A_HEAD)
    await asyncio.sleep(0.6 * SECONDS)
    client.send(b"\r\n")
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    client.send(b"POST /early HTTP/1.1\r\nHost: lucid\r\nContent-Length: 100000000\r\n\r\n")
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    rest, seconds = await client.drip(b"", b"x" * 100_000, pause_seconds=0.01)
    assert rest in {b"", b"RESET"}
    assert seconds < SECONDS * 3 + 2


async def test_a_refusal_reaches_a_client_that_is_still_sending(service: Service) -> None:
    """It is read to the end before the connection goes, and a client that sends for ever is cut."""
    client = await Client.open(service.port)
    began = time.monotonic()
    client.send(HALF_A_HEAD + HEADER * 100)
    assert_refused(await client.answer(), 431)
    while service.connections and time.monotonic() < began + 10:
        client.send(HEADER)
        await asyncio.sleep(0.02)
    assert_ended_in_time(time.monotonic() - began)
    await client.rest()


async def test_a_request_whose_body_breaks_is_told_that_its_client_left(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """It is refused once, and nobody tries to answer it later."""
    chunked = b"POST / HTTP/1.1\r\nHost: lucid\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n"
    for broken, status in ((b"no length\r\n", 400), (b"0\r\n" + HEADER * 70, 431)):
        client = await Client.open(service.port)
        client.send(chunked)
        await asyncio.sleep(0.1)
        client.send(broken)
        assert_refused(await client.answer(), status)
        await asyncio.sleep(1.5 * SECONDS)  # longer than the application would wait for the body
        assert await client.rest() == b""
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


def test_the_application_can_abort_a_connection_whose_client_does_not_read(service: Service) -> None:
    """Closing would wait for what is still to be sent."""
    with socket.create_connection(("127.0.0.1", service.port)) as deaf:
        deaf.sendall(b"GET /endless HTTP/1.1\r\nHost: lucid\r\n\r\n")
        wait_until(lambda: service.connections == 1, 5)
        wait_until(lambda: service.connections == 0, 5)


async def test_a_server_stops_at_once_whatever_its_connections_are_doing(service: Service) -> None:
    """Nothing that drips or says nothing holds it up."""
    clients = [await Client.open(service.port) for _ in range(3)]
    clients[0].send(HALF_A_HEAD)
    clients[1].send(b"\x00")
    await asyncio.sleep(0.1)
    began = time.monotonic()
    await asyncio.to_thread(service.stop)
    assert time.monotonic() - began < 5
    assert [await client.rest() for client in clients][::2] == [b"", b""]
