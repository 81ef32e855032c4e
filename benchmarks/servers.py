"""The measured servers: a real `lucid serve` on its embedded Postgres, and the bare app, each on one core."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import lucid_compute
from lucid_compute.compilation import find_build
from lucid_compute.postgres.embedded import EmbeddedPostgres

ADMIN_KEY = "an-admin-key-for-the-benchmarks"
START_TIMEOUT_SECONDS = 120.0
QUIET_SHARE = 0.9
_LISTENS = re.compile(r"listens on http://127\.0\.0\.1:(\d+)")


def _cores() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


SERVER_CORE, LOAD_CORE = (_cores()[0], _cores()[1]) if len(_cores()) > 1 else (None, None)


def pin(pid: int, core: int | None) -> None:
    """Keep a process on one core; without two cores, or on a system without affinities, change nothing."""
    if core is not None:
        os.sched_setaffinity(pid, {core})


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Start processes on one core for as long as the block runs: they inherit it. None changes nothing."""
    if core is None:
        yield
        return
    previous = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, previous)


def describe_cores() -> str:
    """Return a text that says which process runs on which core."""
    if SERVER_CORE is None:
        return "nothing is pinned: this machine has one core, or can't pin"
    return f"server worker on core {SERVER_CORE}; load and Postgres on core {LOAD_CORE}"


def forms() -> dict[str, str]:
    """Return the forms in which the service can be measured, with the value of LUCID_COMPILED for each."""
    found, reason = find_build(sys.prefix, Path(lucid_compute.__file__).parent)
    if found is not None:
        return {"interpreted": "false", "compiled": "true"}
    print(f"the compiled service is left out: {reason}; make compile compiles it", flush=True)
    return {"interpreted": "false"}


@dataclass(frozen=True)
class Server:
    """A running server: where it is, the process that answers, and how long it took to be ready."""

    port: int
    worker_pid: int
    start_seconds: float = 0.0

    def memory_mb(self) -> float:
        """Return the resident memory of the serving process."""
        status = Path(f"/proc/{self.worker_pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        return int(match[1]) / 1024 if match else float("nan")

    def cpu_seconds(self) -> float:
        """Return the processor time that the process has used so far."""
        fields = Path(f"/proc/{self.worker_pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def call(self, method: str, path: str, body: Any = None, key: str = ADMIN_KEY) -> Any:
        """Make one request, and return the JSON that it is answered."""
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{self.port}{path}", data, headers, method=method)
        with urlopen(request, timeout=30) as answer:  # noqa: S310 - loopback
            return json.loads(answer.read())

    def make_key(self, owner: str) -> str:
        """Return a new key with which the owner's nodes send heartbeats."""
        new = {"name": "benchmark", "owner": owner, "scopes": ["compute"]}
        return str(self.call("POST", "/keys", new)["key"])


@contextmanager
def data_folder() -> Iterator[Path]:
    """A folder for one embedded Postgres, gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="lucid-bench-"))
    try:
        yield folder
    finally:
        with suppress(OSError):
            shutil.rmtree((folder / "postgres").resolve())
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def postgres_of(folder: Path) -> Iterator[str]:
    """Run the Postgres of a data folder alone, without the service; return its URL."""
    with EmbeddedPostgres(folder) as postgres:
        yield postgres.url()


@contextmanager
def lucid_serve(folder: Path, **settings: str) -> Iterator[Server]:
    """Run `lucid serve` with one worker on the data folder; settings are LUCID_… variables, in lower case."""
    own = {f"LUCID_{name.upper()}": value for name, value in settings.items()}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUCID_")}
    environment.update({"LUCID_BOOTSTRAP_ADMIN_KEY": ADMIN_KEY, "LUCID_LOG_LEVEL": "WARNING", **own})
    command = [str(Path(sys.executable).with_name("lucid")), "serve", "--port", "0", "--data-dir", str(folder)]
    began = time.monotonic()
    with on_core(LOAD_CORE):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        port = _read_port(process)
        took = time.monotonic() - began
        worker = _worker_of(process.pid)
        pin(worker, SERVER_CORE)
        yield Server(port, worker, took)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        if process.stdout:
            process.stdout.close()


@contextmanager
def bare_server() -> Iterator[Server]:
    """Run the bare app."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    descriptor = listener.fileno()
    command = [sys.executable, "-m", "benchmarks.bare_app", str(descriptor)]
    with on_core(SERVER_CORE):
        process = subprocess.Popen(command, pass_fds=[descriptor])
    try:
        server = Server(listener.getsockname()[1], process.pid)
        wait_until(lambda: _answers(server.port))
        yield server
    finally:
        listener.close()
        process.terminate()
        process.wait(60)


def wait_until(condition: Callable[[], bool], timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
    """Wait until the condition holds.

    Raises:
        TimeoutError: it does not within `timeout_seconds`.
    """
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def wait_for_quiet(timeout_seconds: float = 15.0) -> None:
    """Wait until nothing else keeps this machine busy, at most `timeout_seconds`."""
    with suppress(TimeoutError):
        wait_until(_is_quiet, timeout_seconds)


def _is_quiet() -> bool:
    """Return whether the cores were idle nearly all of half a second."""
    before = _ticks()
    time.sleep(0.5)
    spent = [after - earlier for earlier, after in zip(before, _ticks(), strict=True)]
    return sum(spent[3:5]) > QUIET_SHARE * sum(spent)


def _ticks() -> list[int]:
    """Return the time that all cores spent: user, nice, system, idle, waiting for I/O and so on (proc(5))."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]


def _answers(port: int) -> bool:
    with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/2", timeout=5):
        return True
    return False


def _read_port(process: subprocess.Popen[str]) -> int:
    """Read the banner, which comes when the service is ready; return its port."""
    port = 0
    for line in process.stdout or ():
        if match := _LISTENS.search(line):
            port = int(match[1])
        if line.lstrip().startswith("try"):
            return port
    message = f"lucid serve ended with status {process.wait()} before it was ready"
    raise RuntimeError(message)


def _worker_of(supervisor_pid: int) -> int:
    """Return the forked child of the supervisor, whose command line is the supervisor's."""
    children = Path(f"/proc/{supervisor_pid}/task/{supervisor_pid}/children").read_text().split()
    command = Path(f"/proc/{supervisor_pid}/cmdline").read_bytes()
    return next(int(pid) for pid in children if Path(f"/proc/{pid}/cmdline").read_bytes() == command)
