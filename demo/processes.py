"""The demo's processes: the service, inference servers, agents and commands. None of them outlives the demo."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from demo.llama_cpp import LISTENS, MODEL, server_command
from demo.tiny_gguf import write_tiny_gguf
from lucid_compute.postgres.embedded import launcher, remove_cluster
from lucid_compute.postgres.embedded.processes import processes_of

LUCID = Path(sys.executable).with_name("lucid")
POLL_SECONDS = 0.05
START_SECONDS = 60.0
END_SECONDS = 10.0  # longer than any of them takes to end; then it is killed
LAST_LINES = 5
SLOTS = 8  # two nodes may be away, and the third one takes all requests
DRAIN_SECONDS = "3"


class DemoFailed(Exception):
    """The demo can't go on; the text says why."""


class Process:
    """One process, with its output in a file. The kernel sends it `death_signal` if the demo is killed."""

    def __init__(
        self, name: str, output: Path, command: Sequence[str | Path], environment: dict[str, str], death_signal: int
    ) -> None:
        """Start it in a session of its own, so that a terminal's Ctrl-C reaches only the demo."""
        self.name = name
        self.may_end = False
        self._output = output
        stay = str(launcher.STAY)
        launched = [sys.executable, launcher.__file__, str(os.getpid()), str(int(death_signal)), stay, stay]
        with output.open("wb") as file:
            self._process = subprocess.Popen(
                [*launched, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={"PATH": os.defpath, "HOME": str(output.parent), **environment},
                start_new_session=True,
            )
        self.pid = self._process.pid

    @property
    def status(self) -> int | None:
        """Its exit status; None while it runs."""
        return self._process.poll()

    @property
    def output(self) -> str:
        """All its output so far."""
        return self._output.read_text(errors="replace")

    def fault(self) -> DemoFailed:
        """Return the error for a process that ended unexpectedly."""
        last = "\n".join(self.output.splitlines()[-LAST_LINES:])
        return DemoFailed(f"{self.name} (process {self.pid}) ended with status {self.status}. It said last:\n{last}")

    async def wait_for(self, pattern: str) -> str:
        """Wait until its output matches; return the group of the match.

        Raises:
            DemoFailed: it ended, or START_SECONDS are over.
        """
        deadline = time.monotonic() + START_SECONDS
        while True:
            has_ended = self.status is not None
            if match := re.search(pattern, self.output):
                return match[1]
            if has_ended:
                raise self.fault()
            if time.monotonic() > deadline:
                raise DemoFailed(f"{self.name} did not start within {START_SECONDS:g} s:\n{self.output}")
            await asyncio.sleep(POLL_SECONDS)

    def send(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        self.may_end = True
        with suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.send(signal.SIGKILL)
        self._process.wait()


class Processes:
    """A temporary folder and the processes started in it; `clear` removes all of them."""

    def __init__(self) -> None:
        """Create the folder. Others may pass through it: the Postgres of a demo that root runs has another user."""
        self.folder = Path(tempfile.mkdtemp(prefix="lucid-demo-"))
        self.folder.chmod(0o711)
        self.data_dir = self.folder / "data"
        self._outputs = self.folder / "outputs"
        self._outputs.mkdir(mode=0o700)  # the service prints the admin key
        self.is_hasty = False  # kill what does not end at once
        self._started: list[Process] = []
        write_tiny_gguf(self.folder / "tiny.gguf", MODEL)

    def start(
        self, name: str, command: Sequence[str | Path], *, death_signal: int = signal.SIGKILL, **environment: str
    ) -> Process:
        """Start a process. The first one, the service, is ended last."""
        process = Process(name, self._outputs / f"{len(self._started):03}", command, environment, death_signal)
        self._started.append(process)
        return process

    async def run_lucid(self, url: str, *arguments: str) -> str:
        """Run a command of `lucid` to its end, as a person does; return the last line of its output.

        Raises:
            DemoFailed: the command failed.
        """
        name, data_dir = " ".join(("lucid", *arguments)), str(self.data_dir)
        command = self.start(name, [LUCID, *arguments], LUCID_API_URL=url, LUCID_DATA_DIR=data_dir)
        command.may_end = True
        while command.status is None:  # noqa: ASYNC110 - no event tells that a process ended
            await asyncio.sleep(POLL_SECONDS)
        if command.status != 0:
            raise command.fault()
        return command.output.splitlines()[-1]

    async def watch(self) -> None:
        """Run until a process ends unexpectedly.

        Raises:
            DemoFailed: a process ended.
        """
        while True:
            for process in self._started:
                if not process.may_end and process.status is not None:
                    raise process.fault()
            await asyncio.sleep(POLL_SECONDS)

    async def clear(self) -> None:
        """End every process and remove the folder. Agents end first, because they deregister at the service."""
        await self._end(self._started[1:])
        await self._end(self._started[:1])
        await self._end_postgres()
        with suppress(OSError):
            remove_cluster(self.data_dir)
        shutil.rmtree(self.folder, ignore_errors=True)

    async def _end(self, processes: Sequence[Process]) -> None:
        for process in processes:
            process.send(signal.SIGTERM)
        deadline = time.monotonic() + END_SECONDS
        while any(process.status is None for process in processes):
            if self.is_hasty or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            await asyncio.sleep(POLL_SECONDS)

    async def _end_postgres(self) -> None:
        """Wait for the Postgres of a service that was killed; kill it if it does not end."""
        deadline = time.monotonic() + END_SECONDS
        while left := processes_of((self.data_dir / "postgres").resolve()):
            for pid in left if time.monotonic() > deadline else ():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(POLL_SECONDS)


@dataclass
class Node:
    """An inference server, which can be killed and started again on the same port, and the agent beside it."""

    processes: Processes
    name: str
    region: str
    price_per_1k_tokens: str
    is_outbound: bool = False
    id: str = ""
    port: int = 0

    def start_server(self) -> None:
        """Start the inference server; port 0 takes a free one."""
        command = server_command(self.processes.folder / "tiny.gguf", port=self.port, slots=SLOTS, embeds=True)
        self.server = self.processes.start(f"the inference server of {self.name}", command)

    async def server_url(self) -> str:
        """Wait until the inference server listens; return its URL."""
        url = await self.server.wait_for(LISTENS)
        self.port = urlsplit(url).port or 0
        return url

    async def start_agent(self, api: str, key: str) -> None:
        """Start the agent, as a provider does."""
        options = {
            "--url": await self.server_url(),
            "--api": api,
            "--name": self.name,
            "--region": self.region,
            "--price-per-1k-tokens": self.price_per_1k_tokens,
            "--gpu": "none: a processor",
            "--vram": "2GB",
            "--drain-seconds": DRAIN_SECONDS,
        }
        arguments = [word for option in options.items() for word in option]
        if self.is_outbound:
            arguments.append("--outbound")
        self.processes.start(f"the agent of {self.name}", [LUCID, "agent", "run", *arguments], LUCID_API_KEY=key)
