"""Connections that drip, say nothing, flood or talk nonsense: `lucid serve` cuts them, and nobody else notices.

The deadlines as they stand are waited for once; tests/integration/test_guarded_protocol.py goes on with shorter ones.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lucid_compute.server.http_protocol import ConnectionLimits
from lucid_compute.server.request_head import MAX_HEAD_BYTES
from tests.api import ADMIN_KEY
from tests.factories import GUIDE_PASSPORT
from tests.lucid_serve import Served, serving_on_a_clone
from tests.raw_client import Client, ask, assert_refused

SLACK = 3
GET = b"GET /healthz HTTP/1.1\r\nHost: lucid\r\n\r\n"
LAST_GET = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
HALF_A_HEAD = b"GET /healthz HTTP/1.1\r\nHost: lucid\r\n"
WITH_KEY = b"POST /passports HTTP/1.1\r\nHost: lucid\r\nAuthorization: Bearer %b\r\n" % ADMIN_KEY.encode()
CHUNKED = WITH_KEY + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPPING_BODY = WITH_KEY + b"Content-Length: 100000\r\n\r\n"
HEADER = b"X-Filler: " + b"x" * 1000 + b"\r\n"
MALFORMED = {
    "no method": b"\x00\r\n\r\n",
    "no method, and too much of it": b"\x00" * 100_000,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no such version": b"GET / HTTP/9.9\r\n\r\n",
    "a path that is not ASCII": b"GET /\xff HTTP/1.1\r\n\r\n",
    "a space in a header's name": b"GET / HTTP/1.1\r\nHost : lucid\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length and chunks": b"POST / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
    "no length of a chunk": CHUNKED + b"\r\n\r\n",
}
FLOODS = {
    "endless headers": HALF_A_HEAD + HEADER * 200,
    "one endless header": HALF_A_HEAD + b"X: " + b"x" * 200_000,
    "one endless name of a header": HALF_A_HEAD + b"x" * 200_000,
    "an endless first line": b"GET /" + b"x" * 200_000,
    "just over the limit, and whole": HALF_A_HEAD + HEADER * (MAX_HEAD_BYTES // len(HEADER)) + HEADER + b"\r\n",
    "endless trailers": CHUNKED + b"1\r\na\r\n0\r\n" + HEADER * 200,
    "one endless trailer": CHUNKED + b"1\r\na\r\n0\r\nX: " + b"x" * 200_000,
}


@pytest.fixture(scope="module")
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service with one worker."""
    with serving_on_a_clone(postgres_and_template) as served:
        yield served


@pytest.fixture
def port(served: Served) -> int:
    """Where it listens."""
    return int(served.url.rsplit(":", 1)[1])


class HealthyClient:
    """Reads and sends heartbeats until told to stop, and counts what goes wrong."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self.answers = 0
        self.failures: list[str] = []

    async def run(self, passport_id: str, stop: asyncio.Event) -> None:
        """Read all the time, on kept and on new connections, and send a heartbeat each second and a bit."""
        beat: dict[str, Any] = {
            "passportId": passport_id,
            "status": "healthy",
            "load": None,
            "availableModels": [],
            "queueDepth": None,
        }
        next_beat_at = time.monotonic()
        while not stop.is_set():
            await self._count(self._client.get("/models?available=true"))
            await self._count(self._client.get("/compute", headers={"Connection": "close"}))
            if time.monotonic() > next_beat_at:
                next_beat_at = time.monotonic() + 1.2
                await self._count(self._client.post("/compute/heartbeat", json=beat))
            await asyncio.sleep(0.02)

    async def _count(self, call: Any) -> None:
        try:
            answer = await call
        except httpx.HTTPError as error:
            self.failures.append(repr(error))
        else:
            self.answers += 1
            if answer.status_code != httpx.codes.OK:
                self.failures.append(answer.text)


async def test_slow_clients_are_cut_and_a_healthy_one_does_not_notice(served: Served, port: int) -> None:
    """500 drip headers, 500 say nothing, 100 drip bodies and so have longer; each way to be slow is cut in time."""
    stop = asyncio.Event()
    async with served.client() as http:
        node = (await http.post("/passports", json=GUIDE_PASSPORT)).json()["id"]
        healthy = HealthyClient(http)
        running = asyncio.ensure_future(healthy.run(node, stop))
        bodies = [await Client.open(port) for _ in range(100)]
        dripping = [asyncio.ensure_future(client.drip(DRIPPING_BODY, b"x")) for client in bodies]
        headers, silent, later = await asyncio.gather(
            asyncio.gather(*(drip_on(port, HALF_A_HEAD, b"X: y\r\n") for _ in range(500))),
            asyncio.gather(*(drip_on(port, b"", b"") for _ in range(500))),
            drip_behind_an_answer(port),
        )
        still_dripping = [task for task in dripping if not task.done()]
        stop.set()
        await running
    await asyncio.gather(*(client.close() for client in bodies))
    await asyncio.gather(*dripping)
    assert healthy.failures == []
    assert healthy.answers > 20
    for answer, _ in headers:
        assert_refused(answer, 408)
    assert {answer for answer, _ in silent} == {b""}
    assert later[0] == b""
    for _, seconds in (*headers, *silent, later):
        allowed = ConnectionLimits().head_seconds
        assert allowed - 1 < seconds < allowed * SLACK
    assert len(still_dripping) == 100, "a body has 30 s"


async def drip_on(port: int, start: bytes, drop: bytes) -> tuple[bytes, float]:
    """Drip on a new connection; return what came, and how long it was there."""
    began = time.monotonic()
    answer, _ = await (await Client.open(port)).drip(start, drop)
    return answer, time.monotonic() - began


async def drip_behind_an_answer(port: int) -> tuple[bytes, float]:
    """Drip the second request of a connection."""
    client = await Client.open(port)
    client.send(GET)
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    return await client.drip(HALF_A_HEAD, b"X: y\r\n")


async def test_what_is_no_http_is_refused_in_the_contracts_shape(served: Served, port: int) -> None:
    """Whatever is wrong with it; what came whole before is answered first, and nothing of it is a fault of ours."""
    for data in MALFORMED.values():
        assert_refused(await ask(port, data), 400)
    client = await Client.open(port)
    client.send(GET)
    assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
    client.send(b"\x00")
    assert_refused(await client.rest(), 400)
    answers = await ask(port, GET + b"\x00")
    assert answers.count(b"HTTP/1.1 ") == answers.count(b"HTTP/1.1 200 ") == 1
    assert '"exception"' not in served.log


async def test_headers_and_trailers_are_bounded(port: int) -> None:
    """Each kind of flood is refused, on a new connection and on one in use, and what is within the limit is taken."""
    for data in FLOODS.values():
        assert_refused(await ask(port, data), 431)
        client = await Client.open(port)
        client.send(GET)
        assert (await client.answer()).startswith(b"HTTP/1.1 200 ")
        client.send(data)
        assert_refused(await client.rest(), 431)
    most = HALF_A_HEAD + b"Connection: close\r\n" + HEADER * (MAX_HEAD_BYTES // len(HEADER) - 1) + b"\r\n"
    assert (await ask(port, most)).startswith(b"HTTP/1.1 200 ")


async def test_connections_are_kept_and_requests_may_come_in_any_pieces(port: int) -> None:
    """One after the other, many in one packet, cut anywhere, with bodies between them."""
    client = await Client.open(port)
    post = b"POST /nowhere HTTP/1.1\r\nHost: lucid\r\nContent-Length: 8000\r\n\r\n" + b'"%b"' % (b"x" * 7998)
    for piece in (GET, post, GET):
        client.send(piece)
        assert (await client.answer()).startswith(b"HTTP/1.1 ")
    for size in (1, 7, 4096, 1_000_000):
        together = (GET + post) * 3
        for start in range(0, len(together), size):
            client.send(together[start : start + size])
            if size == 1 and start % 50 == 0:
                await asyncio.sleep(0)
        statuses = [(await client.answer())[9:12] for _ in range(6)]
        assert statuses == [b"200", b"404"] * 3
    client.send(post * 20 + LAST_GET)  # more than the limit on headers, and none of them large
    answers = await client.rest()
    assert [answers.count(b"HTTP/1.1 %b" % status) for status in (b"404 ", b"200 ", b"")] == [20, 1, 21]
