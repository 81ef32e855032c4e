"""What the gateway benchmark compares, over one backend of two ports: no router, and `lucid serve`."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from benchmarks.gateway_backend import MODEL
from benchmarks.servers import LOAD_CORE, Server, data_folder, lucid_serve, on_core, wait_until

NODES = 2
HEARTBEAT_SECONDS = 9.0
SETTLE_SECONDS = 20.0  # smg asks its nodes for their models first
NO_KEY = "a-key-that-nobody-asks-for"


class Skipped(Exception):
    """Why there is no such target in this run."""


class Target(NamedTuple):
    """Where load goes, with which key, and the processes that route it; the first of them answers."""

    ports: Sequence[int]
    key: str = NO_KEY
    processes: Sequence[Server] = ()

    def cpu_seconds(self) -> float:
        """Return the processor time that routing has taken so far."""
        return sum(process.cpu_seconds() for process in self.processes)

    def memory_mb(self) -> list[float]:
        """Return the resident memory of each process."""
        return [process.memory_mb() for process in self.processes]


def request_for(key: str, *, content: str = "Say something.", stream: bool = False) -> str:
    """Return the bytes of one chat completion's request; `paced` in the content asks for a slow stream."""
    messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": content}]
    body = json.dumps({"model": MODEL, "messages": messages, "max_tokens": 256, "stream": stream})
    return (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    )


@contextmanager
def backend() -> Iterator[list[int]]:
    """Run the backend beside the load; return its ports, one for each node."""
    with ExitStack() as stack:
        listeners = [stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=2048)) for _ in range(NODES)]
        descriptors = [listener.fileno() for listener in listeners]
        command = [sys.executable, "-m", "benchmarks.gateway_backend", *map(str, descriptors)]
        with on_core(LOAD_CORE):
            process = subprocess.Popen(command, pass_fds=descriptors)
        try:
            yield [listener.getsockname()[1] for listener in listeners]
        finally:
            process.terminate()
            process.wait(60)


@contextmanager
def lucid(ports: Sequence[int], **settings: str) -> Iterator[Target]:
    """Run `lucid serve` with a node for each port, which sends heartbeats until the end; settings as `lucid_serve`'s.

    Raises:
        Skipped: this build has no gateway, or it does not route.
    """
    with data_folder() as folder, lucid_serve(folder, **settings) as server:
        nodes = [_register(server, port) for port in ports]
        server.call("POST", "/passports", {"name": MODEL, "type": "model", "metadata": {"format": "gguf"}})
        new = {"name": "benchmark", "owner": "acme", "scopes": ["inference:run"]}
        key = str(server.call("POST", "/keys", new)["key"])
        with _heartbeats(server, nodes):
            if said := first_refusal(server.port, key):
                raise Skipped(said)
            yield Target([server.port], key, [server, Server(server.port, _parent_of(server.worker_pid))])


def _register(server: Server, port: int) -> str:
    """Register a node at the port; return its id."""
    metadata = {"gpu": "none", "vram": "80GB", "runtimes": ["llama.cpp"], "inferenceUrl": f"http://127.0.0.1:{port}/v1"}
    return str(
        server.call("POST", "/passports", {"name": f"node-{port}", "type": "compute", "metadata": metadata})["id"]
    )


def beat_once(server: Server, nodes: list[str]) -> None:
    """Send a heartbeat of each node."""
    for node in nodes:
        report = {"passportId": node, "status": "healthy", "load": 0.1, "availableModels": [MODEL], "queueDepth": 0}
        server.call("POST", "/compute/heartbeat", report)


@contextmanager
def _heartbeats(server: Server, nodes: list[str]) -> Iterator[None]:
    """Keep the nodes fresh for as long as the block runs; the first heartbeats are there when it begins."""
    is_over = threading.Event()

    def go_on() -> None:
        while not is_over.wait(HEARTBEAT_SECONDS):
            beat_once(server, nodes)

    beat_once(server, nodes)
    thread = threading.Thread(target=go_on)
    with on_core(LOAD_CORE):
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def first_refusal(port: int, key: str) -> str:
    """Return the refusal of a completion after a few tries; nothing once one succeeds."""
    said = ""

    def is_settled() -> bool:
        nonlocal said
        said = _refusal(port, key)
        return not said

    with suppress(TimeoutError):
        wait_until(is_settled, SETTLE_SECONDS)
    return said


def _refusal(port: int, key: str) -> str:
    head, body = request_for(key).split("\r\n\r\n", 1)
    headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:])
    request = Request(f"http://127.0.0.1:{port}/v1/chat/completions", body.encode(), headers)
    try:
        with urlopen(request, timeout=10):  # noqa: S310 - loopback
            return ""
    except HTTPError as error:
        said = error.read(200).decode(errors="replace").strip()
        return f"POST /v1/chat/completions answers {error.code}: {said}"
    except OSError as error:
        return f"POST /v1/chat/completions is not answered: {error}"


def _parent_of(pid: int) -> int:
    match = re.search(r"^PPid:\s+(\d+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1])
