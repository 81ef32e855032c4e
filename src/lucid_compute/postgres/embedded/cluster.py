"""The cluster of a data folder: where it is, who owns it, and how it is created (completely or not at all)."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lucid_compute.postgres.embedded.binaries import (
    PostgresBinaries,
    binaries_of_cluster,
    find_binaries,
    make_open_folder,
    reachable_binaries,
)
from lucid_compute.postgres.embedded.data_folder import explain_os_errors
from lucid_compute.postgres.embedded.processes import EmbeddedPostgresError, PostgresUser, find_user, user_of_uid
from lucid_compute.postgres.embedded.socket_folder import open_socket_folder

MAX_BYTES = 10 * 1024 * 1024
QUOTED_LINES = 8
QUOTED_BYTES = 4096


class PostgresLog:
    """The log file of Postgres and initdb; the previous one is kept as `….1`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mark = 0

    def open(self) -> BinaryIO:
        """Open the log for a child process to append to; only this user may read it."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return os.fdopen(file, "ab")

    def mark(self) -> None:
        """Begin an attempt: `tail` returns what was logged since. A log that grew too long is rotated."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > MAX_BYTES:
            self.path.replace(f"{self.path}.1")
            size = 0
        self._mark = size

    def bound(self) -> None:
        """Keep a log that grew too long as `….1` while Postgres goes on writing; lines of this moment may be lost."""
        with suppress(OSError):  # there is none yet, or no way to shorten it
            if self.path.stat().st_size > MAX_BYTES:
                with suppress(OSError):  # a full disk
                    self._keep()
                os.truncate(self.path, 0)  # Postgres appends
                self._mark = 0

    def _keep(self) -> None:
        with self.path.open("rb") as file, PostgresLog(Path(f"{self.path}.1")).open() as kept:
            kept.truncate(0)
            shutil.copyfileobj(file, kept)

    def tail(self) -> str:
        """Return the last lines of this attempt."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._mark, self.path.stat().st_size - QUOTED_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-QUOTED_LINES:])

    def error(self, what: str) -> EmbeddedPostgresError:
        """Return an error that says `what` went wrong, with the end of the log and its path."""
        tail = self.tail()
        if "No space left on device" in tail:
            what = f"{what}: the disk is full, free some space and start again"
        ending = f" and ends with:\n{tail}" if tail else " and is empty"
        return EmbeddedPostgresError(f"{what}; its log is {self.path}{ending}")


CLUSTER_NAME = "postgres"
UNFINISHED_PREFIX = "postgres.new-"
CLUSTERS_NAME = "clusters"  # in the system folder
OWNER_SUFFIX = ".data-folder"  # of a file beside a cluster there
INITDB_OPTIONS = (
    *("--username", "postgres", "--encoding", "UTF8", "--locale", "C"),
    *("--auth", "trust", "--no-instructions"),  # only the owner can enter the socket's folder: that is the protection
)


@dataclass(frozen=True)
class Cluster:
    """An existing cluster, its owner, binaries of its version that its owner can run, and the folder of its socket."""

    path: Path
    user: PostgresUser
    binaries: PostgresBinaries
    socket_dir: Path


def open_cluster(
    data_dir: Path, run_as: str, system_dir: Path, log: PostgresLog, *, durable: bool, name: str = CLUSTER_NAME
) -> Cluster:
    """Return the cluster of `data_dir`, created if there is none. The caller holds the lock of the data folder.

    The cluster is `data_dir/name`. If this process is root and the Postgres user can't pass the folders above
    `data_dir`, which are never changed, that name is a link into `system_dir`.

    Raises:
        EmbeddedPostgresError: the cluster can't be used or created; the text says what to do.
    """
    with explain_os_errors(data_dir):
        remove_unfinished(data_dir, system_dir)
        link = data_dir / name
        if os.path.lexists(link) and not _is_empty_folder(link):
            path = _resolve_cluster(link)
            _refuse_copied_link(data_dir, path, system_dir)
            user = _owner_of(path, data_dir)
            binaries = reachable_binaries(binaries_of_cluster(_major_of(path), data_dir), user, system_dir)
        else:
            user = find_user(run_as)
            binaries = reachable_binaries(find_binaries(), user, system_dir)
            _make_cluster(link, system_dir, _Initdb(user, binaries, log, durable=durable))
            path = link.resolve(strict=True)
        return Cluster(path, user, binaries, open_socket_folder(data_dir, path, user))


def remove_cluster(data_dir: Path) -> None:
    """Delete the cluster of a data folder with all its data, for tests and for starting over."""
    link = data_dir / CLUSTER_NAME
    if os.path.lexists(link):
        _remove(link)


def _major_of(path: Path) -> int:
    """Return the major version of Postgres that created a cluster.

    Raises:
        EmbeddedPostgresError: the cluster does not say.
    """
    version = (path / "PG_VERSION").read_text().strip()
    try:
        return int(version.split(".")[0])
    except ValueError:
        msg = f"The cluster {path} is damaged: its PG_VERSION is {version!r}. Restore a backup into a new data folder."
        raise EmbeddedPostgresError(msg) from None


def _owner_of(path: Path, data_dir: Path) -> PostgresUser:
    """Return the owner of a cluster: Postgres runs only as that user."""
    owner_uid = path.stat().st_uid
    user = user_of_uid(owner_uid)
    if owner_uid == 0:
        msg = f"The cluster {path} belongs to root, and Postgres refuses to run as root: chown -R it to another user."
    elif os.geteuid() not in (0, owner_uid):
        msg = f"The cluster {path} belongs to {user.name}: start the service as that user or as root."
    elif not _let_enter(user, path, data_dir):
        msg = (
            f"User {user.name}, whose cluster {path} is, can't get through the folders above it: let it pass "
            f"(chmod o+x), or move {data_dir} to where it can."
        )
    else:
        return user
    raise EmbeddedPostgresError(msg)


def _resolve_cluster(link: Path) -> Path:
    """Return the folder of the cluster.

    Raises:
        EmbeddedPostgresError: the folder is missing, or holds something else.
    """
    try:
        path = link.resolve(strict=True)
    except FileNotFoundError as error:
        msg = f"The cluster {link.readlink()} of {link} is gone: bring it back, or remove the link to start empty."
        raise EmbeddedPostgresError(msg) from error
    if not (path / "PG_VERSION").is_file():
        msg = f"{path} holds something else than a Postgres cluster: move it away, or choose another --data-dir."
        raise EmbeddedPostgresError(msg)
    return path


def _refuse_copied_link(data_dir: Path, path: Path, system_dir: Path) -> None:
    """Refuse a data folder that is a copy of another one: the copied link leads to the same cluster.

    A file next to each cluster in `system_dir` names its data folder. It also shows people what may be deleted there.
    """
    if path.parent != system_dir / CLUSTERS_NAME:
        return
    record = path.with_suffix(OWNER_SUFFIX)
    owner = Path(record.read_text().rstrip("\n")) if record.is_file() else data_dir
    if owner != data_dir and (owner / CLUSTER_NAME).resolve() == path:
        msg = (
            f"The cluster {path} is that of {owner}, and {data_dir} is a copy of its link alone: remove "
            f"{data_dir / CLUSTER_NAME} to start empty, or {owner / CLUSTER_NAME} to let this folder have it."
        )
        raise EmbeddedPostgresError(msg)
    record.write_text(f"{data_dir}\n")


def _is_empty_folder(path: Path) -> bool:
    """Return whether `path` is an empty folder and not a link."""
    return not path.is_symlink() and path.is_dir() and not any(path.iterdir())


def _let_enter(user: PostgresUser, path: Path, data_dir: Path) -> bool:
    """Grant search permission on the data folder if only that is missing; return whether `user` can enter `path`."""
    if user.can_enter(path):
        return True
    if not user.is_another or not path.is_relative_to(data_dir) or not user.can_enter(data_dir.parent):
        return False
    data_dir.chmod(stat.S_IMODE(data_dir.stat().st_mode) | stat.S_IXGRP | stat.S_IXOTH)
    return user.can_enter(path)


class _Initdb:
    """A run of initdb: its user, binaries, log and options."""

    def __init__(self, user: PostgresUser, binaries: PostgresBinaries, log: PostgresLog, *, durable: bool) -> None:
        self.user = user
        self._binaries = binaries
        self._log = log
        self._options = INITDB_OPTIONS if durable else (*INITDB_OPTIONS, "--no-sync")

    def run(self, folder: Path) -> None:
        """Create a cluster in `folder`, which is empty and belongs to the user.

        Raises:
            EmbeddedPostgresError: initdb failed; the text quotes its log.
        """
        self._log.mark()
        command = (self._binaries.initdb, "--pgdata", folder, *self._options)
        with self._log.open() as output:
            process = self.user.start(command, signal.SIGTERM, output)
        try:
            status = process.wait()
        except BaseException:  # the service is being stopped
            process.kill()
            process.wait()
            raise
        if status != 0:
            msg = f"initdb could not make the cluster (status {status})"
            raise self._log.error(msg)


def _make_cluster(link: Path, system_dir: Path, initdb: _Initdb) -> None:
    """Create the cluster `link` under a temporary name and rename it when complete, so a kill leaves only litter.

    The name is new each time, because an initdb whose service was killed may still write for a moment.
    """
    data_dir = link.parent
    unfinished = data_dir / unfinished_name()
    initdb.user.make_folder(unfinished)
    if not _let_enter(initdb.user, unfinished, data_dir):
        unfinished.rmdir()
        target = make_open_folder(system_dir / CLUSTERS_NAME) / secrets.token_hex(8)
        unfinished.symlink_to(target)  # before its target, so that the litter can always be found
        initdb.user.make_folder(target)
        target.with_suffix(OWNER_SUFFIX).write_text(f"{data_dir}\n")
    try:
        initdb.run(unfinished.resolve())
        finish_cluster(unfinished, link)
    except BaseException:  # also when the service is being stopped
        _remove(unfinished)
        raise


def unfinished_name() -> str:
    """Return a new name for a cluster that is not complete: the next start removes it."""
    return f"{UNFINISHED_PREFIX}{secrets.token_hex(4)}"


def finish_cluster(unfinished: Path, link: Path) -> None:
    """Give a complete cluster, which does not run, its final name."""
    if _is_empty_folder(link):
        link.rmdir()
    unfinished.rename(link)
    _sync(link.parent)


def has_cluster(data_dir: Path) -> bool:
    """Return whether the data folder has a cluster, or something else of its name."""
    link = data_dir / CLUSTER_NAME
    return os.path.lexists(link) and not _is_empty_folder(link)


def remove_unfinished(data_dir: Path, system_dir: Path) -> None:
    """Remove what an interrupted start or restore left."""
    for unfinished in data_dir.glob(f"{UNFINISHED_PREFIX}*"):
        if not unfinished.is_symlink() or unfinished.readlink().parent == system_dir / CLUSTERS_NAME:
            _remove(unfinished)


def _remove(path: Path) -> None:
    """Remove a folder, or a link and its target. What can't be removed now stays for the next start."""
    folder = path.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    if path.is_symlink():
        folder.with_suffix(OWNER_SUFFIX).unlink(missing_ok=True)
        path.unlink()


def _sync(folder: Path) -> None:
    """Write the folder's entries to disk, so that a new name survives a power cut."""
    file = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(file)
    finally:
        os.close(file)
