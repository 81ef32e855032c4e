"""The life of `lucid serve` on real processes, around a service of three paths: what starts, dies, returns and ends."""

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
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from lucid_compute.postgres.embedded.processes import processes_of
from tests import ROOT
from tests.postgres import warm_starts

EVERY_ADDRESS = "0.0.0.0"  # noqa: S104 - what an operator may ask for
NO_DATABASE = "postgresql://nobody@192.0.2.1/none"  # the service below never asks it
SERVICE = ROOT / "tests" / "small_service.py"


class Serve:
    """One `lucid serve` below the test, in a process group of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        """Start it; its output goes to files, so that it never waits for a reader."""
        self.folder = folder
        self.output, self.errors = (Path(tempfile.mkstemp(dir=folder)[1]) for _ in range(2))
        variables = {"LUCID_PORT": "0", "LUCID_DATA_DIR": str(folder / "data"), "SYSTEM_DIR": str(folder)}
        with self.output.open("wb") as output, self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, SERVICE],
                stdout=output,
                stderr=errors,
                env={"PATH": os.defpath, "PYTHONPATH": os.pathsep.join(sys.path), **variables, **environment},
                start_new_session=True,
            )

    @property
    def url(self) -> str:
        """The address that the banner says."""
        match = re.search(r"listens on (\S+)", self.output.read_text())
        assert match, self.errors.read_text()
        return match[1]

    def ready(self) -> Serve:
        """Wait for the banner."""
        wait_until(lambda: self.process.poll() is not None or "try " in self.output.read_text(), 15)
        assert self.url
        return self

    def get(self, path: str = "/") -> str:
        """Return the body of a request, without a proxy and without keeping the connection."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.url + path, timeout=20) as response:
            body: bytes = response.read()
        return body.decode()

    def answers(self, path: str = "/") -> bool:
        """Return whether a request is answered."""
        try:
            return bool(self.get(path))
        except (OSError, urllib.error.URLError):
            return False

    def answers_without(self, worker: int) -> bool:
        """Return whether a request is answered by another worker than that one."""
        try:
            return int(self.get()) != worker
        except (OSError, urllib.error.URLError):
            return False

    def children(self) -> set[int]:
        """Return the processes below it that have not ended: workers and the postmaster."""
        return {pid for pid, parent in _living() if parent == self.process.pid}

    def postgres(self) -> set[int]:
        """Return every process of its Postgres."""
        return processes_of((self.folder / "data" / "postgres").resolve())

    def workers(self) -> set[int]:
        """Return its workers."""
        return self.children() - self.postgres()


@pytest.fixture
def serve() -> Iterator[Callable[..., Serve]]:
    """Return a starter of services on one data folder, all of them gone at the end."""
    folder = Path(tempfile.mkdtemp(prefix="lucid-test-"))
    folder.chmod(0o755)
    started: list[Serve] = []

    def start(**environment: str) -> Serve:
        started.append(Serve(folder, **environment))
        return started[-1]

    yield start
    for service in started:
        service.process.kill()
        service.process.wait()
    if (folder / "data" / "postgres").exists():
        wait_until(lambda: not started[0].postgres())
    shutil.rmtree(folder)


def wait_until(holds: Callable[[], bool], timeout_seconds: float = 10.0) -> None:
    """Return once it holds."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def _living() -> Iterator[tuple[int, int]]:
    """Yield every process that has not ended, with its parent; zombies that nobody reaps have."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, parent = file.read_text().rsplit(")", 1)[1].split()[:2]
            if state not in "ZX":
                yield int(file.parent.name), int(parent)


def is_gone(pids: set[int]) -> bool:
    """Return whether none of the processes runs."""
    return pids.isdisjoint(pid for pid, _ in _living())


def test_the_banner_says_where_it_is_and_how_to_call_it(serve: Callable[..., Serve]) -> None:
    """The first start shows the key, a later one where it is kept; the curl line carries it either way."""
    first = serve(LUCID_DATABASE_URL=NO_DATABASE).ready()
    banner = first.output.read_text()
    assert "lk_live_new (shown this once, kept in " in banner
    assert f"{first.url}/docs" in banner
    later = serve(LUCID_DATABASE_URL=NO_DATABASE, LUCID_HOST=EVERY_ADDRESS).ready()
    banner = later.output.read_text()
    assert f"kept in {later.folder}/data/admin.key" in banner
    assert "Warning: 0.0.0.0 can be reached from other machines" in banner
    for service in (first, later):
        line = service.output.read_text().split("try ")[1].split("\n")[0].strip()
        words = subprocess.run(["/bin/sh", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True)
        call = words.stdout.splitlines()
        assert call[:3] == ["curl", "-H", "Authorization: Bearer lk_live_new"]
        assert call[3] == service.url.replace(EVERY_ADDRESS, "127.0.0.1") + "/passports"


def test_sigterm_finishes_what_runs_and_exits_0(serve: Callable[..., Serve]) -> None:
    """New connections are refused, the running request is answered, and no process is left."""
    service = serve().ready()
    children = service.children()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(service.get, "/slow?1")
        time.sleep(0.3)  # it has to arrive
        service.process.terminate()
        wait_until(lambda: not service.answers())
        assert int(running.result()) in children
    assert service.process.wait(timeout=10) == 0
    assert is_gone(children)
    assert not service.postgres()
    assert service.errors.read_text() == ""


def test_ctrl_c_reaches_every_process_and_still_finishes_what_runs(serve: Callable[..., Serve]) -> None:
    """A terminal interrupts the whole group at once; that counts as one request to stop."""
    service = serve(LUCID_WORKERS="2").ready()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(service.get, "/slow?1")
        time.sleep(0.3)
        os.killpg(service.process.pid, signal.SIGINT)
        assert running.result()
    assert service.process.wait(timeout=10) == 0
    assert service.errors.read_text() == ""


def test_a_second_signal_stops_at_once(serve: Callable[..., Serve]) -> None:
    """Who asks twice does not wait for requests, and learns from the status that it was cut short."""
    service = serve(LUCID_DATABASE_URL=NO_DATABASE).ready()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(service.answers, "/slow?15")
        time.sleep(0.3)
        service.process.terminate()
        wait_until(lambda: not service.answers())
        service.process.terminate()
        assert service.process.wait(timeout=3) == 128 + signal.SIGTERM
        assert not running.result()


def test_a_request_that_outlasts_the_grace_is_cut(serve: Callable[..., Serve]) -> None:
    """The grace is the longest wait, and the exit is a clean one."""
    service = serve(LUCID_DATABASE_URL=NO_DATABASE, LUCID_SHUTDOWN_GRACE_SECONDS="1").ready()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(service.answers, "/slow?15")
        time.sleep(0.3)
        service.process.terminate()
        assert service.process.wait(timeout=5) == 0
        assert not running.result()


def test_a_killed_supervisor_leaves_no_worker_and_no_postgres(serve: Callable[..., Serve]) -> None:
    """The port is free at once, Postgres is shut down within five seconds, and the next start recovers nothing."""
    service = serve(LUCID_WORKERS="2").ready()
    wait_until(lambda: len(service.workers()) == 2)
    workers, port = service.workers(), service.url.rsplit(":", 1)[1]
    service.process.kill()
    wait_until(lambda: is_gone(workers), timeout_seconds=1)
    starts = warm_starts(service.folder / "data")
    following = serve(LUCID_PORT=port).ready()
    assert following.get("/database") == "42"
    assert warm_starts(service.folder / "data") == starts + 1
    following.process.kill()
    wait_until(lambda: not following.postgres(), timeout_seconds=5)


def test_a_killed_worker_is_replaced(serve: Callable[..., Serve]) -> None:
    """Another one serves in its place, and the supervisor says so."""
    service = serve(LUCID_DATABASE_URL=NO_DATABASE).ready()
    for _ in range(3):
        worker = int(service.get())
        os.kill(worker, signal.SIGKILL)
        wait_until(partial(service.answers_without, worker))
    assert service.errors.read_text().count("a worker ended (SIGKILL)") == 3


def test_a_killed_postgres_comes_back_under_the_same_workers(serve: Callable[..., Serve]) -> None:
    """However often its postmaster is killed, the database answers again by itself."""
    service = serve().ready()
    workers = service.workers()
    for _ in range(3):
        (postmaster,) = service.children() - workers
        os.kill(postmaster, signal.SIGKILL)
        wait_until(partial(is_gone, {postmaster}))
        wait_until(partial(service.answers, "/database"), timeout_seconds=5)
    assert service.workers() == workers


def test_a_worker_that_never_gets_ready_ends_the_service(serve: Callable[..., Serve]) -> None:
    """After five deaths at once it gives up, with a sentence and status 1."""
    service = serve(LUCID_DATABASE_URL=NO_DATABASE, BROKEN="yes")
    assert service.process.wait(timeout=15) == 1
    assert "A worker ended 5 times in a row right after its start, the last time with status 3" in (
        service.errors.read_text()
    )


def test_a_port_that_is_taken_is_named_before_anything_starts(serve: Callable[..., Serve]) -> None:
    """One sentence, status 1, and no cluster was made for it."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = serve(LUCID_PORT=str(port))
        assert service.process.wait(timeout=10) == 1
    assert re.fullmatch(rf"Port {port} of 127.0.0.1 is taken .*--port.*\n", service.errors.read_text())
    assert not (service.folder / "data" / "postgres").exists()


def test_a_database_that_cannot_be_reached_is_one_sentence(serve: Callable[..., Serve]) -> None:
    """No traceback, no password: what to check, and status 1."""
    service = serve(LUCID_DATABASE_URL="postgresql://me:secret@127.0.0.1:1/none", PREPARE="connect")
    assert service.process.wait(timeout=10) == 1
    assert re.fullmatch(r"The database can't be reached .*LUCID_DATABASE_URL.*\n", service.errors.read_text())
    assert "secret" not in service.errors.read_text()


def test_a_second_service_on_the_folder_is_refused_and_two_share_a_database(serve: Callable[..., Serve]) -> None:
    """The folder of an embedded Postgres has one owner; with a database URL replicas live side by side."""
    first = serve().ready()
    second = serve()
    replicas = [serve(LUCID_DATABASE_URL=NO_DATABASE).ready() for _ in range(2)]
    assert all(service.answers() for service in replicas)
    assert second.process.wait(timeout=10) == 1
    assert f"belongs to the service of process {first.process.pid}: stop that one" in second.errors.read_text()
    assert first.get("/database") == "42"


def test_an_ipv6_address_is_served(serve: Callable[..., Serve]) -> None:
    """The address stands in brackets, and answers."""
    service = serve(LUCID_DATABASE_URL=NO_DATABASE, LUCID_HOST="::1")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        assert service.process.wait(timeout=10) == 1
        assert "is no address of this machine" in service.errors.read_text()
    else:
        assert service.ready().url.startswith("http://[::1]:")
        assert json.loads(service.get()) in service.workers()
