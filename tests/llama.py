"""Real llama.cpp servers below a test, on the tiny model: each a process of its own, that can be killed.

They answer thousands of tokens a second; a `FaultNode` that drips, with one of them as its upstream, makes it slow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.served import wait_until
from tests.tiny_gguf import write_tiny_gguf

MODEL = "tiny-reciter"
START_SECONDS = 60.0
# llama.cpp's own server; it says where it listens and goes on until it is ended.
_SERVER = """
import signal, sys, xllamacpp
path, name, tells, embeds = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = path, {name}
params.hostnames, params.port, params.n_ctx, params.n_parallel = ["127.0.0.1"], 0, 2048, 2
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.endpoint_metrics = params.endpoint_slots = tells == "True"
if embeds == "True":
    params.embedding = True
    params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
server = xllamacpp.Server(params)
print("listens on", server.listening_address, flush=True)
signal.pause()
"""


class Llama(NamedTuple):
    """A server that listens at `url`, without /v1."""

    process: subprocess.Popen[bytes]
    url: str

    def kill(self) -> None:
        """End it as kill -9 does."""
        self.process.kill()
        self.process.wait()


@contextmanager
def llama_server(folder: Path, *, tells: bool = True, embeds: bool = False, model: str = MODEL) -> Iterator[Llama]:
    """Run a server. `tells`: with /metrics and /slots; `embeds`: it answers embeddings, and chats besides."""
    with llama_servers(folder, 1, tells=tells, embeds=embeds, model=model) as (llama,):
        yield llama


@contextmanager
def llama_servers(
    folder: Path, count: int, *, tells: bool = True, embeds: bool = False, model: str = MODEL
) -> Iterator[list[Llama]]:
    """Run several servers, which start side by side."""
    write_tiny_gguf(folder / "tiny.gguf", model)
    command = [sys.executable, "-c", _SERVER, str(folder / "tiny.gguf"), model, str(tells), str(embeds)]
    outputs = [folder / f"llama-{model}-{number}" for number in range(count)]
    with ExitStack() as stack:
        processes = [stack.enter_context(running(output, command)) for output in outputs]
        yield [
            Llama(process, said(output, process, r"listens on (\S+)\n"))
            for output, process in zip(outputs, processes, strict=True)
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
    """Wait until a process says something that matches; answer the group of the match."""
    wait_until(lambda: process.poll() is not None or _found(output, pattern) is not None, START_SECONDS)
    found = _found(output, pattern)
    assert found is not None, output.read_text(errors="replace")
    return found


def _found(output: Path, pattern: str) -> str | None:
    found = re.search(pattern, output.read_text(errors="replace"))
    return found[1] if found else None
