"""The Postgres of a test run: one server, started when the first test asks, and a clone of its template for each test.

`python -m tests.postgres FOLDER` is the process that holds the server. It ends with the run whose folder it is: the run
locks a file there, and the kernel unlocks it however the run ends.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

from lucid_compute.postgres.database import connect
from lucid_compute.postgres.embedded import EmbeddedPostgres
from lucid_compute.server.preparation import prepare

ADMIN_KEY = "an-admin-key-for-the-tests"
OWN_SERVER_SETTING = "LUCID_TEST_DATABASE_URL"
# Nothing outlives the run, so nothing is made durable, and no checkpoint or vacuum comes between two tests.
FAST = (
    "fsync=off",
    "synchronous_commit=off",
    "full_page_writes=off",
    "wal_level=minimal",
    "max_wal_senders=0",
    "autovacuum=off",
    "max_connections=300",
)
MEMORY = Path("/dev/shm")  # noqa: S108 - a folder in memory, where the system has one; each test's database is 8 MB
MEMORY_BYTES = 2 * 1024**3
START_SECONDS = 120.0
STOP_SECONDS = 30.0
POLL_SECONDS = 0.02


class Server(NamedTuple):
    """Where the run's server is, and the database that is cloned for each test: migrated, with the admin key."""

    url: str
    template: str


class TestRun:
    """The folder that the processes of one run share; the process that made it ends last."""

    __test__ = False

    def __init__(self) -> None:
        self.folder = make_folder("lucid-test-")
        self._lock = _run_file(self.folder).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)

    def end(self) -> None:
        """Let the server end, if one was started, and return when it has."""
        self._lock.close()
        deadline = time.monotonic() + STOP_SECONDS
        while _server_file(self.folder).exists() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        shutil.rmtree(self.folder, ignore_errors=True)  # the server removes it too, for a run that was killed


def make_folder(prefix: str) -> Path:
    """Make a folder for a cluster, in memory if there is room: what tests write is never read from a disk."""
    made = Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY if _memory_is_usable() else None))
    made.chmod(0o755)  # as root, the Postgres user has to pass
    return made


def _memory_is_usable() -> bool:
    if not os.access(MEMORY, os.W_OK):
        return False
    can_run_programs = not os.statvfs(MEMORY).f_flag & os.ST_NOEXEC
    return can_run_programs and shutil.disk_usage(MEMORY).free > MEMORY_BYTES


def ask_for_server(folder: Path) -> Server:
    """Return the server of the run with this folder; the first process that asks starts it, the others wait."""
    with (folder / "start").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _server_file(folder).exists():
            _start_holder(folder)
        return Server(*json.loads(_server_file(folder).read_text()))


def _start_holder(folder: Path) -> None:
    """Start the process that holds the server, and return when the server is ready."""
    log = folder / "log"
    with log.open("wb") as output:
        holder = subprocess.Popen(
            [sys.executable, "-m", "tests.postgres", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parents[1],
            start_new_session=True,  # Ctrl-C ends the tests, which then end the server
        )
    deadline = time.monotonic() + START_SECONDS
    while not _server_file(folder).exists():
        assert holder.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(POLL_SECONDS)
    holder.returncode = 0  # nobody waits for it: it may outlive an xdist worker that started it


def hold_server(folder: Path) -> None:
    """Start the server, say where it is, and stop it when the run of this folder has ended."""
    with _a_server(folder) as url:
        server = Server(url, f"lucid_test_{uuid4().hex[:8]}_template")
        asyncio.run(_build_template(server))
        written = folder / "written"
        written.write_text(json.dumps(server))
        written.rename(_server_file(folder))
        with _run_file(folder).open() as run:
            fcntl.flock(run, fcntl.LOCK_EX)
        if os.environ.get(OWN_SERVER_SETTING):
            asyncio.run(_drop_all(server))
    shutil.rmtree(folder)


@contextmanager
def _a_server(folder: Path) -> Iterator[str]:
    if url := os.environ.get(OWN_SERVER_SETTING):
        yield url
        return
    postgres = EmbeddedPostgres(folder / "data", options=FAST)
    postgres.start()
    try:
        yield postgres.url()
    finally:
        postgres.stop(immediately=True)


async def _build_template(server: Server) -> None:
    await execute(server.url, f'CREATE DATABASE "{server.template}"')
    template = with_database(server.url, server.template)
    await prepare(template, data_dir=Path("/nonexistent"), bootstrap_admin_key=ADMIN_KEY)


async def _drop_all(server: Server) -> None:
    """Drop the template, and what tests left because they were ended."""
    connection = await connect(server.url, application="lucid tests", lock_timeout_seconds=0, timeout_seconds=60)
    try:
        prefix = server.template.removesuffix("template")
        for row in await connection.fetch("SELECT datname FROM pg_database WHERE starts_with(datname, $1)", prefix):
            await connection.execute(f'DROP DATABASE IF EXISTS "{row["datname"]}" WITH (FORCE)')
    finally:
        await connection.close()


async def clone(url: str, template: str) -> str:
    """Make a database like `template`; return its URL. Files are copied in a fifth of the time that pages are."""
    name = f"{template.removesuffix('template')}{uuid4().hex[:12]}"
    await execute(url, f'CREATE DATABASE "{name}" TEMPLATE "{template}" STRATEGY file_copy')
    return with_database(url, name)


async def make_empty(server: str) -> str:
    """Make a database without a table; return its URL."""
    name = f"lucid_test_empty_{uuid4().hex[:12]}"
    await execute(server, f'CREATE DATABASE "{name}"')
    return with_database(server, name)


async def drop(url: str) -> None:
    """Drop the database of this URL, whoever is connected to it."""
    name = urlsplit(url).path.strip("/")
    await execute(with_database(url, "postgres"), f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')


def with_database(url: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


async def execute(url: str, statement: str) -> None:
    """Run one statement on a connection of its own."""
    connection = await connect(url, application="lucid tests", lock_timeout_seconds=0, timeout_seconds=60)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def warm_starts(data_dir: Path) -> int:
    """Return how many starts of an embedded Postgres found a cluster that was shut down; none had to recover one."""
    log = (data_dir / "postgres.log").read_text()
    assert "automatic recovery" not in log
    return log.count("database system was shut down at")


def _run_file(folder: Path) -> Path:
    return folder / "run"


def _server_file(folder: Path) -> Path:
    return folder / "server.json"


if __name__ == "__main__":
    hold_server(Path(sys.argv[1]))
