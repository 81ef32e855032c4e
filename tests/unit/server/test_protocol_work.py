"""What a client can make a connection do with one packet: its work is bounded, and so are its responses and its log."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from lucid_compute.server.app import LANES
from lucid_compute.server.fast_path import FastPathProtocol
from lucid_compute.server.http_protocol import ONE_PACKET_BYTES
from lucid_compute.server.request_head import MAX_HEADERS, MAX_URL_BYTES
from lucid_compute.web.lanes import CutReason
from tests.raw_client import PATIENCE_SECONDS
from tests.work import calls_of

PACKET_BYTES = 256_000  # that uvloop reads at once
GET = b"GET / HTTP/1.1\r\nHost:a\r\n\r\n"
UPGRADE = b"GET / HTTP/1.1\r\nHost:a\r\nConnection:upgrade\r\nUpgrade:x\r\n\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost:a\r\nTransfer-Encoding:chunked\r\n\r\n"
HEARTBEAT = b"POST /compute/heartbeat HTTP/1.1\r\nHost:a\r\nContent-Length:0\r\n\r\n"
# What comes once, and what comes again and again after it.
PACKETS = {
    "requests": (b"", GET),
    "requests of HTTP/1.0": (b"", b"GET / HTTP/1.0\r\n\r\n"),
    "requests for another protocol": (b"", UPGRADE),
    "requests for a tunnel": (b"", b"CONNECT a:1 HTTP/1.1\r\n\r\n"),
    "requests for the fast path": (b"", HEARTBEAT),
    "headers": (b"GET / HTTP/1.1\r\nHost:a\r\n", b"a:\r\n"),
    "chunks": (CHUNKED, b"1\r\na\r\n"),
    "trailers": (CHUNKED + b"1\r\na\r\n0\r\n", b"a:\r\n"),
    "blank lines": (b"", b"\r\n"),
    "zeros": (b"", b"\0"),
    "a path": (b"GET /", b"%41"),
}


class Wire(asyncio.Transport):
    """A client that reads everything."""

    def __init__(self) -> None:
        super().__init__()
        self.received = b""
        self.is_closed = self.is_paused = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.is_closed
        self.received += data

    def is_closing(self) -> bool:
        return self.is_closed

    def close(self) -> None:
        self.is_closed = True

    abort = write_eof = close

    def pause_reading(self) -> None:
        self.is_paused = True

    def resume_reading(self) -> None:
        self.is_paused = False

    def get_write_buffer_size(self) -> int:
        return 0


class Service:
    """A protocol in memory and its application, which counts requests and answers each with its body."""

    def __init__(self) -> None:
        self.scopes: list[dict[str, Any]] = []
        self.left = 0
        self.config = uvicorn.Config(
            self._serve,
            interface="asgi3",
            http=FastPathProtocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
        )
        self.config.load()
        self.goes_on = asyncio.Event()
        self.goes_on.set()

    def connect(self, state: dict[str, Any] | None = None) -> tuple[FastPathProtocol, Wire]:
        """Return a new connection and the client's end of it; `state` is what the application's lifespan yields."""
        protocol, wire = FastPathProtocol(self.config, ServerState(), state or {}), Wire()
        protocol.connection_made(wire)
        return protocol, wire

    async def _serve(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body, message = b"", await receive()
        while message["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
            message = await receive()
        if not self.goes_on.is_set():
            gone = await receive()
            self.left += gone["type"] == "http.disconnect"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body or b"none"})


@pytest.fixture
def service() -> Service:
    """A service."""
    return Service()


def assert_silent(caplog: pytest.LogCaptureFixture) -> None:
    """No line was written that an operator's log would hold."""
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []


async def turns(count: int = 20) -> None:
    """Let tasks run."""
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize("packet", PACKETS.values(), ids=PACKETS)
async def test_a_packet_makes_bounded_work(
    service: Service, caplog: pytest.LogCaptureFixture, packet: tuple[bytes, bytes]
) -> None:
    """Whatever it holds: some calls for each byte at most, few requests at a time, one refusal, no line in the log."""
    begin, again = packet
    data = begin + again * ((PACKET_BYTES - len(begin)) // len(again))
    protocol, wire = service.connect()
    assert calls_of(lambda: protocol.data_received(data)) < 2 * PACKET_BYTES
    assert len(protocol.pipeline) <= ONE_PACKET_BYTES // len(GET.replace(b"Host:a\r\n", b""))
    await turns()
    assert wire.received.count(b"HTTP/1.1 4") <= 1
    assert_silent(caplog)
    protocol.connection_lost(None)
    await turns()


@pytest.mark.parametrize("request_bytes", [GET, UPGRADE, HEARTBEAT])
async def test_each_of_thousands_of_pipelined_requests_is_served(service: Service, request_bytes: bytes) -> None:
    """They wait for one another, a few at a time; nothing of a packet is lost, and nothing comes twice."""
    protocol, wire = service.connect()
    count = 1000
    protocol.data_received(request_bytes * count + CHUNKED + b"4\r\nlast\r\n0\r\n\r\n")
    most = 0
    async with asyncio.timeout(PATIENCE_SECONDS):
        while wire.received.count(b"HTTP/1.1 200 ") <= count:
            most = max(most, len(protocol.pipeline))
            await asyncio.sleep(0)
    assert most < ONE_PACKET_BYTES // len(request_bytes) + 2
    assert len(service.scopes) == count + 1
    assert wire.received.endswith(b"\r\n4\r\nlast\r\n0\r\n\r\n")
    protocol.connection_lost(None)
    await turns()


async def test_a_tunnel_is_refused(service: Service) -> None:
    """CONNECT is no upgrade that could be declined: 405 in the contract's shape, and the connection ends."""
    protocol, wire = service.connect()
    assert calls_of(lambda: protocol.data_received(b"CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n")) < 300
    head, body = wire.received.split(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405 ")
    assert b"\r\nallow: GET, HEAD, POST" in head
    assert b"\r\nconnection: close" in head
    assert b'"code":"METHOD_NOT_ALLOWED"' in body
    assert service.scopes == []


REFUSED = {
    b"GET / HTTP/1.1\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET / HTTP/1.1\r\nHost: a\r\nhOST: a\r\n\r\n": 400,
    b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n": 400,
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n": 505,
    b"GET / HTTP/0.9\r\nHost: a\r\n\r\n": 505,
    CHUNKED.replace(b":chunked", b": gzip, chunked") + b"0\r\n\r\n": 501,
    CHUNKED.replace(b":chunked", b":chunked\r\nTransfer-Encoding:chunked") + b"0\r\n\r\n": 400,
    CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n": 400,
    b"GET /" + b"a" * MAX_URL_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n": 414,
    b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * MAX_HEADERS + b"\r\n": 431,
    b"POST /v1/x HTTP/1.1\r\nContent-Length: 0\r\n\r\n": 400,
}


@pytest.mark.parametrize(("data", "status"), REFUSED.items())
async def test_a_head_that_says_two_things_is_refused(service: Service, data: bytes, status: int) -> None:
    """Also behind a request that was served."""
    for before in (b"", GET, HEARTBEAT):
        protocol, wire = service.connect()
        if before:
            protocol.data_received(before)
            await turns()
            assert wire.received.startswith(b"HTTP/1.1 200 ")
            wire.received = b""
        protocol.data_received(data)
        assert wire.received.startswith(b"HTTP/1.1 %d " % status)
        assert wire.received.count(b"HTTP/1.1 %d " % status) == 1
        protocol.connection_lost(None)
        await turns()
    assert len(service.scopes) == 2


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET http://other/ HTTP/1.1\r\nHost: a\r\n\r\n",
        CHUNKED.replace(b"chunked", b"CHUNKED ") + b"0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a:\r\n" * (MAX_HEADERS - 1) + b"\r\n",
    ],
)
async def test_a_head_that_is_only_unusual_is_served(service: Service, data: bytes) -> None:
    """As RFC 9112 wants it."""
    protocol, wire = service.connect()
    protocol.data_received(data)
    await turns()
    assert wire.received.startswith(b"HTTP/1.1 200 ")
    protocol.connection_lost(None)


@pytest.mark.parametrize("pieces", [1, 7])
async def test_a_trailer_is_no_header(service: Service, pieces: int) -> None:
    """In one packet or in several; a header of the next request is one again."""
    protocol, wire = service.connect()
    trailers = b"0\r\nX-Forwarded-For: 6.6.6.6\r\nAuthorization: Bearer k\r\nHost: b\r\nExpect: 100-continue\r\n\r\n"
    data = CHUNKED + b"2\r\nhi\r\n" + trailers
    size = len(data) // pieces + 1
    for start in range(0, len(data), size):
        protocol.data_received(data[start : start + size])
    await turns()
    protocol.data_received(b"GET / HTTP/1.1\r\nHost:a\r\nX-Forwarded-For: 9.9.9.9\r\n\r\n")
    await turns()
    assert wire.received.count(b"HTTP/1.1 200 ") == 2
    assert [scope["headers"] for scope in service.scopes] == [
        [(b"host", b"a"), (b"transfer-encoding", b"chunked")],
        [(b"host", b"a"), (b"x-forwarded-for", b"9.9.9.9")],
    ]
    protocol.connection_lost(None)


async def test_a_pipelining_client_that_leaves_has_left_every_request(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    """The one that runs hears of it, the others never begin; whatever is written then is dropped without a word."""
    service.goes_on.clear()
    protocol, wire = service.connect()
    protocol.data_received(GET * 500)
    await turns()
    wire.close()
    protocol.connection_lost(ConnectionResetError())
    await turns()
    assert (len(service.scopes), service.left) == (1, 1)
    assert wire.received == b""
    assert not protocol.pipeline
    assert_silent(caplog)


class Waiting:
    """A lane that keeps the connection of a request; also the request that it keeps."""

    connection: FastPathProtocol

    def accept(self, connection: FastPathProtocol, *_: object) -> Waiting:
        """Accept a request."""
        self.connection = connection
        return self

    def end(self, _: CutReason) -> None:
        """Leave."""

    def go_on(self) -> None:
        """Do nothing."""


async def test_what_comes_behind_a_stream_is_served_after_it(service: Service) -> None:
    """The chunks of the stream are not mixed with other responses, and the lane is offered the next request."""
    lane = Waiting()
    protocol, wire = service.connect({LANES: {b"/v1/x": lane}})
    request = b"POST /v1/x HTTP/1.1\r\nHost:a\r\nContent-Length:0\r\n\r\n"
    protocol.data_received(request)
    protocol.data_received(GET + request)
    lane.connection.begin(200, [(b"a", b"b")])
    lane.connection.write(b"one", more=True)
    await turns()
    assert service.scopes == []
    lane.connection.write(b"", more=True)
    lane.connection.write(b"two", more=False)
    await turns()
    stream = b"\r\na: b\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n"
    assert wire.received.split(b"HTTP/1.1 200 OK")[1].endswith(stream)
    assert wire.received.count(b"HTTP/1.1 200 ") == 3
    assert len(service.scopes) == 2
    protocol.connection_lost(None)
    await turns()


async def test_a_write_to_a_closed_transport_does_nothing(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    """A transport of uvloop is closed some time before it says that the connection is lost."""
    protocol, wire = service.connect()
    protocol.data_received(GET)
    wire.close()
    await turns()
    assert (len(service.scopes), wire.received) == (1, b"")
    protocol.connection_lost(None)
    assert_silent(caplog)


@pytest.mark.parametrize("waits", [True, False])
async def test_a_client_that_was_not_told_to_continue_gets_its_connection_closed(
    service: Service, *, waits: bool
) -> None:
    """It may send its body or not. One that was told to continue keeps its connection."""

    async def refuse(_scope: Any, receive: Any, send: Any) -> None:
        if not waits:
            await receive()
        await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})

    service.config.loaded_app = refuse
    protocol, wire = service.connect()
    protocol.data_received(b"POST / HTTP/1.1\r\nHost:a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    await turns()
    if not waits:
        assert wire.received == b"HTTP/1.1 100 Continue\r\n\r\n"
        protocol.data_received(b"hi")
        await turns()
    assert b"HTTP/1.1 401 " in wire.received
    assert (b"connection: close" in wire.received, wire.is_closed) == (waits, waits)
    protocol.connection_lost(None)


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
async def test_http_1_0_gets_no_chunks(service: Service, method: bytes) -> None:
    """A response of unknown length ends with the connection."""

    async def stream(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for part in (b"one ", b"", b"two"):
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b" three"})

    service.config.loaded_app = stream
    protocol, wire = service.connect()
    protocol.data_received(method + b" / HTTP/1.0\r\n\r\n")
    await turns()
    head, body = wire.received.split(b"\r\n\r\n")
    assert b"transfer-encoding" not in head
    assert body == (b"one two three" if method == b"GET" else b"")
    assert wire.is_closed
    protocol.connection_lost(None)
