"""Outbound nodes below a test: the agent's own connections in this process, and an agent that breaks the rules."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, NamedTuple
from uuid import uuid4

from websockets.asyncio.client import ClientConnection, connect

from lucid_compute.agent.outbound.forwarder import Forwarder
from lucid_compute.agent.outbound.links import OutboundLinks, ServiceAddress
from tests.gateway import Gateway

BEAT_SECONDS = 9.0
CONNECT_SECONDS = 30.0


class OutboundNode(NamedTuple):
    """A node that is registered and sends heartbeats; `key` is that of its agent, with the id `key_id`."""

    id: str
    boot_id: str
    key: str
    key_id: str


@asynccontextmanager
async def registered(gateway: Gateway, *models: str, **metadata: Any) -> AsyncIterator[OutboundNode]:
    """Register an outbound node, and send its heartbeats while the block runs. It has no connection yet."""
    boot_id = uuid4().hex
    known = {"connectivity": "outbound", "inferenceUrl": None, **metadata}
    node = await gateway.add_node("", *models, beat={"bootId": boot_id}, **known)
    key = await gateway.new_key("compute", owner="admin", passportId=node)

    async def beat() -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            await gateway.beat(node, *models, bootId=boot_id)

    beating = asyncio.create_task(beat())
    try:
        yield OutboundNode(node, boot_id, key["key"], key["id"])
    finally:
        beating.cancel()
        await asyncio.wait({beating})


@asynccontextmanager
async def linked(url: str, node: OutboundNode, server_url: str, server_key: str | None = None) -> AsyncIterator[None]:
    """Keep the node's connections to the service at `url`, as its agent does, for the inference server."""
    links = OutboundLinks(
        ServiceAddress(url, node.key, None), lambda: (node.id, node.boot_id), Forwarder(server_url, server_key)
    )
    task = asyncio.create_task(links.run())
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def connect_by_hand(url: str, node: OutboundNode, **changes: str) -> connect:
    """Return a WebSocket to the service, opened as an agent does; what it then sends is the test's."""
    told = {"passportId": node.id, "bootId": node.boot_id, "key": node.key, **changes}
    address = f"{url.replace('http', 'ws', 1)}/compute/connect?passportId={told['passportId']}&bootId={told['bootId']}"
    headers = {"Authorization": f"Bearer {told['key']}"}
    return connect(address, additional_headers=headers, compression=None, proxy=None, close_timeout=1)


async def closed_with(websocket: ClientConnection) -> str:
    """Wait until the service closes the connection; return its reason."""
    async with asyncio.timeout(CONNECT_SECONDS):
        await websocket.wait_closed()
    return websocket.close_reason or ""


def is_chosen(node: OutboundNode) -> Callable[[dict[str, Any]], bool]:
    """Return whether a response of /match has chosen the node."""
    return lambda answer: (answer["chosen"] or {}).get("passportId") == node.id


def says_unconnected(answer: dict[str, Any]) -> bool:
    """Return whether a response of /match has rejected a node because it is not connected, and for nothing else."""
    codes = [[reason["code"] for reason in each["reasons"]] for each in answer["rejected"]]
    return ["NOT_CONNECTED"] in codes and not answer["shortlist"]
