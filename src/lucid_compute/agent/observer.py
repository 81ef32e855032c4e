"""Looks at the server and at the GPUs, each in its own time, so that whoever reports never waits for either."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from lucid_compute.agent.blocking_calls import BlockingCalls
from lucid_compute.agent.gpu import GpuReader, GpuState
from lucid_compute.agent.server_watch import Observation, ServerWatch

LOOK_SECONDS = 4.0
GPU_SECONDS = 4.0
GPU_DEADLINE_SECONDS = 10.0
KNOWN_SECONDS = 20.0  # for so long a reading counts; then it is unknown
_NO_GPUS = GpuState(None)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the node now; None and a GpuState of None are unknown."""

    server: Observation | None
    gpus: GpuState


class Observer:
    """Holds the newest look at the server and at the GPUs, until they are too old to count."""

    def __init__(
        self,
        watch: ServerWatch,
        gpus: GpuReader,
        clock: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Look by `watch` and `gpus`; `clock` counts seconds. `on_change`: the server can serve now, or no longer."""
        self._on_change = on_change
        self._watch = watch
        self._gpu_calls = BlockingCalls(gpus.read)
        self._clock = clock
        self._server: Observation | None = None
        self._gpus: tuple[float, GpuState] = (float("-inf"), _NO_GPUS)
        self._said: dict[str, str | None] = {}

    def seen(self) -> Seen:
        """Answer what is known now."""
        now = self._clock()
        server = self._server if self._server and now - self._server.seen_at <= KNOWN_SECONDS else None
        gpus = self._gpus[1] if now - self._gpus[0] <= KNOWN_SECONDS else _NO_GPUS
        return Seen(server, gpus)

    async def look(self) -> None:
        """Look at everything once, side by side."""
        await asyncio.gather(self.look_at_server(), self._look_at_gpus())

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_forever(self.look_at_server, LOOK_SECONDS))
            group.create_task(_forever(self._look_at_gpus, GPU_SECONDS))

    async def look_at_server(self) -> None:
        """Look at the server once."""
        before, self._server = self._server, await self._watch.look()
        if before is not None and (before.fault is None) != (self._server.fault is None):
            self._on_change()
        self._say("server", self._server.fault, "the inference server can serve again")
        self._say("notes", "; ".join(self._server.reading.notes) or None, "no model runs on the CPU any more")

    async def _look_at_gpus(self) -> None:
        try:
            state = await self._gpu_calls.call(GPU_DEADLINE_SECONDS)
        except TimeoutError:
            self._say("gpus", f"NVML does not answer within {GPU_DEADLINE_SECONDS:.0f} s", "")
            return
        self._gpus = (self._clock(), state)
        self._say("gpus", state.detail, "NVML answers for every GPU again")

    def _say(self, of: str, what: str | None, when_over: str) -> None:
        """Log a change, once."""
        before = self._said.get(of)
        self._said[of] = what
        if what is not None and what != before:
            _log.warning("%s", what)
        elif what is None and before is not None:
            _log.info("%s", when_over)


async def _forever(look: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await look()
        except Exception:  # noqa: BLE001 - a fault of ours in one look must not end the beats
            _log.exception("a look failed; what it would have found is unknown")
        await asyncio.sleep(seconds * (0.9 + random.random() * 0.2))  # noqa: S311 - jitter, not a secret
