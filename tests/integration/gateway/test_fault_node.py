"""The misbehaving node itself, seen by a raw client: a test that trusts it must be able to."""

from __future__ import annotations

import asyncio
import math
import time

import pytest

from tests.egress import LOOPBACK, Outcome, ask, on_both_loops, open_client
from tests.fault_answers import OK_BODY, Answer, chat_stream, endless_body, respond, respond_in_chunks
from tests.fault_node import Behaviour, Ending, FaultNode

REQUEST = b"POST /v1/completions HTTP/1.1\r\nHost: node\r\nX-A: b\r\nContent-Length: 2\r\n\r\n{}"
OK = b"HTTP/1.1 200 Said\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(OK_BODY), OK_BODY)


async def read_all(node: FaultNode, request: bytes = REQUEST) -> bytes | None:
    """Send a request on a connection of its own, and read to the connection's end; None when it was reset."""
    reader, writer = await asyncio.open_connection(*node.url.removeprefix("http://").split(":"))
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionResetError:
        return None
    finally:
        writer.close()


@on_both_loops
async def test_requests_are_kept_and_served_by_the_script_then_the_path_then_the_behaviour() -> None:
    async with FaultNode(Behaviour(ending=Ending.CLOSE)) as node:
        node.by_path["/v1/completions"] = Behaviour(answer=respond(b"path"), ending=Ending.CLOSE)
        node.script = [Behaviour(answer=respond(b"script"), ending=Ending.CLOSE)]
        bodies = [(await read_all(node) or b"").rpartition(b"\r\n")[2] for _ in range(2)]
        bodies.append((await read_all(node, REQUEST.replace(b"/v1/", b"/v2/")) or b"").rpartition(b"\r\n")[2])
        assert bodies == [b"script", b"path", OK_BODY]
        assert [request.connection for request in node.requests] == [1, 2, 3]
        one = node.requests[0]
        assert (one.method, one.path, one.headers["x-a"], one.body) == ("POST", "/v1/completions", "b", b"{}")
        assert one.head + one.body == REQUEST


@on_both_loops
async def test_an_answer_is_greeted_delayed_dripped_and_followed_by_more() -> None:
    behaviour = Behaviour(
        greeting=b"hello", delay_seconds=0.1, drip_head_seconds=0.01, drip_body_seconds=0.01, drip_bytes=10
    )
    async with FaultNode(behaviour) as node:
        node.script = [Behaviour(delay_seconds=0.1, surplus=b"more", ending=Ending.CLOSE)]
        began_at = time.monotonic()
        assert await read_all(node) == b"hello" + OK + b"more"
        assert time.monotonic() - began_at >= 0.1
    drip = Behaviour(drip_head_seconds=0.01, drip_body_seconds=0.01, drip_bytes=10, ending=Ending.CLOSE)
    async with FaultNode(drip) as node:
        began_at = time.monotonic()
        assert await read_all(node) == OK
        assert time.monotonic() - began_at >= 0.01 * (len(OK) // 10)


@on_both_loops
async def test_an_answer_is_cut_to_the_byte_and_ends_as_told() -> None:
    head, _, body = OK.partition(b"\r\n\r\n")
    async with FaultNode() as node:
        for cut in (0, 1, 20):
            node.behaviour = Behaviour(cut_head_after=cut, ending=Ending.CLOSE)
            assert await read_all(node) == OK[:cut]
        for cut in (0, 1, len(body)):
            node.behaviour = Behaviour(cut_body_after=cut, ending=Ending.CLOSE)
            assert await read_all(node) == head + b"\r\n\r\n" + body[:cut]
        node.behaviour = Behaviour(cut_body_after=3, ending=Ending.RESET)
        assert await read_all(node) is None
        node.behaviour = Behaviour(cut_body_after=3)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read_all(node), 0.1)
        await node.until(lambda node: not node.open_connections)


@on_both_loops
async def test_a_node_dies_and_comes_back_on_its_port() -> None:
    async with FaultNode(Behaviour(delay_seconds=math.inf)) as node:
        port = node.port
        for resets in (True, False):
            reading = asyncio.ensure_future(read_all(node))
            await node.until(lambda node: node.open_connections == 1 and bool(node.requests))
            await node.stop(resets=resets)
            assert await reading == (None if resets else b"")
            with pytest.raises(ConnectionRefusedError):
                await read_all(node)
            await node.start()
            node.requests.clear()
        assert node.port == port


@on_both_loops
async def test_a_node_that_accepts_nothing_lets_clients_wait() -> None:
    async with FaultNode(accepts=False) as node:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.open_connection("127.0.0.1", node.port), 0.2)
        assert node.connections == 0


@on_both_loops
async def test_a_proxy_passes_requests_and_answers_on_as_they_are() -> None:
    stream = chat_stream(*"abc")
    async with FaultNode() as upstream, FaultNode(upstream=upstream.url) as proxy, open_client() as client:
        for answer, body in ((respond(b"x" * 3_000_000), b"x" * 3_000_000), (respond_in_chunks(b"a", b"b"), b"ab")):
            upstream.behaviour = Behaviour(answer=answer)
            assert await ask(client, proxy.url, body=b"question") == Outcome(200, body)
        upstream.behaviour = Behaviour(answer=stream)
        assert b"[DONE]" in (await ask(client, proxy.url, wants_stream=True)).body
        assert [request[1:] for request in proxy.requests] == [request[1:] for request in upstream.requests]
        assert (proxy.connections, upstream.connections) == (1, 3)
        await upstream.until(lambda node: not node.open_connections)
        proxy.behaviour = Behaviour(answer=respond(b"own"))
        assert await ask(client, proxy.url) == Outcome(200, b"own")
        assert len(upstream.requests) == 3


@on_both_loops
async def test_a_proxy_spoils_the_real_answer_as_told() -> None:
    async with (
        FaultNode(Behaviour(answer=respond(b"0123456789"))) as upstream,
        FaultNode(upstream=upstream.url) as proxy,
    ):
        for ending, read in ((Ending.CLOSE, b"0123"), (Ending.RESET, None)):
            proxy.behaviour = Behaviour(cut_body_after=4, ending=ending)
            assert ((await read_all(proxy)) or b"").rpartition(b"\r\n\r\n")[2] == (read or b"")
        proxy.behaviour = Behaviour(delay_seconds=0.1, drip_body_seconds=0.01, ending=Ending.CLOSE)
        began_at = time.monotonic()
        assert (await read_all(proxy) or b"").endswith(b"0123456789")
        assert time.monotonic() - began_at >= 0.2


@on_both_loops
async def test_a_proxy_dies_as_its_upstream_does_and_hangs_up_when_its_client_does() -> None:
    async with FaultNode() as upstream, FaultNode(upstream=upstream.url) as proxy:
        for ending, read in ((Ending.CLOSE, b"{"), (Ending.RESET, None)):
            upstream.behaviour = Behaviour(cut_body_after=1, ending=ending)
            answer = await read_all(proxy)
            assert answer is None if read is None else (answer or b"").endswith(b"\r\n\r\n{")
        upstream.behaviour = Behaviour(answer=endless_body())
        async with open_client() as client:
            connection = await client.connect(LOOPBACK.check_url(proxy.url))
            await proxy.until(lambda node: node.open_connections == 1)
            connection.abort()
        for behaviour in (Behaviour(delay_seconds=math.inf), Behaviour(answer=endless_body())):
            upstream.behaviour = behaviour
            reading = asyncio.ensure_future(read_all(proxy))
            await upstream.until(lambda node: node.open_connections == 1)
            reading.cancel()
            await asyncio.wait([reading])
            await upstream.until(lambda node: not node.open_connections)
            await proxy.until(lambda node: not node.open_connections)
        await upstream.stop()
        assert await read_all(proxy) is None


@on_both_loops
async def test_what_is_no_request_is_reset() -> None:
    async with FaultNode(Behaviour(answer=Answer(OK))) as node:
        assert await read_all(node, b"garbage\r\n\r\n") is None
        assert node.requests == []
