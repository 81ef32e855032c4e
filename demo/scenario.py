"""The demo's story: start everything, kill a server, drain another node, and bring both back."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

from demo.clients import LIMITS_PER_MINUTE, TOO_LARGE, Clients
from demo.llama_cpp import CONTEXT_OF_A_SLOT, MODEL
from demo.processes import LUCID, DemoFailed, Node, Processes
from lucid_compute.client import AsyncLucid
from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.keys.shapes import NewKey

PROVIDER = "aurora-gpus"
PLACES = (("berlin-1", "eu-central", "0.0020"), ("oslo-1", "eu-north", "0.0015"), ("austin-1", "us-south", "0.0025"))
READY_SECONDS = 30.0
NOTICE_SECONDS = 60.0  # twice what a breaker takes; other changes take less
POLL_SECONDS = 0.2
COUNTS_SECONDS = 5.0  # between two lines of counts
ROUND_SECONDS = 80.0
KILL_AT, DRAIN_AT, RETURN_AT, RESUME_AT = 8.0, 17.0, 24.0, 33.0  # seconds of a round


class Network(NamedTuple):
    """What was started. `consumers` and `guest`, the user's key, may run inference; `reader` may only read."""

    url: str
    admin_key: str
    nodes: tuple[Node, ...]
    consumers: dict[str, NewKey]
    reader: NewKey
    guest: NewKey

    def lucid(self) -> AsyncLucid:
        """Return the SDK's client, with the admin key."""
        return AsyncLucid(self.url, self.admin_key)


async def start_network(processes: Processes, port: int) -> Network:
    """Start everything; return when every node can serve requests.

    Raises:
        DemoFailed: a process or a node does not start.
    """
    command: list[str | Path] = [LUCID, "serve", "--port", str(port), "--data-dir", processes.data_dir]
    service = processes.start("lucid serve", command, death_signal=signal.SIGTERM, LUCID_LOG_LEVEL="WARNING")
    # The last one is as behind NAT: its agent opens the connections.
    nodes = tuple(Node(processes, *place, is_outbound=place is PLACES[-1]) for place in PLACES)
    for node in nodes:
        node.start_server()
    url = await service.wait_for(r"listens on (\S+)\n")
    admin_key = (processes.data_dir / "admin.key").read_text(encoding="ascii").strip()
    async with AsyncLucid(url, admin_key) as lucid:

        async def new_key(name: str, owner: str, scope: Scope, per_minute: int | None = None) -> NewKey:
            limits = None if per_minute is None else {"requests_per_minute": per_minute}
            return await lucid.keys.create(name=name, owner=owner, scopes=[scope], limits=limits)

        for name, vram_gb, format_, context in (
            (MODEL, 1, "gguf", CONTEXT_OF_A_SLOT),
            (TOO_LARGE, 140, "safetensors", 8192),
        ):
            metadata = {"format": format_, "minVramGb": vram_gb, "contextLength": context}
            await lucid.passports.create(name=name, type="model", owner="tiny-labs", metadata=metadata)
        agents = await new_key("agents", PROVIDER, Scope.COMPUTE)
        await asyncio.gather(*(node.start_agent(url, agents.key) for node in nodes))
        limits = LIMITS_PER_MINUTE.items()
        network = Network(
            url=url,
            admin_key=admin_key,
            nodes=nodes,
            consumers={name: await new_key(name, name, Scope.INFERENCE_RUN, limit) for name, limit in limits},
            reader=await new_key("dashboard", PROVIDER, Scope.PASSPORTS_READ),
            guest=await new_key("guest", "guest", Scope.INFERENCE_RUN),
        )
        await _wait_for_nodes(lucid, nodes)
    return network


async def _wait_for_nodes(lucid: AsyncLucid, nodes: tuple[Node, ...]) -> None:
    async def are_ready() -> bool:
        ready = {node.name: node async for node in lucid.compute.list(status="healthy", model=MODEL)}
        for node in nodes:
            if node.name in ready and MODEL in ready[node.name].health.available_models:
                node.id = ready[node.name].id
        return all(node.id for node in nodes)

    await _wait_until(are_ready, "The nodes are not ready", READY_SECONDS)


class Scenario:
    """Plays rounds of four events and prints each when the service shows its effect."""

    def __init__(self, processes: Processes, network: Network, clients: Clients, say: Callable[[str], None]) -> None:
        self._processes, self._network, self._clients, self._say = processes, network, clients, say
        self._counts = clients.counts

    async def play(self, seconds: float) -> None:
        """Play one round, faster if `seconds` are short, and further rounds with other nodes while there is time."""
        ends_at = time.monotonic() + seconds
        pace = min(seconds / ROUND_SECONDS, 1.0)
        async with self._network.lucid() as lucid:
            next_at = time.monotonic()
            while True:
                next_at += ROUND_SECONDS
                await self._play_round(lucid, pace)
                if next_at + ROUND_SECONDS > ends_at:
                    break
                await _sleep_until(next_at)
        await _sleep_until(ends_at)

    async def print_counts(self) -> None:
        """Print every few seconds what clients saw, and how many responses each node has sent since the last line."""
        before: Counter[str] = Counter()
        while True:
            await asyncio.sleep(COUNTS_SECONDS)
            now = Counter(self._counts.by_node)
            lately = ", ".join(f"{node.name} {(now - before)[node.id]}" for node in self._network.nodes)
            before = now
            self._say(f"          {self._counts.line()}; lately {lately}")

    async def _play_round(self, lucid: AsyncLucid, pace: float) -> None:
        """Kill the busiest node's server, so that requests meet it dead, and drain the next busiest node."""
        began_at = time.monotonic()
        await _sleep_until(began_at + pace * KILL_AT)
        killed, drained, _ = sorted(self._network.nodes, key=lambda node: -self._counts.by_node[node.id])
        await self._kill(lucid, killed)
        await _sleep_until(began_at + pace * DRAIN_AT)
        self._say(f"DRAINING  lucid drain {drained.name}")
        self._say(f"DRAINED   {await self._processes.run_lucid(self._network.url, 'drain', drained.name)}")
        await _sleep_until(began_at + pace * RETURN_AT)
        await self._restart(lucid, killed)
        await _sleep_until(began_at + pace * RESUME_AT)
        resumed = await self._processes.run_lucid(self._network.url, "resume", drained.name)
        self._say(f"RESUMED   lucid resume {drained.name}: {resumed}")
        for node in (drained, killed):  # the breaker of the killed one may be open for 30 s
            await _wait_until(lambda node=node: self._clients.reach(node.id), f"{node.name} is sent no requests")  # type: ignore[misc]
            self._say(f"SERVING   {node.name} answers requests again")

    async def _kill(self, lucid: AsyncLucid, node: Node) -> None:
        rescued_before = self._counts.rescued
        node.server.kill()
        self._say(f"KILLED    {node.name}'s inference server, process {node.server.pid}, with kill -9; requests go on")

        async def is_unhealthy() -> bool:
            return (await lucid.compute.health(node.id)).status == "unhealthy"

        await _wait_until(is_unhealthy, f"{node.name} does not become unhealthy")
        reported = (await lucid.compute.health(node.id)).reported
        self._say(f"UNHEALTHY {node.name} says so itself: {reported.detail if reported else None}")
        rescued = self._counts.rescued - rescued_before
        self._say(f"          requests that met the dead server, and were answered by another node: {rescued}")

    async def _restart(self, lucid: AsyncLucid, node: Node) -> None:
        node.start_server()
        await node.server_url()
        self._say(f"RETURNED  {node.name}'s inference server, as process {node.server.pid}")

        async def is_healthy() -> bool:
            health = await lucid.compute.health(node.id)
            return health.status == "healthy" and bool(health.available_models)

        await _wait_until(is_healthy, f"{node.name} does not become healthy")
        self._say(f"HEALTHY   {node.name} says so itself")


async def _wait_until(holds: Callable[[], Awaitable[bool]], complaint: str, seconds: float = NOTICE_SECONDS) -> None:
    """Wait until `holds` returns True.

    Raises:
        DemoFailed: it does not within `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not await holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{complaint} within {seconds:g} s.")
        await asyncio.sleep(POLL_SECONDS)


async def _sleep_until(moment: float) -> None:
    await asyncio.sleep(max(moment - time.monotonic(), 0.0))
