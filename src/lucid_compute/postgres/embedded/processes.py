"""The processes of the embedded Postgres: their user, their start, and the end of those that an earlier start left."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

from lucid_compute.postgres.embedded import launcher

# A separate environment, so that PGPORT, PGDATA and locale of the caller don't affect the cluster.
POSTGRES_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
POLL_SECONDS = 0.01
STATUS_LINE = 7  # of postmaster.pid, LOCK_FILE_LINE_PM_STATUS less one


class EmbeddedPostgresError(Exception):
    """The embedded Postgres cannot run; the text says why and what to do."""


@dataclass(frozen=True)
class PostgresUser:
    """The system user that Postgres runs as: this process's user, or another one for root, which Postgres refuses."""

    name: str
    uid: int
    gid: int

    @property
    def is_another(self) -> bool:
        """Return whether this is another user than that of this process."""
        return self.uid != os.geteuid()

    def start(
        self, command: Sequence[str | Path], death_signal: int, output: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        """Start `command` as this user, in a new session; it gets `death_signal` when the calling thread ends."""
        return subprocess.Popen(
            self._command_line(command, death_signal),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=POSTGRES_ENVIRONMENT,
            start_new_session=True,  # else a terminal's Ctrl-C would stop Postgres before the workers are done
        )

    def succeeds(self, *command: str | Path) -> bool:
        """Return whether `command`, run as this user, exits 0."""
        return (
            subprocess.run(
                self._command_line(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=POSTGRES_ENVIRONMENT,
                check=False,
            ).returncode
            == 0
        )

    def can_enter(self, *paths: Path) -> bool:
        """Return whether this user can enter each of `paths`; tried as that user, so that ACLs count."""
        if not self.is_another:
            return all(os.access(path, os.X_OK) for path in paths)
        return self.succeeds(launcher.CAN_ENTER, *paths)

    def make_folder(self, path: Path) -> None:
        """Create a folder that only this user can enter."""
        path.mkdir(mode=0o700)
        if self.is_another:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def _command_line(self, command: Sequence[str | Path], death_signal: int) -> list[str]:
        """Return the command line that switches to this user and then runs `command`."""
        uid = self.uid if self.is_another else launcher.STAY
        launch = [sys.executable, "-I", "-S", launcher.__file__]
        return [*launch, *map(str, (os.getpid(), int(death_signal), uid, self.gid)), *map(str, command)]


def find_user(name: str) -> PostgresUser:
    """Return the user that Postgres runs as: `name` if this process is root, else this process's user.

    Raises:
        EmbeddedPostgresError: this process is root, and `name` is unknown or root itself.
    """
    if os.geteuid() != 0:
        return user_of_uid(os.geteuid())
    try:
        entry = pwd.getpwnam(name)
    except KeyError:
        reason = f"there is no system user {name!r}"
    else:
        if entry.pw_uid != 0:
            return PostgresUser(name, entry.pw_uid, entry.pw_gid)
        reason = "Postgres refuses to run as root"
    msg = (
        f"The embedded Postgres cannot run as {name!r}: {reason}; name an unprivileged user of this system in "
        "LUCID_EMBEDDED_POSTGRES_USER, run the service as an ordinary user, or set LUCID_DATABASE_URL."
    )
    raise EmbeddedPostgresError(msg)


def user_of_uid(uid: int) -> PostgresUser:
    """Return the user of `uid`, which needs no name (containers run as bare numbers)."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return PostgresUser(str(uid), uid, os.getegid() if uid == os.geteuid() else uid)
    return PostgresUser(entry.pw_name, uid, entry.pw_gid)


def cluster_name(cluster: Path) -> str:
    """Return the `cluster_name` of a cluster. It is in the title of each of its processes, to find them by."""
    return f"lucid-{sha256(os.fsencode(cluster)).hexdigest()[:16]}"


def processes_of(cluster: Path) -> set[int]:
    """Return the processes of any Postgres on `cluster`, without zombies. Linux only; empty on other systems.

    They are found by command line, which every user may read. Root in a container may not read the folders of another
    user's process.
    """
    try:
        owner = cluster.stat().st_uid
    except FileNotFoundError:  # the cluster was removed while the service ran
        return set()
    folder, title = os.fsencode(cluster), f" {cluster_name(cluster)}: ".encode()
    return {pid for pid, words in _command_lines(owner) if folder in words or title in words[0]}


def _command_lines(owner: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield each process of `owner` named postgres, with the words of its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry.stat().st_uid == owner and (entry / "comm").read_bytes() == b"postgres\n":
                yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")


def read_pid(lock_file: Path) -> int | None:
    """Return the process id in a lock file of Postgres, which may have ended; None without a readable file."""
    try:
        return int(lock_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def is_ready(cluster: Path, postmaster: int | None) -> bool:
    """Return whether this postmaster accepts connections, according to its `postmaster.pid`."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    status = lines[STATUS_LINE].strip() if len(lines) > STATUS_LINE else ""
    return status == "ready" and lines[0] == str(postmaster)


def forget_reused_pids(*lock_files: Path) -> None:
    """Remove each lock file whose process is not Postgres, or is a zombie: a start would take it for a running one.

    Containers reuse small process ids, and a first process that reaps no children keeps zombies. Call it after
    `end_leftovers`. It does nothing where there is no /proc.
    """
    for file in lock_files:
        pid = read_pid(file)
        with suppress(OSError):
            if pid is not None and not _is_living_postgres(Path(f"/proc/{pid}/stat").read_text()):
                file.unlink(missing_ok=True)


def _is_living_postgres(stat: str) -> bool:
    """Return whether a line of /proc/PID/stat, `PID (NAME) STATE …`, is that of a Postgres that has not ended."""
    name, rest = stat.partition("(")[2].rsplit(")", 1)
    return name == "postgres" and rest.split()[0] not in "ZX"


def end_leftovers(cluster: Path, timeout_seconds: float) -> None:
    """Wait until no process of an earlier Postgres on `cluster` is left. The caller holds the data folder's lock.

    A postmaster whose service ended gets the signal for a fast shutdown (as by PDEATHSIG; twice does no harm).
    Backends without a postmaster exit automatically, except busy ones, which are ended.

    Raises:
        EmbeddedPostgresError: a process is still there after `timeout_seconds`.
    """
    started_at = time.monotonic()
    sent: set[int] = set()
    while left := processes_of(cluster):
        waited_seconds = time.monotonic() - started_at
        if waited_seconds > timeout_seconds:
            msg = f"Processes {sorted(left)} of an earlier Postgres on {cluster} do not end; end them and start again."
            raise EmbeddedPostgresError(msg)
        for death_signal, after_seconds, pids in _escalation(left, read_pid(cluster / "postmaster.pid")):
            if waited_seconds >= after_seconds and death_signal not in sent:
                sent.add(death_signal)
                _send(death_signal, pids)
        time.sleep(POLL_SECONDS)


def _escalation(left: set[int], postmaster: int | None) -> tuple[tuple[int, float, set[int]], ...]:
    """Return the signals to send: each with the seconds to wait before it, and the processes that get it."""
    if postmaster in left:  # it ends its own children; a fast shutdown writes a checkpoint, up to all shared buffers
        return (signal.SIGINT, 0.0, {postmaster}), (signal.SIGQUIT, 15.0, {postmaster}), (signal.SIGKILL, 20.0, left)
    return (signal.SIGQUIT, 0.5, left), (signal.SIGKILL, 2.0, left)


def _send(signal_number: int, pids: set[int]) -> None:
    """Send a signal to every process that still exists and that this user may signal."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)
