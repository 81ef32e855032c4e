"""Forked children of the supervisor, and its signals. Children share its imports and die when it dies."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Self

from lucid_compute.postgres.embedded.launcher import die_with_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ServiceError(Exception):
    """The service can't start or can't go on; the text is a sentence that says why and what to do."""


def fork(body: Callable[[], int]) -> int:
    """Run `body` in a new process, which ends with the status that it returns; return its id. No thread may run.

    The child gets SIGKILL when this process ends, and SIGTERM stops it. It ignores a terminal's Ctrl-C and hang-up,
    which reach the whole group: the supervisor decides what they mean.
    """
    parent_pid = os.getpid()
    _flush()  # otherwise buffered output would be written twice
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # our handlers must not run in the child
    try:
        pid = os.fork()
        if pid == 0:
            _live(body, parent_pid, mask)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def reap(pid: int) -> int | None:
    """Return None while the child runs, else its status, or minus the signal that ended it; not callable after that."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def ending(code: int) -> str:
    """Return how a child ended, in words."""
    if code >= 0:
        return f"status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _live(body: Callable[[], int], parent_pid: int, mask: set[signal.Signals | int]) -> None:
    """Run as the child. It never returns, so that nothing of the supervisor's stack runs twice."""
    status = 1
    try:
        die_with_parent(signal.SIGKILL, parent_pid)
        _forget_handlers(mask)
        status = body()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:  # noqa: BLE001 - the last frame of a process
        traceback.print_exc()
    finally:
        with suppress(Exception):
            logging.shutdown()
            _flush()
        os._exit(status)


def _forget_handlers(mask: set[signal.Signals | int]) -> None:
    """Replace the supervisor's signal handlers by a child's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _flush() -> None:
    """Write buffered output, if it still has a reader."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()


class StopRequested(BaseException):
    """A stop signal came inside `StopSignals.interrupting`. Like KeyboardInterrupt, it is no Exception."""


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) until the end of the block; `received` has them in order."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._interrupts = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        """Take the signals over, and SIGCHLD, so that `wait` notices a child's end at once."""
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._handlers[number] = signal.signal(number, self._receive)
        self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @contextmanager
    def interrupting(self, known: int = 0) -> Iterator[None]:
        """Raise StopRequested at a signal inside the block, or before it unless among the first `known`."""
        self._interrupts = True
        try:
            if len(self.received) > known:
                raise StopRequested
            yield
        finally:
            self._interrupts = False

    def wait(self, timeout_seconds: float, files: Sequence[int] = ()) -> None:
        """Return when a signal comes (SIGCHLD too), when one of `files` can be read, or after the timeout."""
        readable, _, _ = select.select([self._reader, *files], [], [], timeout_seconds)
        if self._reader in readable:
            os.read(self._reader, 4096)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        """Record one signal."""
        self.received.append(number)
        if self._interrupts:
            self._interrupts = False  # the next one must not interrupt the cleanup
            raise StopRequested
