"""Outbound nodes behind the gateway: routed to like any other, by the replicas that their agents have reached."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import httpx
import openai
import pytest
import pytest_asyncio
from websockets.exceptions import InvalidStatus

from lucid_compute.tunnel.frames import Frame, FrameKind, read_frames, write_frame
from tests import postgres
from tests.fault_answers import EVENTS, endless_body
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import QUESTION, Gateway, chat_answer, open_gateway, text_of
from tests.lucid_serve import Served, eventually, serving
from tests.outbound import (
    CONNECT_SECONDS,
    OutboundNode,
    closed_with,
    connect_by_hand,
    linked,
    registered,
    says_unconnected,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"on "}}]}\n\n'


@pytest.fixture(scope="module")
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """A service of two workers."""
    url = asyncio.run(postgres.clone(*postgres_and_template))
    with serving(url, WORKERS="2") as service:
        yield service
    asyncio.run(postgres.drop(url))


@pytest_asyncio.fixture(loop_scope="module")
async def gateway(served: Served) -> AsyncIterator[Gateway]:
    """Its admin and its consumers, once the connections of the test before are gone."""
    async with open_gateway(served) as opened:
        await becomes_connected(opened, 0)
        yield opened


async def tunnels_of(gateway: Gateway) -> int:
    """Return how many connections of outbound nodes the workers have, together."""
    scraped = (await gateway.admin.get("/metrics")).text
    return int(float(next(line.split()[1] for line in scraped.splitlines() if line.startswith("lucid_tunnels "))))


async def becomes_connected(gateway: Gateway, count: int = 2) -> None:
    """Wait until the workers have so many connections."""

    async def is_so() -> bool:
        return await tunnels_of(gateway) == count

    await eventually(is_so, CONNECT_SECONDS)


async def all_workers_know(gateway: Gateway, model: str, count: int) -> bool:
    """Return whether the workers that new connections reach would choose among so many nodes."""
    for _ in range(8):
        async with gateway.served.client(gateway.key) as client:
            answer = (await client.post("/match", json={"model": model})).json()
            if len(answer.get("shortlist", ())) != count:
                return False
    return True


async def test_an_agent_reaches_every_worker_and_each_of_them_uses_the_node(gateway: Gateway) -> None:
    """Clients' connections are spread over both workers. None of them is refused, and none is served elsewhere."""
    model = await gateway.add_model()
    async with FaultNode(Behaviour(answer=chat_answer())) as server, registered(gateway, model) as node:
        await gateway.comes_to(model, says_unconnected)
        listed = (await gateway.admin.get("/models", params={"available": "true", "search": model})).json()
        assert listed["models"] == []
        async with linked(gateway.served.url, node, server.url, "the server's own key"):
            await becomes_connected(gateway)
            for _ in range(12):
                async with gateway.served.client(gateway.key) as client:
                    answer = await client.post("/v1/chat/completions", json={"model": model, "messages": QUESTION})
                    assert (answer.status_code, answer.headers["x-lucid-node"]) == (200, node.id), answer.text
                    explained = (await client.get(f"/models/{model}/availability")).json()
                    assert (explained["available"], explained["summary"]) == (True, {})
        assert {request.headers["authorization"] for request in server.requests} == {"Bearer the server's own key"}
        assert {request.path for request in server.requests} == {"/v1/chat/completions"}
        await becomes_connected(gateway, 0)
        await gateway.comes_to(model, says_unconnected)
        refused = await gateway.chat(model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "MODEL_UNAVAILABLE"), refused.text


ENDLESS = Behaviour(answer=endless_body(EVENTS, EVENT), drip_body_seconds=0.05, drip_bytes=4096)


async def test_streams_pass_and_a_client_that_leaves_frees_the_node(gateway: Gateway) -> None:
    """The server learns at once that nobody reads any more; the agent's connections stay."""
    model = await gateway.add_model()
    async with (
        FaultNode(ENDLESS) as server,
        registered(gateway, model) as node,
        linked(gateway.served.url, node, server.url),
    ):
        await becomes_connected(gateway)
        stream = await gateway.openai.chat.completions.create(model=model, messages=QUESTION, stream=True)
        chunks = []
        async for chunk in stream:
            chunks.append(chunk)
            if len(chunks) >= 5:
                break
        assert text_of(chunks).startswith("on on on on on ")
        await stream.close()
        await gateway.becomes_idle(node.id, CONNECT_SECONDS)
        await server.until(lambda server: not server.open_connections, CONNECT_SECONDS)
        assert await tunnels_of(gateway) == 2


async def test_a_connection_lost_in_a_stream_is_an_honest_end(gateway: Gateway) -> None:
    """Its agent is gone: the client gets an error, and what was delivered is recorded as failed."""
    model = await gateway.add_model()
    async with FaultNode(ENDLESS) as server, registered(gateway, model) as node:
        async with linked(gateway.served.url, node, server.url):
            await becomes_connected(gateway)
            stream = await gateway.openai.chat.completions.create(model=model, messages=QUESTION, stream=True)
            await anext(stream)
        with pytest.raises(openai.APIError, match="connection_lost"):
            async for _ in stream:
                pass
        (job,) = await gateway.jobs(model)
        assert (job["outcome"], job["reason"]) == ("failed", "connection_lost")


async def test_a_request_goes_elsewhere_when_the_agent_dies_before_the_first_byte(
    gateway: Gateway,
) -> None:
    """No client notices."""
    model = await gateway.add_model()
    silent = Behaviour(answer=chat_answer(), delay_seconds=60)
    async with (
        FaultNode(silent) as server,
        FaultNode(Behaviour(answer=chat_answer("elsewhere"))) as direct,
        registered(gateway, model) as node,
    ):
        async with linked(gateway.served.url, node, server.url):
            await becomes_connected(gateway)
            asked = asyncio.create_task(gateway.chat(model))
            await server.until(lambda server: bool(server.requests), CONNECT_SECONDS)
            await gateway.add_node(direct.url, model)
            await eventually(lambda: all_workers_know(gateway, model, 2), CONNECT_SECONDS)
        answer = await asked
        assert (answer.status_code, answer.headers["x-lucid-attempts"]) == (200, "2"), answer.text


async def test_a_revoked_key_cuts_the_connections(gateway: Gateway) -> None:
    model = await gateway.add_model()
    async with registered(gateway, model) as node, connect_by_hand(gateway.served.url, node) as websocket:
        await websocket.send(write_frame(FrameKind.READY))
        assert (await gateway.admin.delete(f"/keys/{node.key_id}")).status_code in {200, 204}
        assert await closed_with(websocket) == "The key is revoked or has expired."
        with pytest.raises(InvalidStatus) as refused:
            await connect_by_hand(gateway.served.url, node)
        assert refused.value.response.status_code == 401


async def test_a_later_agent_takes_the_place_of_an_earlier_one(gateway: Gateway) -> None:
    """The rules of bootId hold: the newest heartbeat's agent is the one."""
    model = await gateway.add_model()
    async with registered(gateway, model) as node, connect_by_hand(gateway.served.url, node) as earlier:
        await earlier.send(write_frame(FrameKind.READY))
        later = node._replace(boot_id="later")
        await gateway.beat(node.id, model, bootId="later")
        assert await closed_with(earlier) == "Another agent, started later, reports for this node."
        async with connect_by_hand(gateway.served.url, later) as websocket:
            greeting = await websocket.recv()
            assert isinstance(greeting, bytes)
            assert json.loads(next(read_frames(greeting)).payload)["replicas"] == 2


async def refusal_of(gateway: Gateway, node: OutboundNode, **changes: str) -> tuple[int, str]:
    """Return the status and the code with which a connection is refused."""
    with pytest.raises(InvalidStatus) as refused:
        await connect_by_hand(gateway.served.url, node, **changes)
    response = refused.value.response
    return response.status_code, json.loads(bytes(response.body or b""))["error"]["code"]


async def test_a_connection_is_refused_as_heartbeats_are(gateway: Gateway) -> None:
    model = await gateway.add_model()
    stranger = (await gateway.new_key("compute", owner="stranger"))["key"]
    consumer = (await gateway.new_key("inference:run", owner="admin"))["key"]
    async with registered(gateway, model) as node, registered(gateway, model) as other:
        direct = await gateway.add_node("http://127.0.0.1:65009", model)
        assert await refusal_of(gateway, node, key="lk_live_nothing") == (401, "UNAUTHORIZED")
        assert await refusal_of(gateway, node, key=consumer) == (403, "FORBIDDEN")
        assert await refusal_of(gateway, node, key=other.key) == (403, "FORBIDDEN")
        assert await refusal_of(gateway, node, key=stranger) == (404, "NODE_NOT_FOUND")
        assert await refusal_of(gateway, node, bootId="another") == (422, "INVALID_REQUEST")
        key = (await gateway.new_key("compute", owner="admin"))["key"]
        assert await refusal_of(gateway, node, passportId=direct, key=key) == (422, "INVALID_REQUEST")
        plain = await gateway.admin.get("/compute/connect", params={"passportId": node.id, "bootId": node.boot_id})
        assert (plain.status_code, plain.json()["error"]["code"]) == (422, "INVALID_REQUEST")


async def test_a_node_may_hold_only_a_few_connections(gateway: Gateway) -> None:
    model = await gateway.add_model()
    async with registered(gateway, model) as node, AsyncExitStack() as stack:
        opened = [await stack.enter_async_context(connect_by_hand(gateway.served.url, node)) for _ in range(17)]
        closing = [asyncio.create_task(closed_with(websocket)) for websocket in opened]
        done, waiting = await asyncio.wait(closing, return_when=asyncio.FIRST_COMPLETED)
        assert {each.result() for each in done} == {"The node has too many connections."}
        for each in waiting:
            each.cancel()


HOSTILE: dict[str, str | bytes] = {
    "garbage": os.urandom(2000),
    "a text": "hello",
    "a stream that nobody opened": write_frame(FrameKind.DATA, 7, b"HTTP/1.1 200 OK"),
    "a stream of its own": write_frame(FrameKind.OPEN, 1, b"GET / HTTP/1.1"),
    "a greeting": write_frame(FrameKind.HELLO, 0, b"{}"),
    "a message over the limit": bytes(200_000),
}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_agent_costs_its_own_connection_and_nothing_else(gateway: Gateway, kind: str) -> None:
    model = await gateway.add_model()
    async with (
        FaultNode(ENDLESS) as server,
        registered(gateway, model) as good,
        registered(gateway, model) as bad,
        linked(gateway.served.url, good, server.url),
    ):
        await becomes_connected(gateway)
        await eventually(lambda: all_workers_know(gateway, model, 1), CONNECT_SECONDS)
        body = {"model": model, "messages": QUESTION, "stream": True, "lucid": {"nodeIds": [good.id]}}
        async with gateway.raw.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200
            lines = answer.aiter_lines()
            await anext(lines)
            async with connect_by_hand(gateway.served.url, bad) as websocket:
                await websocket.send(HOSTILE[kind])
                await closed_with(websocket)
            assert await anext(lines) is not None
            assert await tunnels_of(gateway) == 2


async def test_an_agent_that_answers_with_garbage_fails_its_request_alone(gateway: Gateway) -> None:
    model = await gateway.add_model()
    async with registered(gateway, model) as node, connect_by_hand(gateway.served.url, node) as websocket:
        await websocket.send(write_frame(FrameKind.READY))
        await becomes_connected(gateway, 1)
        failed: list[int] = []
        while not failed:  # until a worker is asked that has the connection
            async with gateway.served.client(gateway.key) as client:
                asked = asyncio.create_task(
                    client.post("/v1/chat/completions", json={"model": model, "messages": QUESTION})
                )
                receiving = asyncio.create_task(anext_request(websocket))
                done, _ = await asyncio.wait({asked, receiving}, return_when=asyncio.FIRST_COMPLETED)
                if receiving in done:
                    frame = receiving.result()
                    assert frame.payload.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
                    await websocket.send(write_frame(FrameKind.DATA, frame.stream_id, b"\x00garbage\r\n\r\n"))
                    failed.append((await asked).status_code)
                receiving.cancel()
        assert failed == [502]
        assert await tunnels_of(gateway) == 1


async def anext_request(websocket: object) -> Frame:
    """Return the next frame that opens a stream."""
    while True:
        message = await websocket.recv()  # type: ignore[attr-defined]
        for frame in read_frames(message):
            if frame.kind is FrameKind.OPEN:
                return frame


async def test_a_worker_that_stops_lets_streams_end_and_tells_the_agent_to_move(gateway: Gateway) -> None:
    """No request fails that it has accepted. A worker that has just started has to be reached first, and says so."""
    model = await gateway.add_model()
    slow = Behaviour(answer=chat_answer(), delay_seconds=0.2)
    async with (
        FaultNode(slow) as server,
        registered(gateway, model) as node,
        linked(gateway.served.url, node, server.url),
    ):
        await becomes_connected(gateway)
        is_over = asyncio.Event()
        outcomes: list[tuple[object, ...]] = []

        async def ask() -> None:
            async with gateway.served.client(gateway.key) as client:
                while not is_over.is_set():
                    try:
                        answer = await client.post(
                            "/v1/chat/completions",
                            json={"model": model, "messages": QUESTION},
                            headers={"connection": "close"},
                        )
                    except httpx.ConnectError:  # nobody accepts while the worker is replaced
                        continue
                    error = {} if answer.status_code == 200 else answer.json()["error"]
                    outcomes.append((answer.status_code, *error.get("details", {}).get("rejections", ())))

        before = gateway.served.workers()
        async with asyncio.TaskGroup() as group:
            for _ in range(4):
                group.create_task(ask())
            await server.until(lambda server: len(server.requests) > 4, CONNECT_SECONDS)
            os.kill(min(before), signal.SIGTERM)

            async def is_replaced() -> bool:
                return min(before) not in gateway.served.workers() and len(gateway.served.workers()) == 2

            await eventually(is_replaced, CONNECT_SECONDS)
            await becomes_connected(gateway)
            is_over.set()
        assert set(outcomes) <= {(200,), (503, "NOT_CONNECTED")}
        assert outcomes.count((200,)) > len(outcomes) / 2
