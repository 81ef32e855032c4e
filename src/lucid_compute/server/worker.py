"""One worker: uvicorn on inherited sockets; and `Worker`, with which the supervisor keeps it running."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress

import uvicorn

from lucid_compute.server.fast_path import FastPathProtocol
from lucid_compute.server.processes import ServiceError, ending, fork, reap
from lucid_compute.server.settings import Settings
from lucid_compute.server.sockets import BACKLOG
from lucid_compute.wire import backoff_seconds

READY = b"+"
QUICK_DEATH_SECONDS = 1.0  # a worker that ends before it was ready this long did no work
MAX_QUICK_DEATHS = 5
FIRST_PAUSE_SECONDS = 0.2  # doubles with each quick death

Application = Callable[..., Awaitable[None]]  # ASGI's: scope, receive, send

log = logging.getLogger(__name__)


class WorkerServer(uvicorn.Server):
    """uvicorn that reports on `channel` when it serves, ends when that closes, and ends with status 0 on SIGTERM."""

    def __init__(self, config: uvicorn.Config, channel: socket.socket) -> None:
        super().__init__(config)
        self._channel = channel

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the lifespan and the listeners. Until then SIGTERM ends the process: there is nothing to finish."""
        await super().startup(sockets)
        _collect_rarely()
        signal.signal(signal.SIGTERM, self.handle_exit)
        asyncio.get_running_loop().add_reader(self._channel, self._end_without_supervisor)
        self._channel.send(READY)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no handler: uvicorn's own would raise SIGTERM again at the end, and exit with status 143."""
        yield

    def _end_without_supervisor(self) -> None:
        """End at once. Nothing is ever sent to us, so the channel is readable only when the supervisor is gone.

        On Linux the kernel kills us first.
        """
        os._exit(1)


def _collect_rarely() -> None:
    """Exclude objects of the start from garbage collection, and collect the others less often.

    Otherwise it visits every node of the fleet again and again: p99 of heartbeats was 49 to 88 ms, and is 5 to 14 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 100)


def serve(app: Application, sockets: list[socket.socket], channel: socket.socket, settings: Settings) -> int:
    """Serve `app` until SIGTERM, then finish running requests within the settings' grace; return the exit status."""
    config = uvicorn.Config(
        app,
        loop="uvloop",
        http=FastPathProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=settings.keep_alive_seconds,
        timeout_graceful_shutdown=math.ceil(settings.shutdown_grace_seconds),
        forwarded_allow_ips=settings.trusted_proxies,
    )
    WorkerServer(config, channel).run(sockets)
    return 0


class Worker:
    """The process of one worker; `tend` starts another one whenever it has ended."""

    def __init__(self, body: Callable[[socket.socket], int]) -> None:
        """`body` runs in the process; it gets the channel on which it reports that it is ready."""
        self._body = body
        self._pid: int | None = None
        self._channel: socket.socket | None = None
        self._ready_at: float | None = None
        self._due_at = 0.0
        self._quick_deaths = 0

    @property
    def is_alive(self) -> bool:
        """Return whether a process runs, as far as was noticed."""
        return self._pid is not None

    @property
    def is_ready(self) -> bool:
        """Return whether the process has reported that it serves."""
        return self._ready_at is not None

    @property
    def due_at(self) -> float | None:
        """When the next process starts; None while one runs."""
        return None if self.is_alive else self._due_at

    @property
    def channel(self) -> socket.socket | None:
        """The socket that becomes readable when the process is ready; None when there is nothing to wait for."""
        return self._channel if self.is_alive and not self.is_ready else None

    def tend(self, now: float, others: list[Worker]) -> None:
        """Notice readiness and end, and start the next process when it is due; `now` is the monotonic clock's.

        Raises:
            ServiceError: the worker ended MAX_QUICK_DEATHS times in a row right after its start.
        """
        self.notice_ready(now)
        if self.is_alive and (code := self.notice_end()) is not None:
            self._plan_next(code, now)
        if not self.is_alive and now >= self._due_at:
            self._start(others)

    def notice_ready(self, now: float) -> None:
        """Record when the process reported that it serves."""
        if self.channel is not None:
            with suppress(BlockingIOError, ConnectionError):
                if self.channel.recv(1) == READY:
                    self._ready_at = now

    def notice_end(self) -> int | None:
        """Return None while the process runs, else how it ended, once."""
        if self._pid is None or (code := reap(self._pid)) is None:
            return None
        self._pid = None
        self.close_channel()
        return code

    def send(self, signal_number: int) -> None:
        """Send a signal to the process, if there is one."""
        if self._pid is not None:
            os.kill(self._pid, signal_number)

    def close_channel(self) -> None:
        """Close our end of the channel: in the supervisor when the worker ended, in each other worker at its start."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def _plan_next(self, code: int, now: float) -> None:
        """Decide when the next process starts, if at all."""
        is_quick = self._ready_at is None or now - self._ready_at < QUICK_DEATH_SECONDS
        self._quick_deaths = self._quick_deaths + 1 if is_quick else 0
        self._ready_at = None
        if self._quick_deaths >= MAX_QUICK_DEATHS:
            msg = (
                f"A worker ended {MAX_QUICK_DEATHS} times in a row right after its start, the last time with "
                f"{ending(code)}: what it said stands above; the service gives up."
            )
            raise ServiceError(msg)
        pause_seconds = backoff_seconds(self._quick_deaths, first_seconds=FIRST_PAUSE_SECONDS) if is_quick else 0.0
        self._due_at = now + pause_seconds
        log.warning("a worker ended (%s); the next one starts in %.1f s", ending(code), pause_seconds)

    def _start(self, others: list[Worker]) -> None:
        """Fork the process."""
        ours, theirs = socket.socketpair()
        ours.settimeout(0.0)
        theirs.settimeout(0.0)

        def child() -> int:
            ours.close()
            for other in others:  # a copy of their end here would hide from them that the supervisor is gone
                other.close_channel()
            return self._body(theirs)

        self._pid = fork(child)
        self._channel = ours
        theirs.close()
