"""The agents behind the outbound benchmark: many nodes' connections in one process. Run by `benchmarks.outbound`."""

from __future__ import annotations

import asyncio
import json
import sys
from functools import partial
from typing import Any

import uvloop

from lucid_compute.agent.outbound.forwarder import Forwarder
from lucid_compute.agent.outbound.links import OutboundLinks, ServiceAddress

AT_ONCE = 20  # nodes that begin to connect in a tenth of a second


def _named(node: str) -> tuple[str, str]:
    return node, "benchmark"


async def run(spec: dict[str, Any]) -> None:
    """Keep the connections of all nodes, each for one of the servers."""
    address = ServiceAddress(spec["url"], spec["key"], None)
    forwarders = [Forwarder(f"http://127.0.0.1:{port}", None) for port in spec["ports"]]
    running = []
    for number, node in enumerate(spec["nodes"]):
        links = OutboundLinks(address, partial(_named, node), forwarders[number % len(forwarders)])
        running.append(asyncio.create_task(links.run()))
        if number % AT_ONCE == 0:
            await asyncio.sleep(0.1)
    await asyncio.gather(*running)


if __name__ == "__main__":
    uvloop.run(run(json.load(sys.stdin)))
