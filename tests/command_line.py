"""The real `lucid` below a test: as a script runs it, through pipes, and as a person does, on a terminal."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests import FORM
from tests.lucid_serve import LUCID, POLL_SECONDS

TIMEOUT_SECONDS = 30.0
_CODES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which is one JSON document."""
        return json.loads(self.out)

    @property
    def sentence(self) -> str:
        """What it complained of: one line on stderr, and nothing else anywhere."""
        assert not self.out, self.out
        assert self.err.startswith("lucid: ")
        assert self.err.count("\n") == 1, self.err
        return self.err.removeprefix("lucid: ").strip()


class CommandLine:
    """Runs `lucid` against one service with one key, in a folder of its own."""

    def __init__(self, url: str, key: str | None, folder: Path, **variables: str) -> None:
        """`key` None sets none; `variables` are more of the environment."""
        self.folder = folder
        self.environment = {"PATH": os.defpath, "HOME": str(folder), "LUCID_API_URL": url, **FORM, **variables}
        if key is not None:
            self.environment["LUCID_API_KEY"] = key

    async def __call__(self, *arguments: str, stdin: str = "", **variables: str) -> Ended:
        """Run it with pipes on all sides to its end."""
        process = await asyncio.create_subprocess_exec(
            LUCID,
            *arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=self.folder,
            env={**self.environment, **variables},
        )
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin.encode()), TIMEOUT_SECONDS)
        except TimeoutError:
            process.kill()
            await process.wait()
            raise
        assert process.returncode is not None
        assert "Traceback" not in err.decode(), err.decode()
        return Ended(process.returncode, out.decode(), err.decode())

    def on_terminal(self, *arguments: str, columns: int = 80, rows: int = 24, **variables: str) -> OnTerminal:
        """Run it on a terminal of that size; use it in a `with` block."""
        return OnTerminal(self, arguments, columns, rows, variables)


class OnTerminal:
    """`lucid` on a terminal: what it shows can be waited for, keys can be pressed."""

    def __init__(
        self, line: CommandLine, arguments: tuple[str, ...], columns: int, rows: int, variables: dict[str, str]
    ) -> None:
        self._line, self._arguments, self._size, self._variables = line, arguments, (rows, columns), variables
        self._seen = 0
        self.shown = ""

    def __enter__(self) -> Self:
        """Start it."""
        self._terminal, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *self._size, 0, 0))
        environment = {**self._line.environment, "TERM": "xterm-256color", **self._variables}
        self._process = subprocess.Popen(
            [LUCID, *self._arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=self._line.folder,
            env=environment,
        )
        os.close(theirs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        os.close(self._terminal)

    @property
    def text(self) -> str:
        """What was shown so far, without what moves the cursor or colours."""
        return _CODES.sub("", self.shown).replace("\r", "")

    async def shows(self, text: str) -> None:
        """Wait until it has shown the text, after what was waited for before."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (found := self.text.find(text, self._seen)) < 0:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.text!r}"
            assert self._read() or self._process.poll() is None, self.text
            await asyncio.sleep(POLL_SECONDS)
        self._seen = found + len(text)

    def press(self, keys: str) -> None:
        """Type."""
        os.write(self._terminal, keys.encode())

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        self._process.send_signal(signal.SIGINT)

    async def ends(self) -> int:
        """Return its exit status."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while self._process.poll() is None or self._read():
            assert time.monotonic() < deadline, self.text
            self._read()
            await asyncio.sleep(POLL_SECONDS)
        assert "Traceback" not in self.text, self.text
        assert self._process.returncode is not None
        return self._process.returncode

    def _read(self) -> bool:
        """Take what there is to read; return whether there was something."""
        if not select.select([self._terminal], [], [], 0)[0]:
            return False
        try:
            read = os.read(self._terminal, 65536)
        except OSError:  # the other side is closed
            return False
        self.shown += read.decode(errors="replace")
        return bool(read)
