"""A real primary with a streaming standby, of the embedded binaries: cut it off, kill the primary, promote it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import asyncpg

from lucid_compute.postgres.embedded import EmbeddedPostgres
from lucid_compute.postgres.embedded.socket_folder import PORT, SOCKET_NAME

# A process that is killed loses nothing that the system has: nothing has to reach a disk.
OPTIONS = ("fsync=off", "wal_level=replica", "max_wal_senders=4", "autovacuum=off", "wal_receiver_status_interval=1")
START_SECONDS = 60.0
POLL_SECONDS = 0.02


class Pair:
    """A primary and its standby; `url` names both, the primary first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._primary = EmbeddedPostgres(folder / "primary", options=OPTIONS)
        self._standby: subprocess.Popen[bytes] | None = None
        self._data = folder / "standby"

    def __enter__(self) -> Self:
        """Start both, the standby from a base backup."""
        try:
            self._primary.start()
            self._copy()
            self._start_standby()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill both."""
        self._end()

    @property
    def url(self) -> str:
        """Both servers, in one URL."""
        assert self._primary._cluster is not None
        folders = f"{self._primary._cluster.socket_dir},{self._data}"
        return f"postgresql://postgres@/postgres?host={folders}&port={PORT}&target_session_attrs=read-write"

    async def on_primary(self, statement: str) -> Any:
        """Run one statement on the first primary; return its value."""
        assert self._primary._cluster is not None
        return await run(self._primary._cluster.socket_dir, statement)

    async def on_standby(self, statement: str) -> Any:
        """Run one statement on the standby, or what it became; return its value."""
        return await run(self._data, statement)

    async def catch_up(self) -> None:
        """Return when the standby shows everything that is committed."""
        written = await self.on_primary("SELECT pg_current_wal_lsn()::text")
        await self._eventually(lambda: self.on_standby(f"SELECT pg_last_wal_replay_lsn() >= '{written}'"))

    async def cut(self) -> None:
        """Let the standby receive nothing more, and return when it does not."""
        await self.on_standby("ALTER SYSTEM SET primary_conninfo = ''")
        await self.on_standby("SELECT pg_reload_conf()")
        await self._eventually(lambda: self.on_primary("SELECT count(*) = 0 FROM pg_stat_replication"))

    async def wait_for_standby(self) -> None:
        """Commit nothing from now on that the standby does not have."""
        await self.on_primary("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await self.on_primary("SELECT pg_reload_conf()")
        await self._eventually(lambda: self.on_primary("SELECT sync_state = 'sync' FROM pg_stat_replication"))

    async def _eventually(self, holds: Callable[[], Awaitable[Any]]) -> None:
        async with asyncio.timeout(START_SECONDS):
            while not await holds():  # noqa: ASYNC110 - Postgres sets no event of ours
                await asyncio.sleep(POLL_SECONDS)

    def kill_primary(self) -> None:
        """End the primary at once, without a word to anybody."""
        self._primary.stop(immediately=True)

    async def promote(self) -> None:
        """Make the standby a primary, and return when it is."""
        assert await self.on_standby("SELECT pg_promote()")

    def _copy(self) -> None:
        cluster = self._primary._cluster
        assert cluster is not None
        cluster.user.make_folder(self._data)
        program = cluster.binaries.postgres.with_name("pg_basebackup")
        where = ("--host", cluster.socket_dir, "--port", str(PORT), "--username", "postgres", "--pgdata", self._data)
        how = ("--write-recovery-conf", "--checkpoint=fast", "--wal-method=stream", "--no-sync")
        self._run(program, *where, *how)

    def _run(self, *command: str | Path) -> None:
        cluster = self._primary._cluster
        assert cluster is not None
        log = self._folder / "backup.log"
        with log.open("ab") as output:
            assert cluster.user.start(command, signal.SIGKILL, output).wait(START_SECONDS) == 0, log.read_text()

    def _start_standby(self) -> None:
        cluster, log = self._primary._cluster, self._folder / "standby.log"
        assert cluster is not None
        settings = (f"port={PORT}", "listen_addresses=", "hot_standby=on", *OPTIONS)
        options = (word for setting in settings for word in ("-c", setting))
        command: list[str | Path] = [cluster.binaries.postgres, "-D", self._data, "-k", self._data, *options]
        (self._data / f"{SOCKET_NAME}.lock").unlink(missing_ok=True)  # the primary's, which was copied
        with log.open("ab") as output:
            self._standby = cluster.user.start(command, signal.SIGINT, output)
        deadline, status = time.monotonic() + START_SECONDS, self._data / "postmaster.pid"
        while not (status.exists() and status.read_text().splitlines()[7:] and "standby" in status.read_text()):
            assert self._standby.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(POLL_SECONDS)

    def _end(self) -> None:
        if self._standby is not None:
            self._standby.send_signal(signal.SIGQUIT)
            self._standby.wait(START_SECONDS)
        self._primary.stop(immediately=True)


async def run(folder: Path, statement: str) -> Any:
    """Run one statement on the server whose socket is in the folder; return its first value."""
    connection = await asyncpg.connect(host=str(folder), port=PORT, user="postgres", database="postgres")
    try:
        return await connection.fetchval(statement)
    finally:
        await connection.close()
