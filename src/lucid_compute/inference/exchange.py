"""One request under way: who waits for it, and how it is ended from our side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any

from lucid_compute.errors import LucidError
from lucid_compute.jobs import Job


class CutReason(StrEnum):
    """Why a request was ended from our side; the values stand in the job ledger."""

    CLIENT_LEFT = "client_left"
    CLIENT_TOO_SLOW = "client_too_slow"
    KEY_REVOKED = "key_revoked"
    BODY_TOO_SLOW = "body_too_slow"
    SHUTDOWN = "shutdown"


class Exchange:
    """One request under way. `cut` says why it was ended, None while it was not.

    `key_id` is empty until it is known who asks. `has_body` once the request is whole, `has_begun` once its answer has;
    `sending_since` is when the client was last sent something that it has not taken, 0 when it has; `job` is the
    attempt that runs or ran last.
    """

    __slots__ = ("cut", "has_begun", "has_body", "job", "key_id", "sending_since", "started_at")

    def __init__(self) -> None:
        """Begin."""
        self.key_id = ""
        self.job: Job | None = None
        self.cut: CutReason | None = None
        self.started_at = time.monotonic()
        self.sending_since = 0.0
        self.has_body = self.has_begun = False

    def end(self, reason: CutReason) -> None:
        """End it from our side."""
        raise NotImplementedError

    def watch(self) -> None:
        """Notice from now on when the client leaves."""

    def settle(self) -> None:
        """Note that the client has its whole answer: to leave is its right, and nothing is ended by it."""


class TaskExchange(Exchange):
    """A request that a task serves. `give_up` ends the answer with an error, None before anything can be answered."""

    __slots__ = ("_task", "_watcher", "give_up", "receive")

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Begin in the task that serves it; `receive` answers ASGI's messages of the client."""
        super().__init__()
        self.receive = receive
        self.give_up: Callable[[LucidError], Awaitable[None]] | None = None
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None

    def end(self, reason: CutReason) -> None:
        """End it: whatever it waits for is cancelled."""
        if self.cut is None and self._task is not None:
            self.cut = reason
            self._task.cancel()

    def settle(self) -> None:
        """Note that the client has its whole answer: to leave is its right, and nothing is ended by it."""
        self._task = None

    def watch(self) -> None:
        """Notice from now on when the client leaves."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._await_leaving())

    def close(self) -> None:
        """Watch no longer, and let go of what would hold the request in a circle until garbage is collected."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self.give_up = self._task = None

    async def _await_leaving(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.end(CutReason.CLIENT_LEFT)
