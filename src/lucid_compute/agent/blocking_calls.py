"""Calls that may block, away from the event loop: one thread, and whoever waits for it waits only so long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

Result = TypeVar("Result")


class BlockingCalls(Generic[Result]):
    """Calls one function on one thread, one call at a time.

    A call that hangs is left alone: nothing more is asked until it returns, if ever. The thread is a daemon's, so that
    it does not hold up the end of the process either; the threads of an executor would.
    """

    def __init__(self, function: Callable[[], Result]) -> None:
        """Start nothing yet."""
        self._function = function
        self._orders: SimpleQueue[asyncio.Future[Result]] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._pending: asyncio.Future[Result] | None = None

    async def call(self, deadline_seconds: float) -> Result:
        """Answer what the function answers.

        Raises:
            TimeoutError: it did not return in time; its answer is then the next call's.
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
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(settle, order, value)


def _settle(order: asyncio.Future[Result], result: Result) -> None:
    if not order.done():
        order.set_result(result)


def _settle_with_exception(order: asyncio.Future[Result], error: Exception) -> None:
    if not order.done():
        order.set_exception(error)
