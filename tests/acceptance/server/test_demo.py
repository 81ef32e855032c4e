"""`make demo`, shortened: what it tells happens in order, no client sees an error, and nothing of it is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import ROOT
from tests.llama import running, said
from tests.lucid_serve import folder, wait_until

DEMO = [sys.executable, "-m", "demo", "--minutes", "0.3"]
ORDER = ["KILLED", "UNHEALTHY", "DRAINING", "DRAINED", "RETURNED", "HEALTHY", "RESUMED", "SERVING", "SERVING"]
LONGEST_SECONDS = 120.0  # on a machine that runs other tests


class Running:
    """A demo that runs: its processes and its folder are all below `place`, or name it."""

    def __init__(self, place: Path, output: Path, process: subprocess.Popen[bytes]) -> None:
        """Hold a demo whose words go to `output`."""
        self.place, self.process, self._output = place, process, output

    @property
    def words(self) -> str:
        """What it has said."""
        return self._output.read_text()

    def says(self, pattern: str) -> str:
        """Wait until it says something that matches; return the group of the match."""
        return said(self._output, self.process, pattern)

    def ends(self) -> int:
        """Return its exit status."""
        return self.process.wait(LONGEST_SECONDS)

    def processes(self) -> dict[int, str]:
        """Return the processes that know its folder, by their command or their environment, beside itself."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                command = (entry / "cmdline").read_bytes()
                if str(self.place).encode() in command + (entry / "environ").read_bytes():
                    found[int(entry.name)] = command.replace(b"\0", b" ").decode(errors="replace")
        found.pop(self.process.pid, None)
        return found

    def child_of(self, words: str) -> int:
        """Return a process that the demo itself started, whose command holds the words."""
        parents = {
            pid: int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in self.processes()
        }
        return next(
            pid
            for pid, command in self.processes().items()
            if parents.get(pid) == self.process.pid and words in command
        )

    def left_nothing(self) -> None:
        """Fail if a process or a folder is left."""
        assert not self.processes()
        assert list(self.place.glob("lucid-*")) == []


@pytest.fixture
def demo() -> Iterator[Running]:
    """A shortened demo that has just been started, as `make demo` starts it, with a temporary folder of its own."""
    with folder() as place:
        output = place / "output"
        with running(output, DEMO, TMPDIR=str(place), PYTHONPATH=str(ROOT)) as process:
            demo = Running(place, output, process)
            yield demo
        for pid in demo.processes():  # a failed test's: those that it complained of
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_the_demo_tells_its_story_without_an_error_and_the_figures_reconcile(demo: Running) -> None:
    """A node dies, another is drained, both come back; clients see no error; clients, ledger and metrics agree."""
    assert demo.ends() == 0, demo.words
    demo.left_nothing()
    told = re.findall(r"^\d\d:\d\d  ([A-Z]{2,}) ", demo.words, re.MULTILINE)
    assert told == ORDER
    assert re.search(r"errors seen by clients +none\n", demo.words), demo.words
    assert "Clients, job ledger and metrics reconcile." in demo.words
    assert "is drained: safe to stop." in demo.words
    answered = re.search(r"requests answered +([\d,]+)", demo.words)
    assert answered
    assert int(answered[1].replace(",", "")) > 50
    for refusal in ("404 MODEL_NOT_FOUND", "503 MODEL_UNAVAILABLE", "400 by the node", "429 RATE_LIMITED"):
        assert refusal in demo.words.split("rightly", 1)[1]


@pytest.mark.parametrize(("after", "number"), [("Starting", signal.SIGTERM), ("KILLED", signal.SIGINT)])
def test_a_signal_ends_the_demo_and_everything_that_it_started(
    demo: Running, after: str, number: signal.Signals
) -> None:
    """While it starts, and in the middle of its story."""
    demo.says(f"({after})")
    demo.process.send_signal(number)
    assert demo.ends() == 128 + number, demo.words
    demo.left_nothing()


def test_ctrl_c_before_anything_runs_is_an_end_and_no_traceback(tmp_path: Path) -> None:
    """What it imports takes more than a second."""
    output = tmp_path / "output"
    with running(output, [sys.executable, "-X", "importtime", *DEMO[1:]], PYTHONPATH=str(ROOT)) as process:
        said(output, process, r"(\| +httpx\._types)")
        process.send_signal(signal.SIGINT)
        assert process.wait(LONGEST_SECONDS) == -signal.SIGINT
    assert "Traceback" not in output.read_text()


def test_a_second_signal_ends_it_at_once(demo: Running) -> None:
    """Without waiting for agents that drain and a service that stops; nothing is left all the same."""
    demo.says("(requests flow)")
    demo.process.send_signal(signal.SIGINT)
    demo.says("(SIGINT)")
    demo.process.send_signal(signal.SIGINT)
    assert demo.ends() == 128 + signal.SIGINT, demo.words
    demo.left_nothing()


@pytest.mark.parametrize("whose", ["lucid serve", "lucid agent run"])
def test_a_process_that_crashes_ends_the_demo_with_a_sentence(demo: Running, whose: str) -> None:
    """Of the service and of an agent alike."""
    demo.says("(requests flow)")
    os.kill(demo.child_of(whose), signal.SIGKILL)
    assert demo.ends() == 1, demo.words
    assert re.search(r"The demo can't go on: .+ ended with status -9", demo.words), demo.words
    demo.left_nothing()


def test_killed_it_leaves_no_process(demo: Running) -> None:
    """The kernel tells those that it started; the folder stays, for nobody is there to remove it."""
    demo.says("(requests flow)")
    demo.process.kill()
    demo.ends()
    wait_until(lambda: not demo.processes(), 30.0)
