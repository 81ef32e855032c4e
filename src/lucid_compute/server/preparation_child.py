"""Runs the preparation in a short-lived child process, which reports over a pipe.

It is a child because the supervisor forks workers later, and must never have had an event loop or a thread.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
from pathlib import Path
from typing import NamedTuple, Protocol

from lucid_compute.accounting.payouts.revenue import Terms
from lucid_compute.server.preparation import sentence_of
from lucid_compute.server.processes import ServiceError, ending, fork
from lucid_compute.server.settings import Settings

log = logging.getLogger(__name__)


class PreparationResult(Protocol):
    """The result of a preparation: the admin key if it was just created, and the file with it."""

    @property
    def admin_key(self) -> str | None:
        """The key; None when there was one already."""

    @property
    def admin_key_file(self) -> Path | None:
        """The file with it; None when there is none."""


class Prepare(Protocol):
    """Migrate the database and make sure that there is an admin key."""

    async def __call__(
        self, database_url: str, *, data_dir: Path, bootstrap_admin_key: str | None, terms: Terms
    ) -> PreparationResult:
        """Return when the database is ready."""


class Report(NamedTuple):
    """A `PreparationResult` that came through the pipe."""

    admin_key: str | None
    admin_key_file: Path | None


def prepare_in_child(prepare: Prepare, settings: Settings, database_url: str, data_dir: Path) -> Report:
    """Run `prepare` in a child and return its report.

    Raises:
        ServiceError: it failed; the text is one sentence.
    """
    key = settings.bootstrap_admin_key

    async def run() -> dict[str, str | None]:
        bootstrap_key = key.get_secret_value() if key else None
        prepared = await prepare(
            database_url, data_dir=data_dir, bootstrap_admin_key=bootstrap_key, terms=settings.terms
        )
        file = prepared.admin_key_file
        return {"admin_key": prepared.admin_key, "admin_key_file": None if file is None else str(file)}

    reader, writer = os.pipe()

    def child() -> int:
        try:
            report = asyncio.run(run())
        except Exception as error:  # of any kind: the operator gets one sentence
            log.debug("the preparation failed", exc_info=True)
            report = {"error": sentence_of(error)}
        os.write(writer, json.dumps(report).encode())
        return 0

    pid = fork(child)
    os.close(writer)
    return _read_report(pid, reader)


def _read_report(pid: int, reader: int) -> Report:
    """Return what the child reports until its end, and reap it."""
    try:
        with os.fdopen(reader, "rb") as pipe:
            text = pipe.read()
    except BaseException:  # such as StopRequested
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    _, status = os.waitpid(pid, 0)
    if not text:
        msg = f"Preparing the database ended without a word ({ending(os.waitstatus_to_exitcode(status))}): start again."
        raise ServiceError(msg)
    report = json.loads(text)
    if "error" in report:
        raise ServiceError(report["error"])
    file = report["admin_key_file"]
    return Report(report["admin_key"], Path(file) if file else None)
