"""Where the demo takes place: a temporary folder, the processes that were started in it, and the end of both."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from demo.children import POLL_SECONDS, Child
from lucid_compute.postgres.embedded import remove_cluster
from lucid_compute.postgres.embedded.processes import processes_of

LUCID = Path(sys.executable).with_name("lucid")
END_SECONDS = 10.0  # longer than any of them takes; then it is killed


class Stage:
    """Owns a folder and processes; `clear` leaves nothing of them."""

    def __init__(self) -> None:
        """Make the folder: others may pass through it, as the Postgres user of a demo that root runs has to."""
        self.folder = Path(tempfile.mkdtemp(prefix="lucid-demo-"))
        self.folder.chmod(0o711)
        self.data_dir = self.folder / "data"
        self.words = self.folder / "words"  # of the processes: the service's tell the admin key
        self.words.mkdir(mode=0o700)
        self.is_hasty = False
        self._children: list[Child] = []

    def start(
        self, name: str, command: Sequence[str | Path], *, death_signal: int = signal.SIGKILL, **environment: str
    ) -> Child:
        """Start a process that is to run until the demo ends; the first one that is started is ended last."""
        output = self.words / f"{len(self._children):03}"
        child = Child(name, output, command, environment, death_signal)
        self._children.append(child)
        return child

    def lucid(self, arguments: Sequence[str], url: str) -> Child:
        """Start a command of `lucid` that ends by itself, as a person does beside the data folder."""
        command = self.start(
            " ".join(("lucid", *arguments)),
            [LUCID, *arguments],
            LUCID_API_URL=url,
            LUCID_DATA_DIR=str(self.data_dir),
        )
        command.may_end = True
        return command

    async def watch(self) -> None:
        """Go on until a process ends that should not have.

        Raises:
            DemoFailed: it did.
        """
        while True:
            for child in self._children:
                if not child.may_end and child.status is not None:
                    raise child.fault()
            await asyncio.sleep(POLL_SECONDS)

    async def clear(self) -> None:
        """End every process and remove the folder; `is_hasty` kills what does not end at once.

        Agents tell the service that they leave, so it ends after all others.
        """
        await self._end(self._children[1:])
        await self._end(self._children[:1])
        await self._end_postgres()
        with suppress(OSError):
            remove_cluster(self.data_dir)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _end(self, children: Sequence[Child]) -> None:
        """End these side by side, and those that take too long as kill -9 does."""
        for child in children:
            child.send(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while any(child.status is None for child in children):
            if self.is_hasty or time.monotonic() > deadline:
                for child in children:
                    child.kill()
            await asyncio.sleep(POLL_SECONDS)

    async def _end_postgres(self) -> None:
        """Wait for the Postgres of a service that was killed: it ends by itself, or is made to."""
        cluster = (self.data_dir / "postgres").resolve()
        deadline = time.monotonic() + END_SECONDS
        while left := processes_of(cluster):
            if time.monotonic() > deadline:
                for pid in left:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(POLL_SECONDS)
