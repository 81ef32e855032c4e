"""The embedded Postgres server: a child of this process, on the data folder's cluster, reached by a Unix socket."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lucid_compute.postgres.embedded.cluster import (
    CLUSTER_NAME,
    Cluster,
    PostgresLog,
    finish_cluster,
    has_cluster,
    open_cluster,
    remove_unfinished,
    unfinished_name,
)
from lucid_compute.postgres.embedded.data_folder import DataFolderLock, explain_os_errors, make_data_folder
from lucid_compute.postgres.embedded.processes import (
    POLL_SECONDS,
    EmbeddedPostgresError,
    cluster_name,
    end_leftovers,
    forget_reused_pids,
    is_ready,
)
from lucid_compute.postgres.embedded.socket_folder import (
    PORT,
    SOCKET_NAME,
    find_socket_folder,
    remove_socket_folder,
    socket_url,
)

SYSTEM_DIR = Path("/var/lib/lucid-compute")
LOG_NAME = "postgres.log"
START_TIMEOUT_SECONDS = 120.0  # a recovery reads up to max_wal_size of log
STOP_TIMEOUT_SECONDS = 30.0
QUIT_SECONDS = 5.0
RETRY_SECONDS = 0.1
TRANSIENT_SECONDS = 15.0
SETTINGS = (
    "listen_addresses=",
    f"port={PORT}",
    "unix_socket_permissions=0700",
    "max_connections=100",
    "timezone=UTC",
    "log_timezone=UTC",
    "log_checkpoints=off",
    "logging_collector=off",
    "jit=off",  # compiling costs more than any query here
)
# Messages of Postgres while its predecessor is still ending; after TRANSIENT_SECONDS they count as errors.
TRANSIENT_MESSAGES = ("pre-existing shared memory block", '" already exists\n', "Address already in use")


class EmbeddedPostgres:
    """One Postgres on one data folder: ready after `start`, ended after `stop` or within seconds of this process's end.

    It is a direct child and shuts down when the thread that started it ends. So start it in the main thread.
    """

    def __init__(
        self,
        data_dir: Path,
        run_as: str = "nobody",
        options: Sequence[str] = (),
        *,
        system_dir: Path = SYSTEM_DIR,
    ) -> None:
        """Prepare; nothing is read or written yet.

        `run_as` is the user of a new cluster if this process is root; an existing cluster runs as its owner. `options`
        are settings of Postgres as `name=value`, in addition to `SETTINGS`. `system_dir` holds what that user can't
        reach elsewhere.
        """
        self._data_dir = data_dir
        self._run_as = run_as
        self._options = tuple(options)
        self._system_dir = system_dir
        self._name = CLUSTER_NAME  # another one while the cluster is not complete
        self._lock: DataFolderLock | None = None
        self._log = PostgresLog(data_dir / LOG_NAME)
        self._cluster: Cluster | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        try:
            self.start()
        except BaseException:  # also when the service is being stopped
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop it."""
        self.stop()

    @property
    def data_dir(self) -> Path:
        """The data folder; absolute and without links after `claim`."""
        return self._data_dir

    @property
    def pid(self) -> int | None:
        """The postmaster's process id; None if it does not run."""
        return self._process.pid if self._process and self._process.poll() is None else None

    def poll(self) -> int | None:
        """Return the postmaster's exit status; None while it runs or before it was started. This reaps it.

        It also bounds the log, to which refused requests of clients add lines.
        """
        self._log.bound()
        return self._process.poll() if self._process else None

    def claim(self) -> None:
        """Create the data folder if missing, and lock it until `stop`; `start` does this as well.

        Raises:
            EmbeddedPostgresError: another process holds the lock, or the folder can't be used.
        """
        if self._lock is None:
            self._data_dir = make_data_folder(self._data_dir)
            lock = DataFolderLock(self._data_dir)
            lock.acquire()
            self._lock = lock
            self._log = PostgresLog(self._data_dir / LOG_NAME)

    def start(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Start Postgres and wait until it accepts connections. The first start creates the cluster.

        A Postgres that already runs is left alone.

        Raises:
            EmbeddedPostgresError: Postgres can't be started; the text says what to do.
        """
        if self.pid is not None:
            return
        if threading.current_thread() is not threading.main_thread():
            msg = "The embedded Postgres must be started by the main thread: it stops when its thread ends."
            raise EmbeddedPostgresError(msg)
        deadline = time.monotonic() + timeout_seconds
        self.claim()
        durable = "fsync=off" not in self._options
        self._cluster = open_cluster(
            self._data_dir, self._run_as, self._system_dir, self._log, durable=durable, name=self._name
        )
        self._run(self._cluster, deadline)

    def restart(self, timeout_seconds: float = START_TIMEOUT_SECONDS) -> None:
        """Start again after the postmaster died, once none of its processes is left.

        Raises:
            EmbeddedPostgresError: Postgres can't be started; a further call may succeed.
        """
        if self._cluster is None:
            self.start(timeout_seconds)
            return
        self._end_process(immediately=True)
        self._run(self._cluster, time.monotonic() + timeout_seconds)

    def stop(self, *, immediately: bool = False) -> None:
        """Shut down, end every session without losing a commit, and release the data folder.

        With `immediately`, the next start has to recover.
        """
        is_discarded = self._name != CLUSTER_NAME
        self._end_process(immediately=immediately or is_discarded)
        if is_discarded:
            remove_unfinished(self._data_dir, self._system_dir)
        if self._cluster is not None:
            remove_socket_folder(self._data_dir)
        self._process = self._cluster = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def hold_back(self) -> None:
        """Have `start` create a cluster that is the data folder's only after `finish`; until then `stop` removes it."""
        self._name = unfinished_name()

    def finish(self) -> None:
        """Shut down, and give a cluster that was held back its name. `stop` still has to release the data folder."""
        self._end_process(immediately=False)
        if self._name != CLUSTER_NAME:
            with explain_os_errors(self._data_dir):
                finish_cluster(self._data_dir / self._name, self._data_dir / CLUSTER_NAME)
            self._name = CLUSTER_NAME

    def url(self, database: str = "postgres") -> str:
        """Return the URL of a database on this server, for asyncpg and psql.

        Raises:
            EmbeddedPostgresError: the server was not started.
        """
        if self._cluster is None:
            msg = "The embedded Postgres has no address before it was started."
            raise EmbeddedPostgresError(msg)
        return socket_url(self._cluster.socket_dir, database)

    def _run(self, cluster: Cluster, deadline: float) -> None:
        """Start the postmaster and wait until it accepts connections; retry while its predecessor still ends."""
        transient_until = min(deadline, time.monotonic() + TRANSIENT_SECONDS)
        while (failure := self._attempt(cluster, deadline)) is not None:
            was_killed = self.poll() == -signal.SIGKILL  # from outside: that says nothing about the next attempt
            error = self._log.error(failure)
            self._end_process(immediately=True)
            is_transient = was_killed or any(words in str(error) for words in TRANSIENT_MESSAGES)
            if not is_transient or time.monotonic() > transient_until:
                raise error
            time.sleep(RETRY_SECONDS)

    def _attempt(self, cluster: Cluster, deadline: float) -> str | None:
        """Start the postmaster once; return None when it accepts connections, else what went wrong."""
        end_leftovers(cluster.path, deadline - time.monotonic())
        forget_reused_pids(cluster.path / "postmaster.pid", cluster.socket_dir / f"{SOCKET_NAME}.lock")
        with explain_os_errors(self._data_dir):
            self._launch(cluster)
        try:
            return self._wait_until_ready(cluster, deadline)
        except BaseException:  # the service is being stopped
            self._end_process(immediately=True)
            raise

    def _launch(self, cluster: Cluster) -> None:
        """Start the postmaster."""
        settings = (*SETTINGS, f"cluster_name={cluster_name(cluster.path)}", *self._options)
        folders = ("-D", str(cluster.path), "-k", str(cluster.socket_dir))
        options = (word for setting in settings for word in ("-c", setting))
        self._log.mark()
        with self._log.open() as output:
            command = (str(cluster.binaries.postgres), *folders, *options)
            self._process = cluster.user.start(command, signal.SIGINT, output)

    def _wait_until_ready(self, cluster: Cluster, deadline: float) -> str | None:
        """Return None when Postgres accepts connections, else what went wrong."""
        while (status := self.poll()) is None:
            if is_ready(cluster.path, self.pid):
                return None
            if time.monotonic() > deadline:
                return "Postgres was not ready in time"
            time.sleep(POLL_SECONDS)
        return f"Postgres ended at its start (status {status})"

    def _end_process(self, *, immediately: bool) -> None:
        """End the postmaster and wait until none of its processes is left."""
        steps = [(signal.SIGINT, STOP_TIMEOUT_SECONDS), (signal.SIGQUIT, QUIT_SECONDS), (signal.SIGKILL, QUIT_SECONDS)]
        for signal_number, timeout_seconds in steps[1:] if immediately else steps:
            if self._process is None or self._process.poll() is not None:
                break
            self._process.send_signal(signal_number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_seconds)
        if self._process is not None and self._cluster is not None:
            end_leftovers(self._cluster.path, QUIT_SECONDS)


@contextmanager
def open_embedded_database(data_dir: Path) -> Iterator[str]:
    """Yield the URL of the database in a data folder; its Postgres is started for the block if it does not run.

    Call it in the main thread.

    Raises:
        EmbeddedPostgresError: there is no database, or it can't be started; the text says what to do.
    """
    cluster = data_dir / CLUSTER_NAME
    if not cluster.exists():
        msg = (
            f"There is no database here: LUCID_DATABASE_URL is not set, and the data folder {data_dir} has none. "
            "Go where `lucid serve` was started, name its data folder in LUCID_DATA_DIR, or set LUCID_DATABASE_URL."
        )
        raise EmbeddedPostgresError(msg)
    folder = find_socket_folder(data_dir, cluster.resolve())
    if _is_listening(folder / SOCKET_NAME):
        yield socket_url(folder)
        return
    with EmbeddedPostgres(data_dir) as postgres:
        yield postgres.url()


@contextmanager
def fill_embedded_database(data_dir: Path, run_as: str, *, system_dir: Path = SYSTEM_DIR) -> Iterator[str]:
    """Yield the URL of a database that no service uses: that of the data folder, else one in a new cluster.

    A new cluster is the data folder's only when the block has ended well; a kill leaves what the next start removes.
    Call it in the main thread.

    Raises:
        EmbeddedPostgresError: a service uses the data folder, or Postgres can't be started; the text says what to do.
    """
    postgres = EmbeddedPostgres(data_dir, run_as, system_dir=system_dir)
    postgres.claim()
    if not has_cluster(postgres.data_dir):
        postgres.hold_back()
    with postgres:
        yield postgres.url()
        postgres.finish()


def _is_listening(path: Path) -> bool:
    """Return whether a server listens on the socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
        return True
