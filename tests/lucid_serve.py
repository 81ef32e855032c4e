"""A real `lucid serve` below a test: the console script, a port and a data folder of its own, stopped or killed."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

import httpx

from lucid_compute.postgres.database import connect
from lucid_compute.postgres.embedded import remove_cluster
from lucid_compute.postgres.embedded.processes import is_ready, processes_of, read_pid
from lucid_compute.postgres.embedded.socket_folder import LINK_NAME, PORT
from tests import FORM, postgres
from tests.api import ADMIN_KEY

LUCID = Path(sys.executable).with_name("lucid")
READY_TIMEOUT_SECONDS = 60.0  # on a machine that runs other tests; the lifecycle's own tests measure starts
STOP_TIMEOUT_SECONDS = 30.0
POLL_SECONDS = 0.02

_AGE = """
WITH aged AS (
    UPDATE heartbeats SET received_at = clock_timestamp() - $2::interval, revision = revision + 1
    WHERE passport_id = $1::uuid RETURNING passport_id
)
INSERT INTO heartbeat_batches (replica_id, passport_ids) SELECT gen_random_uuid(), array_agg(passport_id) FROM aged
"""


class Served:
    """One `lucid serve`: on an embedded Postgres in its data folder, or on `database_url`."""

    command: Sequence[str | Path] = (LUCID, "serve")

    def __init__(self, folder: Path, database_url: str | None = None, **settings: str) -> None:
        """Start nothing yet. `folder` holds the data folder and the logs; `settings` are LUCID_… without the prefix.

        On a database of its own the admin key is the one that the service makes; on a shared one it is ADMIN_KEY.
        """
        self.folder = folder
        self.data_dir = folder / "data"
        self._database_url = database_url
        if database_url is not None:
            settings = {"DATABASE_URL": database_url, "BOOTSTRAP_ADMIN_KEY": ADMIN_KEY, **settings}
        settings = {"PORT": "0", "DATA_DIR": str(self.data_dir), "LOG_LEVEL": "WARNING", **settings}
        self._environment = {f"LUCID_{name}": value for name, value in settings.items()}
        self._starts = 0
        self._output = folder / "none"
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""

    def __enter__(self) -> Self:
        """Start it and wait until it is ready."""
        self.start()
        try:
            self.wait_until_ready()
        except BaseException:  # told to stop among them
            self.kill()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it as an operator does, and insist on a clean end; after a failure just end it."""
        if error is not None:
            self.kill()
        elif self.is_running:
            self.stop()

    @property
    def admin_key(self) -> str:
        """A key with the admin's scope."""
        return self._environment.get("LUCID_BOOTSTRAP_ADMIN_KEY") or (self.data_dir / "admin.key").read_text().strip()

    @property
    def database_url(self) -> str:
        """Where its Postgres can be asked directly; the embedded one's socket is its user's and root's."""
        if self._database_url is not None:
            return self._database_url
        link = self.data_dir / LINK_NAME
        folder = link.readlink() if link.is_symlink() else self._cluster
        return f"postgresql://postgres@/postgres?host={quote(str(folder))}&port={PORT}"

    @property
    def is_running(self) -> bool:
        """Return whether the outermost process has not ended."""
        return self.process is not None and self.process.poll() is None

    @property
    def log(self) -> str:
        """What it said, of the start at hand."""
        return "".join(file.read_text() for file in (self._output, self._errors) if file.exists())

    def client(self, key: str | None = None, timeout_seconds: float = 10.0) -> httpx.AsyncClient:
        """Return a client over a real socket; `key` None is the admin's, an empty one is none at all."""
        key = self.admin_key if key is None else key
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=timeout_seconds, trust_env=False)

    def start(self) -> None:
        """Start the outermost process; its output goes to files, so that it never waits for a reader."""
        self._starts += 1
        self._output = self.folder / f"{self._starts}.out"
        environment = {"PATH": os.defpath, "HOME": str(self.folder), **FORM, **self._environment}
        with self._output.open("wb") as output, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )

    def wait_until_listening(self, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Wait for the banner, and read the address from it."""
        wait_until(lambda: self._has_ended_or(self._finds_its_address), timeout_seconds, self)
        assert self.is_running, f"lucid serve ended: {self.log}"

    def wait_until_ready(self, timeout_seconds: float = READY_TIMEOUT_SECONDS) -> None:
        """Wait until /readyz answers 200."""
        self.wait_until_listening(timeout_seconds)
        wait_until(lambda: self._has_ended_or(self._is_ready), timeout_seconds, self)
        assert self.is_running, f"lucid serve ended: {self.log}"

    def stop(self) -> None:
        """Send SIGTERM and insist on exit status 0."""
        assert self.process is not None
        self.process.terminate()
        assert self.process.wait(STOP_TIMEOUT_SECONDS) == 0, self.log

    def kill(self) -> None:
        """SIGKILL the outermost process, and reap it."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def fall_silent(self, passport_id: str, seconds: float) -> None:
        """Make the node's newest heartbeat `seconds` old, as if it had stopped then, and every replica notice it.

        Replicas follow batches of others, so the batch that tells of it is nobody's.
        """
        connection = await connect(self.database_url, application="lucid tests")
        try:
            await connection.execute(_AGE, passport_id, timedelta(seconds=seconds))
        finally:
            await connection.close()

    async def seconds_lost(self) -> float:
        """Return how long the service itself was out, as it recorded: a busy machine can hold it up for seconds."""
        connection = await connect(self.database_url, application="lucid tests")
        try:
            lost = await connection.fetchval("SELECT coalesce(sum(ended_at - started_at), '0') FROM outages")
            return float(lost.total_seconds())
        finally:
            await connection.close()

    def workers(self) -> set[int]:
        """Return the processes that serve."""
        return self._children() - self.postgres()

    def postmaster(self) -> int | None:
        """Return the embedded Postgres's first process; None while there is none."""
        pid = read_pid(self._cluster / "postmaster.pid")
        return pid if pid in self._children() else None

    def ready_postmaster(self) -> int | None:
        """Return the embedded Postgres's first process once it takes connections."""
        pid = self.postmaster()
        return pid if pid is not None and is_ready(self._cluster, pid) else None

    def postgres(self) -> set[int]:
        """Return every process of the embedded Postgres; zombies do not count."""
        return processes_of(self._cluster)

    @property
    def _cluster(self) -> Path:
        return (self.data_dir / "postgres").resolve()

    @property
    def _errors(self) -> Path:
        return self._output.with_suffix(".err")

    def _children(self) -> set[int]:
        """Return the processes right below the outermost one."""
        if self.process is None:
            return set()
        with suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return set(map(int, children.split()))
        return set()

    def _finds_its_address(self) -> bool:
        found = re.search(r"listens on (\S+)\n", self._output.read_text())
        self.url = found[1] if found else ""
        return found is not None

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False).status_code == httpx.codes.OK
        except httpx.TransportError:
            return False

    def _has_ended_or(self, holds: Callable[[], bool]) -> bool:
        return not self.is_running or holds()


@contextmanager
def folder() -> Iterator[Path]:
    """Return a folder that the embedded Postgres can live in also when we are root, and remove it at the end."""
    made = postgres.make_folder("lucid-served-")
    try:
        yield made
    finally:
        _end_postgres(made / "data" / "postgres")
        remove_cluster(made / "data")
        shutil.rmtree(made)


@contextmanager
def serving_on_a_clone(server_and_template: tuple[str, str], **settings: str) -> Iterator[Served]:
    """Run one `lucid serve` on a database of its own on the run's server; for fixtures wider than a test."""
    url = asyncio.run(postgres.clone(*server_and_template))
    with serving(url, **settings) as served:
        yield served
    asyncio.run(postgres.drop(url))


@contextmanager
def serving(database_url: str | None = None, **settings: str) -> Iterator[Served]:
    """Run one `lucid serve` for as long as the block runs."""
    with folder() as made, Served(made, database_url, **settings) as served:
        yield served


async def eventually(holds: Callable[[], Awaitable[bool]], timeout_seconds: float = 6.0) -> None:
    """Return once it holds. Replicas agree within 2 s; the rest is for a busy machine."""
    deadline = time.monotonic() + timeout_seconds
    while not await holds():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s in vain"
        await asyncio.sleep(POLL_SECONDS)


def wait_until(holds: Callable[[], bool], timeout_seconds: float, served: Served | None = None) -> None:
    """Return once it holds; fail with the service's log after `timeout_seconds`."""
    deadline = time.monotonic() + timeout_seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {timeout_seconds} s in vain; {served.log if served else ''}"
        time.sleep(POLL_SECONDS)


def _end_postgres(cluster: Path) -> None:
    """See to it that no Postgres of a killed service outlives the test."""
    resolved = cluster.resolve()
    deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
    while left := processes_of(resolved):
        if time.monotonic() > deadline - STOP_TIMEOUT_SECONDS + 5:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert time.monotonic() < deadline, f"Postgres {left} does not end"
        time.sleep(POLL_SECONDS)
