"""Nodes that die and come back: the gateway benchmark's backend, a process for each, killed and started on its port."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.servers import LOAD_CORE, on_core

BACKLOG = 2048


class MortalNode:
    """One node's process on a port that stays its own."""

    def __init__(self) -> None:
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def is_alive(self) -> bool:
        """Return whether the node runs."""
        return self._process is not None

    def start(self) -> None:
        """Start it, on the port that it had."""
        with socket.create_server(("127.0.0.1", self.port), backlog=BACKLOG) as listener, on_core(LOAD_CORE):
            self.port = int(listener.getsockname()[1])
            command = [sys.executable, "-m", "benchmarks.gateway_backend", str(listener.fileno())]
            self._process = subprocess.Popen(command, pass_fds=[listener.fileno()])

    def kill(self) -> None:
        """End it as a power cut would: what it was answering breaks off, and nothing listens on its port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def mortal_nodes(count: int) -> Iterator[Sequence[MortalNode]]:
    """Run so many nodes for as long as the block runs."""
    nodes: list[MortalNode] = []
    try:
        nodes += [MortalNode() for _ in range(count)]
        yield nodes
    finally:
        for node in nodes:
            node.kill()
