"""What still runs when the grace of a stop is over: it is answered, in the shape of its path, and the exit is clean."""

from __future__ import annotations

import asyncio
import json
import math
import signal

import pytest

from tests import postgres
from tests.acceptance.server.test_express_lane import add_warm, express_count, port_of, request_bytes
from tests.fault_answers import unfinished_chat
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import open_gateway
from tests.lucid_serve import Served, eventually, folder
from tests.raw_client import Client

pytestmark = pytest.mark.asyncio(loop_scope="session")

SILENT = Behaviour(delay_seconds=math.inf)
STALLED = Behaviour(answer=unfinished_chat("begun"))


def json_of(answer: bytes) -> dict[str, object]:
    """Return the error of a 503 that says when to try again and that the connection ends."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    assert lines[0].startswith(b"http/1.1 503 "), answer
    assert {b"retry-after: 1", b"connection: close", b"content-type: application/json"} <= set(lines)
    error: dict[str, object] = json.loads(body)["error"]
    assert error["code"] == "OVERLOADED"
    return error


async def test_what_outlasts_the_grace_is_answered(postgres_and_template: tuple[str, str]) -> None:
    """On the fast path, by ASGI, a stream, and a route: none gets plain text, and none just an end."""
    url = await postgres.clone(*postgres_and_template)
    with folder() as made, Served(made, url, SHUTDOWN_GRACE_SECONDS="1") as served:
        async with open_gateway(served) as gateway, FaultNode(SILENT) as node:
            model, node_id = await add_warm(gateway, node)
            express, ordinary, stream = [await Client.open(port_of(gateway)) for _ in range(3)]
            express.send(request_bytes(gateway, model))
            await node.until(lambda node: len(node.requests) == 2)
            ordinary.send(request_bytes(gateway, model, "Connection: close"))
            await node.until(lambda node: len(node.requests) == 3)
            node.script.append(STALLED)
            stream.send(request_bytes(gateway, model, stream=True))
            await node.until(lambda node: len(node.requests) == 4)
            assert await express_count(gateway) == 1
            route = asyncio.ensure_future(
                gateway.admin.post(f"/compute/deregister/{node_id}", params={"waitSeconds": 60}, timeout=30)
            )
            begun = await stream.until(b"begun")
            assert served.process is not None
            served.process.send_signal(signal.SIGTERM)
            for client in (express, ordinary):
                assert json_of(await client.rest())["type"] == "server_error"
            events = begun + await stream.rest()
            assert events.count(b"HTTP/1.1 ") == 1
            assert b'"code": "OVERLOADED"' in events
            assert b"[DONE]" not in events
            assert events.endswith(b"0\r\n\r\n")
            answer = await route
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "OVERLOADED")
            assert answer.headers["retry-after"] == "1"
            assert await asyncio.to_thread(served.process.wait, 30) == 0
        assert "Traceback" not in served.log
    await postgres.drop(url)


async def test_what_waits_for_a_node_is_answered_too(postgres_and_template: tuple[str, str]) -> None:
    """Requests in the queue, on the fast path, by ASGI and for a stream: an error in the shape of their endpoint."""
    url = await postgres.clone(*postgres_and_template)
    with folder() as made, Served(made, url, SHUTDOWN_GRACE_SECONDS="1", INFERENCE_QUEUE="9") as served:
        async with open_gateway(served) as gateway, FaultNode(SILENT) as node:
            model = await gateway.add_model()
            await gateway.add_node(node.url, model, maxConcurrency=1)
            running = await Client.open(port_of(gateway))
            running.send(request_bytes(gateway, model))
            await node.until(lambda node: len(node.requests) == 1)
            waiting = [await Client.open(port_of(gateway)) for _ in range(3)]
            waiting[0].send(request_bytes(gateway, model))
            waiting[1].send(request_bytes(gateway, model, "Connection: close"))
            waiting[2].send(request_bytes(gateway, model, stream=True))

            async def all_wait() -> bool:
                return "lucid_inference_waiting 3.0" in (await gateway.admin.get("/metrics")).text

            await eventually(all_wait)
            assert served.process is not None
            served.process.send_signal(signal.SIGTERM)
            for client in (running, *waiting):
                assert json_of(await client.rest())["type"] == "server_error"
            assert await asyncio.to_thread(served.process.wait, 30) == 0
            assert len(node.requests) == 1
        assert "Traceback" not in served.log
    await postgres.drop(url)
