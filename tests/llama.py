"""Real llama.cpp servers below a test, on the tiny model: each a process of its own, that can be killed.

They answer thousands of tokens a second; a `FaultNode` that drips, with one of them as its upstream, makes it slow.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from demo.llama_cpp import LISTENS, server_command
from demo.llama_cpp import MODEL as MODEL
from demo.tiny_gguf import write_tiny_gguf
from tests.lucid_serve import wait_until

START_SECONDS = 60.0


class Llama(NamedTuple):
    """A server that listens at `url`, without /v1."""

    process: subprocess.Popen[bytes]
    url: str

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def llama_server(
    folder: Path, *, tells: bool = True, embeds: bool = False, ranks: bool = False, model: str = MODEL
) -> Iterator[Llama]:
    """Run a server. `tells`: with /metrics and /slots; `embeds`: it answers embeddings, and chats besides; `ranks`: it
    ranks documents, and does nothing else.
    """
    with llama_servers(folder, 1, tells=tells, embeds=embeds, ranks=ranks, model=model) as (llama,):
        yield llama


@contextmanager
def llama_servers(
    folder: Path,
    count: int,
    *,
    tells: bool = True,
    embeds: bool = False,
    ranks: bool = False,
    model: str = MODEL,
) -> Iterator[list[Llama]]:
    """Run several servers, which start side by side."""
    write_tiny_gguf(folder / "tiny.gguf", model)
    command = server_command(folder / "tiny.gguf", model=model, tells=tells, embeds=embeds, ranks=ranks)
    outputs = [folder / f"llama-{model}-{number}" for number in range(count)]
    with ExitStack() as stack:
        processes = [stack.enter_context(running(output, command)) for output in outputs]
        yield [
            Llama(process, said(output, process, LISTENS)) for output, process in zip(outputs, processes, strict=True)
        ]


@contextmanager
def running(output: Path, command: list[str], **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a process whose words go to a file, and end it with the block if it still runs."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={"PATH": os.defpath, **environment},
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def said(output: Path, process: subprocess.Popen[bytes], pattern: str) -> str:
    """Wait until a process says something that matches; return the group of the match."""
    wait_until(lambda: process.poll() is not None or _found(output, pattern) is not None, START_SECONDS)
    found = _found(output, pattern)
    assert found is not None, output.read_text(errors="replace")
    return found


def _found(output: Path, pattern: str) -> str | None:
    found = re.search(pattern, output.read_text(errors="replace"))
    return found[1] if found else None
