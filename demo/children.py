"""The demo's processes: none outlives it, however it ends, and one that ends by itself is noticed."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from lucid_compute.postgres.embedded import launcher

POLL_SECONDS = 0.05
START_SECONDS = 60.0
LAST_WORDS = 5


class DemoFailed(Exception):
    """The demo can't go on; the text says why."""


class Child:
    """One process. Its words go to a file; the kernel sends it `death_signal` if the demo is killed."""

    def __init__(
        self,
        name: str,
        output: Path,
        command: Sequence[str | Path],
        environment: Mapping[str, str],
        death_signal: int,
    ) -> None:
        """Start it, in a session of its own, so that a terminal's Ctrl-C reaches the demo alone."""
        self.name = name
        self.may_end = False
        self._output = output
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [*_launched(death_signal), *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"PATH": os.defpath, "HOME": str(output.parent), **environment},
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def words(self) -> str:
        """What it has said."""
        return self._output.read_text(errors="replace")

    def fault(self) -> DemoFailed:
        """Return what to say when it ended by itself."""
        last = "\n".join(self.words.splitlines()[-LAST_WORDS:])
        return DemoFailed(f"{self.name} (process {self.pid}) ended with status {self.status}. It said last:\n{last}")

    async def says(self, pattern: str) -> str:
        """Wait until it says something that matches; return the group of the match.

        Raises:
            DemoFailed: it ended, or took too long.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            has_ended = self.status is not None
            if found := re.search(pattern, self.words):
                return found[1]
            if has_ended:
                raise self.fault()
            if time.monotonic() > deadline:
                raise DemoFailed(f"{self.name} did not start within {START_SECONDS:g} s:\n{self.words}")
            await asyncio.sleep(POLL_SECONDS)

    async def ends(self) -> int:
        """Wait until it has ended; return its exit status."""
        while (status := self.status) is None:  # noqa: ASYNC110 - nothing sets an event when a process ends
            await asyncio.sleep(POLL_SECONDS)
        return status

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        self.may_end = True
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.send(signal.SIGKILL)
        self._process.wait()


def _launched(death_signal: int) -> list[str]:
    """Return what stands before a command so that it gets the signal when this thread, the demo's only one, ends."""
    me, stay = str(os.getpid()), str(launcher.STAY)
    return [sys.executable, launcher.__file__, me, str(int(death_signal)), stay, stay]
