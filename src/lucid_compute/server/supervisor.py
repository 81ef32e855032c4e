"""The outermost process: it holds the port, runs Postgres, prepares the database, and keeps the workers running.

It starts no event loop and no thread: it forks, and Postgres lives as long as the thread that started it.
"""

from __future__ import annotations

import logging
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lucid_compute.compilation import FORM
from lucid_compute.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError
from lucid_compute.server.metrics.shared_memory import SharedSlots, WorkerSlot
from lucid_compute.server.preparation_child import Prepare, Report, prepare_in_child
from lucid_compute.server.processes import ServiceError, StopRequested, StopSignals
from lucid_compute.server.settings import Settings
from lucid_compute.server.sockets import close, listen
from lucid_compute.server.worker import Application, Worker, serve

CHECK_SECONDS = 1.0  # signals wake the supervisor; this is for events without one
KILL_AFTER_GRACE_SECONDS = 5.0  # closing the lifespan comes after the grace
MAX_POSTGRES_PAUSE_SECONDS = 30.0

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - compared, not bound

log = logging.getLogger(__name__)


class ServedProgram(NamedTuple):
    """The program that is served: how its database is prepared, and how a worker builds its application."""

    prepare: Prepare
    create_app: Callable[[Settings, str, WorkerSlot], Application]


class Supervisor:
    """One `lucid serve`: Postgres (unless there is a database URL), and `settings.workers` workers on one port."""

    def __init__(self, settings: Settings, program: ServedProgram, postgres: EmbeddedPostgres | None) -> None:
        self._settings = settings
        self._program = program
        self._postgres = postgres
        self._postgres_due_at = 0.0
        self._postgres_pause_seconds = 0.0
        self._sockets: list[socket.socket] = []
        self._workers: list[Worker] = []
        self._report: Report | None = None
        self._signals = StopSignals()

    def run(self) -> int:
        """Serve until a signal says stop; return the exit status: 0, or 1 after a sentence on stderr."""
        status = 0
        with self._signals:
            try:
                with self._signals.interrupting():
                    self._start()
                self._watch()
            except StopRequested:
                pass
            except (ServiceError, EmbeddedPostgresError) as error:
                print(error, file=sys.stderr, flush=True)
                status = 1
            finally:
                was_forced = self._stop()
        return 128 + self._signals.received[-1] if was_forced else status

    def _start(self) -> None:
        """Start in an order in which the likeliest failures come first."""
        if self._postgres is not None:
            self._postgres.claim()
        self._sockets = listen(self._settings.host, self._settings.port)
        if self._postgres is not None:
            self._postgres.start()
        url, data_dir = self._database()
        self._report = prepare_in_child(self._program.prepare, self._settings, url, data_dir)
        slots = SharedSlots(self._settings.workers)
        self._workers = [
            Worker(partial(self._serve_in_worker, slots.of_worker(number))) for number in range(self._settings.workers)
        ]

    def _database(self) -> tuple[str, Path]:
        """Return the URL of the database and the folder for the admin key."""
        if self._postgres is not None:
            return self._postgres.url(), self._postgres.data_dir
        data_dir = self._settings.data_dir.absolute()
        with suppress(OSError):  # only the first admin key needs it, and writing that reports the error
            data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        url = self._settings.database_url
        return url.get_secret_value() if url else "", data_dir

    def _serve_in_worker(self, slot: WorkerSlot, channel: socket.socket) -> int:
        """Run as a worker."""
        app = self._program.create_app(self._settings, self._database()[0], slot)
        return serve(app, self._sockets, channel, self._settings)

    def _watch(self) -> None:
        """Keep everything running until a signal."""
        while not self._signals.received:
            now = time.monotonic()
            self._restart_postgres(now)
            for worker in self._workers:
                worker.tend(now, self._workers)
            if self._report is not None and any(worker.is_ready for worker in self._workers):
                self._announce(self._report)
                self._report = None
            self._signals.wait(self._pause_seconds(now), self._channels())

    def _channels(self) -> list[int]:
        """Return the files on which workers report that they are ready."""
        return [worker.channel.fileno() for worker in self._workers if worker.channel is not None]

    def _pause_seconds(self, now: float) -> float:
        """Return how long there is nothing to do."""
        due = [worker.due_at for worker in self._workers if worker.due_at is not None]
        return min([CHECK_SECONDS, *(max(at - now, 0.0) for at in due)])

    def _restart_postgres(self, now: float) -> None:
        """Restart a Postgres that died, after ever longer pauses when that fails; meanwhile workers respond 503."""
        if self._postgres is None or self._postgres.poll() is None or now < self._postgres_due_at:
            return
        log.warning("Postgres ended (status %s); starting it again", self._postgres.poll())
        try:
            with self._signals.interrupting():
                self._postgres.restart()
        except EmbeddedPostgresError as error:
            self._postgres_pause_seconds = min(2 * self._postgres_pause_seconds + 1.0, MAX_POSTGRES_PAUSE_SECONDS)
            self._postgres_due_at = time.monotonic() + self._postgres_pause_seconds
            log.error("%s", error)  # noqa: TRY400 - the sentence says all
        else:
            self._postgres_pause_seconds = 0.0

    def _announce(self, report: Report) -> None:
        """Print once where the service is and how to call it."""
        banner = Banner(
            host=self._settings.host,
            port=self._sockets[0].getsockname()[1],
            is_loopback=self._settings.is_bound_to_loopback,
            admin_key=report.admin_key,
            admin_key_file=report.admin_key_file,
            has_bootstrap_key=self._settings.bootstrap_admin_key is not None,
        )
        with suppress(OSError):  # a closed terminal is no reason to stop
            print(banner.text(), flush=True)

    def _stop(self) -> bool:
        """Stop everything, workers first; return whether a further signal cut that short."""
        known = len(self._signals.received)
        close(self._sockets)
        for worker in self._workers:
            worker.send(signal.SIGTERM)
        self._wait_for_workers(known)
        if self._postgres is not None:
            self._stop_postgres(self._postgres)
        return len(self._signals.received) > known

    def _wait_for_workers(self, known: int) -> None:
        """Return when no worker is left; a further signal, or the end of the grace, kills the others."""
        deadline = time.monotonic() + self._settings.shutdown_grace_seconds + KILL_AFTER_GRACE_SECONDS
        is_killing = False
        while True:
            for worker in self._workers:
                worker.notice_end()
            if not any(worker.is_alive for worker in self._workers):
                return
            if not is_killing and (len(self._signals.received) > known or time.monotonic() > deadline):
                is_killing = True
                for worker in self._workers:
                    worker.send(signal.SIGKILL)
            self._signals.wait(CHECK_SECONDS)

    def _stop_postgres(self, postgres: EmbeddedPostgres) -> None:
        """Stop Postgres, at once when a further signal comes."""
        try:
            try:
                with self._signals.interrupting(len(self._signals.received)):
                    postgres.stop()
            except StopRequested:
                postgres.stop(immediately=True)
        except EmbeddedPostgresError as error:
            log.error("%s", error)  # noqa: TRY400 - the sentence says all


@dataclass(frozen=True)
class Banner:
    """The first lines of output; `admin_key` is set only if it was just created."""

    host: str
    port: int
    is_loopback: bool
    admin_key: str | None
    admin_key_file: Path | None
    has_bootstrap_key: bool

    def text(self) -> str:
        """Return the lines; the last one is a call that works when it is pasted."""
        near = _url(WILDCARDS.get(self.host, self.host), self.port)
        key, header = self._key()
        lines = [
            f"lucid-compute listens on {_url(self.host, self.port)}",
            f"  dashboard  {near}/dashboard",
            f"  docs       {near}/docs",
            f"  runs       {FORM}",
            f"  admin key  {key}",
            f"  try        curl -H {header} {near}/passports",
        ]
        if not self.is_loopback:
            lines.append(
                f"Warning: {self.host} can be reached from other machines and this is plain HTTP, which shows keys to "
                "the network: put a TLS proxy in front."
            )
        return "\n".join(lines)

    def _key(self) -> tuple[str, str]:
        """Return a text about the admin key, and the header for a shell."""
        if self.has_bootstrap_key:
            return "from LUCID_BOOTSTRAP_ADMIN_KEY", '"Authorization: Bearer $LUCID_BOOTSTRAP_ADMIN_KEY"'
        if self.admin_key:
            kept = f"kept in {self.admin_key_file}" if self.admin_key_file else "keep it"
            return f"{self.admin_key} (shown this once, {kept})", f"'Authorization: Bearer {self.admin_key}'"
        if self.admin_key_file:
            path = shlex.quote(str(self.admin_key_file))
            return f"kept in {self.admin_key_file}", f'"Authorization: Bearer $(cat {path})"'
        return "made when this database was first used", "'Authorization: Bearer YOUR_KEY'"


def _url(host: str, port: int) -> str:
    """Return the address as a URL."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
