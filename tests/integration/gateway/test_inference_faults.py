"""Faults of this service while it serves a request: the client gets one error, and the ledger names the cause."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from lucid_compute.gateway.event_stream import EventStream
from tests.api import ADMIN_KEY, Api
from tests.fault_answers import chat_stream
from tests.fault_node import Behaviour, FaultNode
from tests.integration.gateway.test_inference_limits import BODY, add_node
from tests.lucid_serve import eventually

TEXTS = ("one", " two", " three", " four")


class Client:
    """An ASGI client of the lane, which keeps what it is sent."""

    def __init__(self, body: bytes, *, breaks_at: str = "") -> None:
        """Ask with `body`; its connection fails when it is sent a message of the type `breaks_at`."""
        self.sent: list[dict[str, Any]] = []
        self.is_aborted = False
        self._body, self._breaks_at, self._is_asked = body, breaks_at, False
        headers = [(b"authorization", f"Bearer {ADMIN_KEY}".encode()), (b"content-length", b"%d" % len(body))]
        self.scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "headers": headers,
            "extensions": {"lucid.abort": self._abort},
        }

    async def receive(self) -> dict[str, Any]:
        """Return the request; then wait, since the client stays."""
        if self._is_asked:
            await asyncio.Event().wait()
        self._is_asked = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def send(self, message: Any) -> None:
        """Record a part of the response."""
        if message["type"] == self._breaks_at:
            raise RuntimeError("the connection is broken")
        self.sent.append(message)

    def _abort(self) -> None:
        self.is_aborted = True

    @property
    def heads(self) -> int:
        """Return how many responses were begun."""
        return sum(message["type"] == "http.response.start" for message in self.sent)


def failing_stream(blocks: int) -> type[EventStream]:
    """Return an event stream with a fault of ours, which shows after so many blocks."""

    class FailingStream(EventStream):
        fed = 0

        def feed(self, block: bytes) -> bytes:
            if self.fed == blocks:
                raise KeyError("a fault of ours")
            self.fed += 1
            return super().feed(block)

    return FailingStream


async def ask(api: Api, client: Client) -> list[dict[str, Any]]:
    """Serve the client; return the jobs in the ledger."""
    await api.app(client.scope, client.receive, client.send)
    jobs: list[dict[str, Any]] = []

    async def have_ended() -> bool:
        jobs[:] = (await api.http.get("/compute/jobs")).json()["jobs"]
        return bool(jobs) and all(job["outcome"] != "running" for job in jobs)

    await eventually(have_ended)
    return jobs


@pytest.mark.parametrize("blocks", [0, 1])
async def test_a_fault_of_ours_ends_a_stream_with_an_event_and_is_ours_in_the_ledger(
    api: Api, caplog: pytest.LogCaptureFixture, blocks: int
) -> None:
    """Before anything was sent it is a 500; after that no second head comes, and no [DONE]."""
    gateway = api.replica.gateway
    gateway.context = gateway.context._replace(event_stream=failing_stream(blocks))
    async with FaultNode(Behaviour(answer=chat_stream(*TEXTS), drip_body_seconds=0.02, drip_bytes=200)) as node:
        await add_node(api, node)
        client = Client(json.dumps({**BODY, "stream": True}).encode())
        with caplog.at_level(logging.CRITICAL):
            (job,) = await ask(api, client)
        await node.until(lambda node: not node.open_connections)
    assert client.heads == 1
    body = b"".join(message.get("body", b"") for message in client.sent)
    assert client.sent[-1].get("more_body", False) is False
    assert b"a fault of ours" not in body
    assert b"[DONE]" not in body
    last = json.loads(body.split(b"data: ")[-1])["error"]
    assert (client.sent[0]["status"], last["code"], last["type"]) == (
        200 if blocks else 500,
        "INTERNAL",
        "server_error",
    )
    assert (job["outcome"], job["reason"]) == ("failed", "internal")
    assert api.app.inference.running_count == 0


async def test_an_answer_that_can_not_be_ended_is_aborted(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    """As when the connection itself fails: nothing more can be said on it."""
    async with FaultNode(Behaviour(answer=chat_stream(*TEXTS))) as node:
        await add_node(api, node)
        client = Client(json.dumps({**BODY, "stream": True}).encode(), breaks_at="http.response.body")
        with caplog.at_level(logging.CRITICAL):
            (job,) = await ask(api, client)
    assert (client.heads, client.is_aborted) == (1, True)
    assert (job["outcome"], job["reason"]) == ("failed", "internal")
