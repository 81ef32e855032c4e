"""A real `lucid agent run` below a test: the console script, its words in a file, stopped or killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.llama import running, said
from tests.served import LUCID, wait_until

STOP_SECONDS = 30.0
ROOT = str(Path(__file__).parents[1])


class AgentProcess:
    """One agent that runs."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        """Hold a process whose words go to `output`."""
        self.process = process
        self._output = output

    @property
    def log(self) -> str:
        """What it has said."""
        return self._output.read_text(errors="replace")

    def says(self, pattern: str) -> str:
        """Wait until it says something that matches; answer the group of the match."""
        return said(self._output, self.process, pattern)

    def says_in_time(self, words: str, seconds: float = 30.0) -> None:
        """Wait until it says these words."""
        wait_until(lambda: words in self.log, seconds)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal, and answer the exit status."""
        self.process.send_signal(number)
        return self.ends()

    def ends(self) -> int:
        """Wait until it ends; answer its exit status."""
        return self.process.wait(STOP_SECONDS)

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def agent(
    folder: Path, api: str, key: str, url: str, *options: str, command: Sequence[str | Path] = (LUCID,)
) -> Iterator[AgentProcess]:
    """Run an agent for the server at `url`, with 2 GB for models and under the name `this machine`."""
    output = folder / f"agent-{sum(1 for _ in folder.glob('agent-*'))}"
    told = ["--url", url, "--api", api, "--vram", "2GB", "--name", "this machine", *options]
    with running(output, [*map(str, command), "agent", "run", *told], LUCID_API_KEY=key, PYTHONPATH=ROOT) as process:
        yield AgentProcess(process, output)


def python_that(prepares: str) -> Sequence[str]:
    """Answer a command that is `lucid` after some Python was run in its process."""
    return (sys.executable, "-c", f"{prepares}\nfrom lucid_compute.cli.main import main\nmain()")
