"""What happens, and when: a server is killed, another node is drained, the first is back, and so is the other."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable

from demo.cast import Cast
from demo.children import DemoFailed
from demo.narrator import Narrator
from demo.node import Node
from demo.stage import Stage
from demo.tally import Tally
from lucid_compute.client import AsyncLucid
from lucid_compute.wire.compute import NodeHealth

ROUND_SECONDS = 80.0
KILL_AT, DRAIN_AT, RETURN_AT, RESUME_AT = 8.0, 17.0, 24.0, 33.0  # of a round
NOTICE_SECONDS = 30.0  # twice what any change takes to be seen
LOOK_SECONDS = 0.2
TICK_SECONDS = 5.0


class Plot:
    """Plays rounds of four events and tells of them; each is over when the service shows what came of it."""

    def __init__(self, stage: Stage, cast: Cast, narrator: Narrator, tally: Tally) -> None:
        """Begin nothing yet."""
        self._stage, self._cast, self._narrator, self._tally = stage, cast, narrator, tally
        self._awaited: dict[str, tuple[Node, int]] = {}
        self._told: Counter[str] = Counter()

    async def play(self, seconds: float) -> None:
        """Play one round, hastened if need be, and further ones with other nodes while there is time."""
        ends_at = time.monotonic() + seconds
        pace = min(seconds / ROUND_SECONDS, 1.0)
        async with self._cast.lucid() as lucid:
            number = 0
            while number == 0 or time.monotonic() + ROUND_SECONDS <= ends_at:
                next_at = time.monotonic() + ROUND_SECONDS
                nodes = self._cast.nodes
                await self._play_round(lucid, nodes[number % len(nodes)], nodes[(number + 1) % len(nodes)], pace)
                number += 1
                await _until(min(next_at, ends_at))
        await _until(ends_at)

    async def observe(self) -> None:
        """Tell the counters every few seconds, and when a node that was away answers requests again."""
        told_at = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            for node, before in list(self._awaited.values()):
                if self._tally.by_node[node.passport_id] > before:
                    del self._awaited[node.name]
                    self._narrator.tell(f"SERVING   {node.name} answers requests again")
            if time.monotonic() >= told_at + TICK_SECONDS:
                told_at = time.monotonic()
                self._tell_counters()

    def _tell_counters(self) -> None:
        """Tell what clients have seen so far, and how many answers each node gave since this was told last."""
        now = Counter(self._tally.by_node)
        lately = ", ".join(f"{node.name} {(now - self._told)[node.passport_id]}" for node in self._cast.nodes)
        self._told = now
        self._narrator.tell(f"          {self._tally.line()}; lately {lately}")

    async def _play_round(self, lucid: AsyncLucid, killed: Node, drained: Node, pace: float) -> None:
        began_at = time.monotonic()
        await _until(began_at + pace * KILL_AT)
        await self._kill(lucid, killed)
        await _until(began_at + pace * DRAIN_AT)
        self._narrator.tell(f"DRAINING  lucid drain {drained.name}")
        self._narrator.tell(f"DRAINED   {await self._lucid('drain', drained.name)}")
        await _until(began_at + pace * RETURN_AT)
        await self._bring_back(lucid, killed)
        await _until(began_at + pace * RESUME_AT)
        before = self._tally.by_node[drained.passport_id]
        self._narrator.tell(f"RESUMED   lucid resume {drained.name}: {await self._lucid('resume', drained.name)}")
        self._awaited[drained.name] = (drained, before)

    async def _kill(self, lucid: AsyncLucid, node: Node) -> None:
        saved = self._tally.rescued
        pid = node.kill_server()
        self._narrator.tell(f"KILLED    {node.name}'s inference server, process {pid}, with kill -9; requests go on")
        health = await self._becomes(lucid, node, lambda health: health.status == "unhealthy")
        detail = "" if health.reported is None else f" ({health.reported.detail})"
        self._narrator.tell(f"UNHEALTHY {node.name} says so itself{detail}")
        self._narrator.tell(
            f"          {self._tally.rescued - saved} requests met the dead server, and another node answered"
        )

    async def _bring_back(self, lucid: AsyncLucid, node: Node) -> None:
        before = self._tally.by_node[node.passport_id]
        server = node.start_server()
        await node.server_listens()
        self._narrator.tell(f"RETURNED  {node.name}'s inference server, as process {server.pid}")
        await self._becomes(lucid, node, lambda health: health.status == "healthy" and bool(health.available_models))
        self._narrator.tell(f"HEALTHY   {node.name} says so itself")
        self._awaited[node.name] = (node, before)

    async def _becomes(self, lucid: AsyncLucid, node: Node, holds: Callable[[NodeHealth], bool]) -> NodeHealth:
        """Wait until the service says this of the node."""
        deadline = time.monotonic() + NOTICE_SECONDS
        while not holds(health := await lucid.compute.health(node.passport_id)):
            if time.monotonic() > deadline:
                raise DemoFailed(f"{node.name} is still {health.status} after {NOTICE_SECONDS:g} s.")
            await asyncio.sleep(LOOK_SECONDS)
        return health

    async def _lucid(self, *arguments: str) -> str:
        """Run a command of `lucid` to its end; answer the last line that it says."""
        command = self._stage.lucid(arguments, self._cast.url)
        if await command.ends() != 0:
            raise command.fault()
        return command.words.splitlines()[-1]


async def _until(moment: float) -> None:
    await asyncio.sleep(max(moment - time.monotonic(), 0.0))
