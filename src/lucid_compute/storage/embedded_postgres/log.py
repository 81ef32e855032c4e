"""The log of the embedded Postgres: bounded at each start, and quoted when something went wrong."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from lucid_compute.storage.embedded_postgres.processes import EmbeddedPostgresError

MAX_BYTES = 10 * 1024 * 1024
QUOTED_LINES = 8
QUOTED_BYTES = 4096


class PostgresLog:
    """One file that Postgres and initdb append to; the former one is kept beside it as `….1`."""

    def __init__(self, path: Path) -> None:
        """Nothing is written yet."""
        self.path = path
        self._mark = 0

    def open(self) -> BinaryIO:
        """Open it for a child to append to, readable by us alone."""
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        return os.fdopen(file, "ab")

    def mark(self) -> None:
        """Begin an attempt: `tail` answers what was logged since; a log that grew too long makes way for a new one."""
        size = self.path.stat().st_size if self.path.exists() else 0
        if size > MAX_BYTES:
            self.path.replace(f"{self.path}.1")
            size = 0
        self._mark = size

    def tail(self) -> str:
        """Answer the last lines of this attempt."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(self._mark, self.path.stat().st_size - QUOTED_BYTES))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.strip().splitlines()[-QUOTED_LINES:])

    def error(self, what: str) -> EmbeddedPostgresError:
        """Answer an error that says `what` went wrong, why as far as the log tells, and where to read on."""
        tail = self.tail()
        if "No space left on device" in tail:
            what = f"{what}: the disk is full, free some space and start again"
        ending = f" and ends with:\n{tail}" if tail else " and is empty"
        return EmbeddedPostgresError(f"{what}; its log is {self.path}{ending}")
