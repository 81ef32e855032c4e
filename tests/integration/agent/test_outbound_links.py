"""An agent's connections against a service that is hostile, stops or goes away; over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from websockets.asyncio.server import Server, ServerConnection, serve

from lucid_compute.agent.outbound.forwarder import Forwarder
from lucid_compute.agent.outbound.links import OutboundLinks, ServiceAddress
from lucid_compute.tunnel.frames import Frame, FrameKind, Hello, read_frames, write_frame, write_hello
from tests.fault_node import FaultNode

SECONDS = 30.0
CHAT = b"POST /v1/chat/completions HTTP/1.1\r\nHost: node\r\nContent-Length: 2\r\n\r\n{}"


class FakeService:
    """A service of so many replicas on one port, whose connections a test has in its hand."""

    def __init__(self, *replicas: str) -> None:
        self.replicas = [*replicas]
        self.kept: dict[str, ServerConnection] = {}
        self.dialled = 0
        self.received: list[Frame] = []

    async def accept(self, websocket: ServerConnection) -> None:
        """Greet as the replica whose turn it is."""
        replica = self.replicas[self.dialled % len(self.replicas)]
        self.dialled += 1
        await websocket.send(write_hello(Hello(replica_id=replica, replicas=len(set(self.replicas)))))
        async for message in websocket:
            assert isinstance(message, bytes)
            for frame in read_frames(message):
                self.received.append(frame)
                if frame.kind is FrameKind.READY:
                    self.kept[replica] = websocket

    def answered(self, stream_id: int, kind: FrameKind) -> bool:
        """Return whether a frame of this kind came on the stream."""
        return any((frame.stream_id, frame.kind) == (stream_id, kind) for frame in self.received)


async def until(holds: Callable[[], bool]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(SECONDS):
        while not holds():  # noqa: ASYNC110 - anything may be waited for
            await asyncio.sleep(0.01)


@asynccontextmanager
async def agent_of(service: FakeService, server_url: str) -> AsyncIterator[Server]:
    """Run an agent's connections to the service, for the inference server."""
    async with serve(service.accept, "127.0.0.1", 0, compression=None) as listening:
        port = listening.sockets[0].getsockname()[1]
        links = OutboundLinks(
            ServiceAddress(f"http://127.0.0.1:{port}", "key", None),
            lambda: ("node", "boot"),
            Forwarder(server_url, None),
        )
        task = asyncio.create_task(links.run())
        try:
            yield listening
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def test_it_dials_until_it_has_reached_every_replica_once() -> None:
    service = FakeService("a", "a", "b", "a", "c")
    async with FaultNode() as server, agent_of(service, server.url):
        await until(lambda: set(service.kept) == {"a", "b", "c"})
        assert len([frame for frame in service.received if frame.kind is FrameKind.READY]) == 3


async def test_it_replaces_a_connection_that_is_lost_and_follows_a_move() -> None:
    service = FakeService("a")
    async with FaultNode() as server, agent_of(service, server.url):
        await until(lambda: "a" in service.kept)
        first = service.kept.pop("a")
        first.transport.abort()
        await until(lambda: "a" in service.kept)
        service.replicas = ["b"]
        second = service.kept["a"]
        await second.send(write_frame(FrameKind.MOVE))
        await until(lambda: "b" in service.kept)
        await second.send(write_frame(FrameKind.OPEN, 1, CHAT))  # what it had accepted still goes
        await until(lambda: service.answered(1, FrameKind.DATA))


FORBIDDEN = {
    "another path": b"GET /metrics HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "another host": b"POST http://10.0.0.1/v1/chat/completions HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "a second request behind the first": CHAT + b"GET /metrics HTTP/1.1\r\n\r\n",
    "an endless head": b"POST /v1/chat/completions HTTP/1.1\r\nX: " + b"x" * 15_000,
}


@pytest.mark.parametrize("kind", FORBIDDEN)
async def test_a_hostile_service_reaches_nothing_but_the_endpoints(kind: str) -> None:
    service = FakeService("a")
    async with FaultNode() as server, agent_of(service, server.url):
        await until(lambda: "a" in service.kept)
        websocket = service.kept["a"]
        await websocket.send(write_frame(FrameKind.OPEN, 1, FORBIDDEN[kind]))
        if kind == "an endless head":
            for _ in range(3):
                await websocket.send(write_frame(FrameKind.DATA, 1, b"x" * 15_000))
        await until(lambda: service.answered(1, FrameKind.RESET))
        assert server.requests == []
        await websocket.send(write_frame(FrameKind.OPEN, 2, CHAT))
        await until(lambda: service.answered(2, FrameKind.DATA))
        assert [request.path for request in server.requests] == ["/v1/chat/completions"]


async def test_a_service_that_breaks_the_protocol_loses_its_connection_and_is_dialled_again() -> None:
    service = FakeService("a")
    async with FaultNode() as server, agent_of(service, server.url):
        for garbage in (b"\x63garbage", write_frame(FrameKind.END, 4), write_frame(FrameKind.DATA, 9, b"x"), "text"):
            await until(lambda: "a" in service.kept)
            websocket = service.kept.pop("a")
            await websocket.send(garbage)
            await websocket.wait_closed()
        await until(lambda: "a" in service.kept)


async def test_a_server_that_is_down_is_told_as_a_response() -> None:
    service = FakeService("a")
    async with FaultNode() as server:
        url = server.url
    async with agent_of(service, url):
        await until(lambda: "a" in service.kept)
        await service.kept["a"].send(write_frame(FrameKind.OPEN, 1, CHAT))
        await until(lambda: service.answered(1, FrameKind.END))
        assert service.received[-2].payload.startswith(b"HTTP/1.1 502 ")
