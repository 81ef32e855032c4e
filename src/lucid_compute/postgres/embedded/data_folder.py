"""The data folder: created if missing, and locked by one service at a time."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lucid_compute.postgres.embedded.processes import POLL_SECONDS, EmbeddedPostgresError

LOCK_NAME = "lucid.lock"
WAIT_FOR_OWNER_SECONDS = 5.0  # a service that is being killed holds its lock until the kernel is done with it


def make_data_folder(data_dir: Path) -> Path:
    """Create the data folder if missing, accessible only to this user; return its absolute path without links.

    Raises:
        EmbeddedPostgresError: the folder can't be created or used.
    """
    with explain_os_errors(data_dir):
        data_dir.parent.mkdir(parents=True, exist_ok=True)
        data_dir.mkdir(mode=0o700, exist_ok=True)
        return data_dir.resolve(strict=True)


@contextmanager
def explain_os_errors(data_dir: Path) -> Iterator[None]:
    """Turn an OSError of the block into an EmbeddedPostgresError about the data folder."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(data_dir) else ""
        msg = (
            f"The data folder {data_dir} cannot be used: {error.strerror or error}{where}; make it a folder with free "
            "space that this user may write, or choose another with --data-dir."
        )
        raise EmbeddedPostgresError(msg) from error


class DataFolderLock:
    """The right to run Postgres on a data folder. This process holds it from `acquire` to `release` or its end.

    POSIX record locks belong to a process: forked workers don't hold them, so the lock ends with the supervisor. The
    price: opening and closing the file a second time in the same process would release it.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._file: int | None = None

    def acquire(self, timeout_seconds: float = WAIT_FOR_OWNER_SECONDS) -> None:
        """Acquire the lock, and wait for an owner that is just ending. Do nothing if it is already held.

        Raises:
            EmbeddedPostgresError: another process holds the lock for longer than `timeout_seconds`.
        """
        if self._file is not None:
            return
        with explain_os_errors(self._data_dir):
            file = os.open(self._data_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                self._wait(file, time.monotonic() + timeout_seconds)
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            except BaseException:  # also when the service is being stopped
                os.close(file)
                raise
        self._file = file

    def release(self) -> None:
        """Release the lock. The file stays: if it were removed, two processes could lock two files of the same name."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _wait(self, file: int, deadline: float) -> None:
        """Wait until the lock is acquired."""
        while not _try_lock(file):
            if time.monotonic() > deadline:
                owner = os.pread(file, 32, 0).decode("ascii", "replace").strip() or "unknown"
                msg = (
                    f"The data folder {self._data_dir} belongs to the service of process {owner}: stop that one first, "
                    "choose another --data-dir, or give both the same LUCID_DATABASE_URL to run two replicas."
                )
                raise EmbeddedPostgresError(msg)
            time.sleep(POLL_SECONDS)


def _try_lock(file: int) -> bool:
    """Try to acquire the lock; return whether it succeeded."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX lets a system choose between EAGAIN and EACCES
        return False
    return True
