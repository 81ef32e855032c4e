"""The processes of the embedded Postgres: the user they run as, how they start, and how those left behind end."""

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

# Its own environment, so that nobody's PGPORT, PGDATA or locale decides how the cluster is made or reached.
POSTGRES_ENVIRONMENT = {"PATH": os.defpath, "LC_ALL": "C", "TZ": "UTC"}
POLL_SECONDS = 0.01
STATUS_LINE = 7  # of postmaster.pid, LOCK_FILE_LINE_PM_STATUS less one


class EmbeddedPostgresError(Exception):
    """The embedded Postgres cannot run; the text is a sentence that says why and what to do."""


@dataclass(frozen=True)
class PostgresUser:
    """The system user that Postgres runs as: another one when we are root (Postgres refuses root), else ourselves."""

    name: str
    uid: int
    gid: int

    @property
    def is_another(self) -> bool:
        """Return whether processes have to change their user to become this one."""
        return self.uid != os.geteuid()

    def start(
        self, command: Sequence[str | Path], death_signal: int, output: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        """Start `command` as this user, in a session of its own; it gets `death_signal` when our main thread ends."""
        return subprocess.Popen(
            self._launched(command, death_signal),
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
                self._launched(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=POSTGRES_ENVIRONMENT,
                check=False,
            ).returncode
            == 0
        )

    def can_enter(self, *paths: Path) -> bool:
        """Return whether this user can enter each of `paths`. It is tried as that user, so that ACLs count."""
        if not self.is_another:
            return all(os.access(path, os.X_OK) for path in paths)
        return self.succeeds(launcher.CAN_ENTER, *paths)

    def make_folder(self, path: Path) -> None:
        """Make a folder that is this user's alone."""
        path.mkdir(mode=0o700)
        if self.is_another:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def _launched(self, command: Sequence[str | Path], death_signal: int) -> list[str]:
        """Return the command line that becomes this user and then `command`."""
        uid = self.uid if self.is_another else launcher.STAY
        launch = [sys.executable, "-I", "-S", launcher.__file__]
        return [*launch, *map(str, (os.getpid(), int(death_signal), uid, self.gid)), *map(str, command)]


def find_user(name: str) -> PostgresUser:
    """Return who Postgres runs as: `name` when we are root, else ourselves.

    Raises: EmbeddedPostgresError when we are root and there is no such user, or it is root itself.
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
    """Return the `cluster_name` of a cluster: it stands in the title of each of its processes, and finds them."""
    return f"lucid-{sha256(os.fsencode(cluster)).hexdigest()[:16]}"


def processes_of(cluster: Path) -> set[int]:
    """Return the processes of any Postgres on `cluster`; zombies do not count. Linux only, elsewhere none.

    By command line, which everybody may read: root in a container may not read the folder of another user's process.
    """
    try:
        owner = cluster.stat().st_uid
    except FileNotFoundError:  # a cluster that was removed under a running service
        return set()
    folder, title = os.fsencode(cluster), f" {cluster_name(cluster)}: ".encode()
    return {pid for pid, words in _command_lines(owner) if folder in words or title in words[0]}


def _command_lines(owner: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield each process of `owner` that is called postgres, with the words of its command line."""
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if entry.stat().st_uid == owner and (entry / "comm").read_bytes() == b"postgres\n":
                yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")


def read_pid(lock_file: Path) -> int | None:
    """Return the process that a lock file of Postgres names, which may be long gone; None without a readable file."""
    try:
        return int(lock_file.read_text().split("\n", 1)[0])
    except (OSError, ValueError):
        return None


def is_ready(cluster: Path, postmaster: int | None) -> bool:
    """Return whether this postmaster takes connections: it writes so in its `postmaster.pid`."""
    try:
        lines = (cluster / "postmaster.pid").read_text().splitlines()
    except OSError:
        return False
    status = lines[STATUS_LINE].strip() if len(lines) > STATUS_LINE else ""
    return status == "ready" and lines[0] == str(postmaster)


def forget_reused_pids(*lock_files: Path) -> None:
    """Remove each lock file whose process is no Postgres, or a zombie: a start would take it for a running one.

    Containers reuse small process ids, and a first process that reaps nobody keeps zombies. To be called when
    `end_leftovers` found nothing; does nothing where there is no /proc.
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
    """Return once no process of an earlier Postgres on `cluster` is left; only the owner of the data folder may ask.

    A postmaster that lost its service is told to shut down fast (it was by PDEATHSIG; a second time changes nothing).
    Backends that lost their postmaster leave by themselves, but for those that are busy: these are ended.

    Raises: EmbeddedPostgresError when one is still there after `timeout_seconds`.
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
    """Return which signal is due after how many seconds, and to whom."""
    if postmaster in left:  # it ends its own children; a fast shutdown writes a checkpoint, up to all shared buffers
        return (signal.SIGINT, 0.0, {postmaster}), (signal.SIGQUIT, 15.0, {postmaster}), (signal.SIGKILL, 20.0, left)
    return (signal.SIGQUIT, 0.5, left), (signal.SIGKILL, 2.0, left)


def _send(signal_number: int, pids: set[int]) -> None:
    """Send a signal to every process that is still there and ours to signal."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal_number)
