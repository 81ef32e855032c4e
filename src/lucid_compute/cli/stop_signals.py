"""How the supervisor is told to stop: noted while it watches, raised while it waits for something slow."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from lucid_compute.cli.child_processes import STOP_SIGNALS


class StopRequested(BaseException):
    """A stop signal came inside `StopSignals.interrupting`. No Exception, as KeyboardInterrupt is none."""


class StopSignals:
    """SIGTERM, SIGINT and SIGHUP (a closed terminal) until the end of the block; `received` has them in order."""

    def __init__(self) -> None:
        """Change nothing yet."""
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
            self._handlers[number] = signal.signal(number, self._note)
        self._handlers[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, lambda *_: None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    @contextmanager
    def interrupting(self, known: int = 0) -> Iterator[None]:
        """Have a signal raise StopRequested inside, also one that came before it, but for the first `known`."""
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

    def _note(self, number: int, _frame: FrameType | None) -> None:
        """Take one signal."""
        self.received.append(number)
        if self._interrupts:
            self._interrupts = False  # the next one must not break off the cleaning up
            raise StopRequested
