"""Observe the server and the GPUs, each on its own schedule, so that reports never wait for either."""

from __future__ import annotations

import asyncio
import logging
import random
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from lucid_compute.agent.gpu import GpuReader, GpuState
from lucid_compute.agent.server_watch import Observation, ServerWatch

SERVER_SECONDS = 4.0
GPU_SECONDS = 4.0
GPU_DEADLINE_SECONDS = 10.0
KNOWN_SECONDS = 20.0  # an older observation counts as unknown
_NO_GPUS = GpuState(None)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """What is known of the node now. None, and a GpuState with None, are unknown."""

    server: Observation | None
    gpus: GpuState


class Observer:
    """Keeps the newest observation of the server and of the GPUs, until it is too old to count."""

    def __init__(
        self,
        watch: ServerWatch,
        gpus: GpuReader,
        clock: Callable[[], float],
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Observe with `watch` and `gpus`; `clock` counts seconds.

        `on_change` is called when the server becomes able, or unable, to serve.
        """
        self._on_change = on_change
        self._watch = watch
        self._gpu_calls = ThreadedCall(gpus.read)
        self._clock = clock
        self._server: Observation | None = None
        self._gpus: tuple[float, GpuState] = (float("-inf"), _NO_GPUS)
        self._said: dict[str, str | None] = {}

    def seen(self) -> Seen:
        """Return what is known now."""
        now = self._clock()
        server = self._server if self._server and now - self._server.seen_at <= KNOWN_SECONDS else None
        gpus = self._gpus[1] if now - self._gpus[0] <= KNOWN_SECONDS else _NO_GPUS
        return Seen(server, gpus)

    async def observe(self) -> None:
        """Observe the server and the GPUs once, concurrently."""
        await asyncio.gather(self.observe_server(), self._observe_gpus())

    async def run(self) -> None:
        """Observe repeatedly, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_forever(self.observe_server, SERVER_SECONDS))
            group.create_task(_forever(self._observe_gpus, GPU_SECONDS))

    async def observe_server(self) -> None:
        """Observe the server once."""
        before, self._server = self._server, await self._watch.observe()
        if before is not None and (before.fault is None) != (self._server.fault is None):
            self._on_change()
        self._say("server", self._server.fault, "the inference server can serve again")
        notes = "; ".join(self._server.reading.notes) or None
        self._say("notes", notes, "nothing is to be noted about the models any more")

    async def _observe_gpus(self) -> None:
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


async def _forever(observe: Callable[[], Awaitable[None]], seconds: float) -> None:
    while True:
        try:
            await observe()
        except Exception:  # noqa: BLE001 - our own fault in one observation must not end the heartbeats
            _log.exception("an observation failed; its values are unknown")
        await asyncio.sleep(seconds * (0.9 + random.random() * 0.2))  # noqa: S311 - jitter, not a secret


Result = TypeVar("Result")


class ThreadedCall(Generic[Result]):
    """Calls one blocking function on one thread, one call at a time.

    A call that hangs is left alone: no other call starts until it returns. The thread is a daemon, so that it does not
    block the end of the process, as the threads of an executor would.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        self._function = function
        self._orders: SimpleQueue[asyncio.Future[Result]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: asyncio.Future[Result] | None = None

    async def call(self, deadline_seconds: float) -> Result:
        """Return the function's result.

        Raises:
            TimeoutError: it did not return in time. The next call gets its result.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="blocking calls", daemon=True)
            self._thread.start()
        if self._pending is None:
            self._pending = asyncio.get_running_loop().create_future()
            self._orders.put(self._pending)
        await asyncio.wait({self._pending}, timeout=deadline_seconds)
        if not self._pending.done():
            raise TimeoutError
        answered, self._pending = self._pending, None
        return answered.result()

    def _work(self) -> None:
        while True:
            order = self._orders.get()
            loop = order.get_loop()
            try:
                result = self._function()
            except Exception as error:  # noqa: BLE001 - raised where it is waited for
                settle, value = _settle_with_exception, error
            else:
                settle, value = _settle, result  # type: ignore[assignment]
            with suppress(RuntimeError):  # the loop was closed in the meantime
                loop.call_soon_threadsafe(settle, order, value)


def _settle(order: asyncio.Future[Result], result: Result) -> None:
    if not order.done():
        order.set_result(result)


def _settle_with_exception(order: asyncio.Future[Result], error: Exception) -> None:
    if not order.done():
        order.set_exception(error)
