"""The folder of the embedded Postgres's socket: the cluster itself, if its path is short and plain enough."""

from __future__ import annotations

import os
import re
import stat
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

from lucid_compute.postgres.embedded.processes import EmbeddedPostgresError, PostgresUser

PORT = 5432  # never a TCP port: it is part of the socket's name
SOCKET_NAME = f".s.PGSQL.{PORT}"
MAX_SOCKET_PATH_BYTES = 107  # sun_path of sockaddr_un, less its NUL
PLAIN_PATH = re.compile(r"[A-Za-z0-9/._+-]+")  # commas and quotes mean something to Postgres and to its clients
LINK_NAME = "postgres.socket"


def open_socket_folder(data_dir: Path, cluster: Path, user: PostgresUser) -> Path:
    """Return a folder for the socket of `cluster` that only `user` can enter.

    If the cluster's path is too long for a socket, it is a folder in the system's temporary folder. A link in the data
    folder names it, so that a start after a kill finds it again.

    Raises:
        EmbeddedPostgresError: no folder with a short path can be created.
    """
    if _fits(cluster):
        return cluster
    link = data_dir / LINK_NAME
    if link.is_symlink() and _is_private(link.readlink(), user):
        return link.readlink()
    link.unlink(missing_ok=True)
    folder = _make_short_folder(user)
    link.symlink_to(folder)
    return folder


def find_socket_folder(data_dir: Path, cluster: Path) -> Path:
    """Return the folder of the socket of `cluster` while its Postgres runs."""
    link = data_dir / LINK_NAME
    return link.readlink() if link.is_symlink() else cluster


def socket_url(folder: Path, database: str = "postgres") -> str:
    """Return the URL of a database by the socket in `folder`, for asyncpg and psql."""
    # With the port: a PGPORT in the caller's environment would choose another socket.
    return f"postgresql://postgres@/{quote(database, safe='')}?host={quote(str(folder))}&port={PORT}"


def remove_socket_folder(data_dir: Path) -> None:
    """Remove the short folder that was created for the socket, if any."""
    link = data_dir / LINK_NAME
    with suppress(OSError):  # it would only be litter
        folder = link.readlink()
        link.unlink()
        folder.rmdir()


def _make_short_folder(user: PostgresUser) -> Path:
    """Create a folder with a short path that `user` can enter."""
    for parent in dict.fromkeys((tempfile.gettempdir(), "/tmp")):  # noqa: S108 - made private by mkdtemp
        with suppress(OSError):
            folder = Path(tempfile.mkdtemp(prefix="lucid-", dir=parent))
            if user.is_another:
                os.chown(folder, user.uid, user.gid)
            if _fits(folder) and user.can_enter(folder):
                return folder
            folder.rmdir()
    msg = (
        "There is no folder of a short path for the socket of Postgres: set TMPDIR to one, or use a shorter --data-dir."
    )
    raise EmbeddedPostgresError(msg)


def _fits(folder: Path) -> bool:
    """Return whether a socket in `folder` can be bound and named in a URL."""
    fits = len(os.fsencode(folder / SOCKET_NAME)) <= MAX_SOCKET_PATH_BYTES
    return fits and PLAIN_PATH.fullmatch(str(folder)) is not None


def _is_private(folder: Path, user: PostgresUser) -> bool:
    """Return whether `folder` is a real folder that belongs to `user` and that no other user may enter."""
    try:
        status = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == user.uid and stat.S_IMODE(status.st_mode) == stat.S_IRWXU
