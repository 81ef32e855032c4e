"""Children of the supervisor made by fork: they share what it imported, die when it dies and end by status alone."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from lucid_compute.storage.embedded_postgres.launcher import die_with_parent

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class ServiceError(Exception):
    """The service can't start or can't go on; the text is a sentence that says why and what to do."""


def fork(body: Callable[[], int]) -> int:
    """Run `body` in a new process, which ends with the status it answers; answers the process. No thread may run.

    The child gets SIGKILL when this process ends, is stopped by SIGTERM, and ignores a terminal's Ctrl-C and hang-up,
    which reach the whole group: the supervisor decides what they mean.
    """
    parent_pid = os.getpid()
    _flush()  # else what is buffered would be written twice
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # our handlers must not run in the child
    try:
        pid = os.fork()
        if pid == 0:
            _live(body, parent_pid, mask)
        return pid
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def reap(pid: int) -> int | None:
    """Answer None while the child runs, else how it ended: its status, or minus the signal; asked once after that."""
    ended, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if ended else None


def ending(code: int) -> str:
    """Answer how a child ended, in words."""
    if code >= 0:
        return f"status {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"


def _live(body: Callable[[], int], parent_pid: int, mask: set[signal.Signals | int]) -> None:
    """Be the child; never returns, so that nothing of the supervisor's stack is ever run twice."""
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
    """Give up the supervisor's way of taking signals for a child's."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _flush() -> None:
    """Write out what is buffered, to whoever still reads."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
