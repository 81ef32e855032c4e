"""What happens, and when: a server is killed, another node is drained, the first is back, and so is the other."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable

from demo.cast import Cast
from demo.children import DemoFailed
from demo.narrator import Narrator
from demo.node import Node
from demo.stage import Stage
from demo.traffic import Traffic
from lucid_compute.client import AsyncLucid

ROUND_SECONDS = 80.0
KILL_AT, DRAIN_AT, RETURN_AT, RESUME_AT = 8.0, 17.0, 24.0, 33.0  # of a round
NOTICE_SECONDS = 60.0  # twice what a breaker takes, and other changes less
LOOK_SECONDS = 0.2
TICK_SECONDS = 5.0


class Plot:
    """Plays rounds of four events and tells of them; each is over when the service shows what came of it."""

    def __init__(self, stage: Stage, cast: Cast, narrator: Narrator, traffic: Traffic) -> None:
        self._stage, self._cast, self._narrator, self._traffic = stage, cast, narrator, traffic
        self._tally = traffic.tally
        self._told: Counter[str] = Counter()

    async def play(self, seconds: float) -> None:
        """Play one round, hastened if need be, and further ones with other nodes while there is time."""
        ends_at = time.monotonic() + seconds
        pace = min(seconds / ROUND_SECONDS, 1.0)
        async with self._cast.lucid() as lucid:
            is_first = True
            while is_first or time.monotonic() + ROUND_SECONDS <= ends_at:
                next_at = time.monotonic() + ROUND_SECONDS
                await self._play_round(lucid, pace)
                await _until(min(next_at, ends_at))
                is_first = False
        await _until(ends_at)

    async def observe(self) -> None:
        """Tell the counters every few seconds."""
        told_at = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if time.monotonic() >= told_at + TICK_SECONDS:
                told_at = time.monotonic()
                self._tell_counters()

    def _tell_counters(self) -> None:
        """Tell what clients have seen so far, and how many answers each node gave since this was told last."""
        now = Counter(self._tally.by_node)
        lately = ", ".join(f"{node.name} {(now - self._told)[node.passport_id]}" for node in self._cast.nodes)
        self._told = now
        self._narrator.tell(f"          {self._tally.line()}; lately {lately}")

    async def _play_round(self, lucid: AsyncLucid, pace: float) -> None:
        """Kill the busiest node's server, so that requests meet it dead, and drain the next busiest."""
        began_at = time.monotonic()
        await _until(began_at + pace * KILL_AT)
        answered = self._tally.by_node
        killed, drained, _ = sorted(self._cast.nodes, key=lambda node: -answered[node.passport_id])
        await self._kill(lucid, killed)
        await _until(began_at + pace * DRAIN_AT)
        self._narrator.tell(f"DRAINING  lucid drain {drained.name}")
        self._narrator.tell(f"DRAINED   {await self._lucid('drain', drained.name)}")
        await _until(began_at + pace * RETURN_AT)
        await self._bring_back(lucid, killed)
        await _until(began_at + pace * RESUME_AT)
        self._narrator.tell(f"RESUMED   lucid resume {drained.name}: {await self._lucid('resume', drained.name)}")
        await self._sees_requests(drained)
        await self._sees_requests(killed)

    async def _kill(self, lucid: AsyncLucid, node: Node) -> None:
        saved = self._tally.rescued
        pid = node.kill_server()
        self._narrator.tell(f"KILLED    {node.name}'s inference server, process {pid}, with kill -9; requests go on")

        async def is_unhealthy() -> bool:
            return (await lucid.compute.health(node.passport_id)).status == "unhealthy"

        await _comes_true(is_unhealthy, f"{node.name} does not become unhealthy")
        reported = (await lucid.compute.health(node.passport_id)).reported
        self._narrator.tell(f"UNHEALTHY {node.name} says so itself: {reported.detail if reported else None}")
        saved = self._tally.rescued - saved
        self._narrator.tell(f"          requests that met the dead server, and were answered by another node: {saved}")

    async def _bring_back(self, lucid: AsyncLucid, node: Node) -> None:
        server = node.start_server()
        await node.server_listens()
        self._narrator.tell(f"RETURNED  {node.name}'s inference server, as process {server.pid}")

        async def is_healthy() -> bool:
            health = await lucid.compute.health(node.passport_id)
            return health.status == "healthy" and bool(health.available_models)

        await _comes_true(is_healthy, f"{node.name} does not become healthy")
        self._narrator.tell(f"HEALTHY   {node.name} says so itself")

    async def _sees_requests(self, node: Node) -> None:
        """Wait until the node is sent a request that names it: its breaker may be open for 30 s."""
        await _comes_true(lambda: self._traffic.greet(node.passport_id), f"{node.name} is sent no requests")
        self._narrator.tell(f"SERVING   {node.name} answers requests again")

    async def _lucid(self, *arguments: str) -> str:
        """Run a command of `lucid` to its end; return the last line that it says."""
        command = self._stage.lucid(arguments, self._cast.url)
        if await command.ends() != 0:
            raise command.fault()
        return command.words.splitlines()[-1]


async def _comes_true(holds: Callable[[], Awaitable[bool]], complaint: str) -> None:
    deadline = time.monotonic() + NOTICE_SECONDS
    while not await holds():
        if time.monotonic() > deadline:
            raise DemoFailed(f"{complaint} within {NOTICE_SECONDS:g} s.")
        await asyncio.sleep(LOOK_SECONDS)


async def _until(moment: float) -> None:
    await asyncio.sleep(max(moment - time.monotonic(), 0.0))
