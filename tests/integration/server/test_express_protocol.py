"""The fast path over real sockets: what clients send, and when, and what they read of it."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from tests.express_service import AT_ONCE, FULL, LARGE, LONG, SECONDS, WAITS, Service, post
from tests.lucid_serve import eventually
from tests.raw_client import PATIENCE_SECONDS, Client, assert_refused

Opener = Callable[[], Awaitable[Client]]


@pytest.fixture
def service() -> Iterator[Service]:
    """A server whose deadlines are short."""
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
    """Return whether it came while the answer was awaited or after it."""
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
    assert service.lane.left == 1


async def open_slow_reader(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return a connection whose receiving side holds little."""
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


@pytest.mark.parametrize("path", [AT_ONCE, "/v1/other"])
@pytest.mark.parametrize("pause_seconds", [0, 0.1])
async def test_a_connection_keeps_nothing_of_a_request_that_it_passed_on(
    service: Service, open_client: Opener, path: str, pause_seconds: float
) -> None:
    """To either lane, in one packet or in two: it may be idle or stream for a long time."""
    client, data = await open_client(), post(path, b"x" * 60_000)
    client.send(data[:1000])
    await asyncio.sleep(pause_seconds)
    client.send(data[1000:])
    await client.answer()
    assert service.kept_bytes == 0


async def test_a_refusal_without_a_task_keeps_the_connection_and_the_order(
    service: Service, open_client: Opener
) -> None:
    """Requests before it and behind it are answered in their turn, by either lane, in however many packets."""
    client = await open_client()
    for _ in range(3):
        client.send(post(FULL))
        assert (await client.answer()).endswith(b"\r\n\r\nfull")
        client.send(post("/v1/other", b"other"))
        assert (await client.answer()).endswith(b"\r\n\r\nother")
        client.send(post(FULL)[:60])
        await asyncio.sleep(0.05)
        client.send(post(FULL)[60:])
        assert (await client.answer()).endswith(b"\r\n\r\nfull")
    client.send(post(WAITS))
    await service.takes(1)
    client.send(post(FULL))
    await asyncio.sleep(0.05)
    service.answer_all()
    assert (await client.answer()).endswith(b"\r\n\r\nwaited")
    assert (await client.answer()).endswith(b"\r\n\r\nfull")
    assert service.kept_bytes == 0
