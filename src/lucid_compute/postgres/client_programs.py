"""Postgres's own client programs below this process: their environment, which holds the password, and their end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from math import ceil
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlsplit

from lucid_compute.postgres.connection_url import read_target
from lucid_compute.postgres.embedded import launcher

# Words of a Postgres URL that the driver gets, each with the variable that says the same to libpq.
_VARIABLES = {
    "database": "PGDATABASE",
    "dbname": "PGDATABASE",
    "gsslib": "PGGSSLIB",
    "krbsrvname": "PGKRBSRVNAME",
    "options": "PGOPTIONS",
    "passfile": "PGPASSFILE",
    "password": "PGPASSWORD",
    "service": "PGSERVICE",
    "servicefile": "PGSERVICEFILE",
    "ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
    "ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
    "sslcert": "PGSSLCERT",
    "sslcrl": "PGSSLCRL",
    "sslkey": "PGSSLKEY",
    "sslmode": "PGSSLMODE",
    "sslnegotiation": "PGSSLNEGOTIATION",
    "sslrootcert": "PGSSLROOTCERT",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
    "user": "PGUSER",
}
_DEFAULT_HOSTS = "/run/postgresql,/var/run/postgresql,/tmp,localhost"  # asyncpg's; the wheel's libpq has other ones
# Variables of libpq that would lead it elsewhere than asyncpg, which does not read them or puts the URL before them.
_NOT_INHERITED = {"PGHOSTADDR", "PGSERVICE", "PGOPTIONS", "PGTARGETSESSIONATTRS", "PGLOADBALANCEHOSTS", "PGTZ"}
_FILES = ("PGPASSFILE", "PGSERVICEFILE", "PGSSLCERT", "PGSSLCRL", "PGSSLKEY", "PGSSLROOTCERT")
_KEPT_BYTES = 16_384


class ProgramFailed(Exception):
    """A program ended with an error. The text is the last that it said on stderr."""


def environment_of(url: str, application: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment in which libpq connects as asyncpg does by `url` and by the variables `inherited`.

    So no password and no key is on a command line, which every user of the machine can read.

    Raises:
        DatabaseNotUsable: `url` is not a Postgres URL.
    """
    target = read_target(url)
    parts = urlsplit(target.url)
    user, _, password = parts.netloc.rpartition("@")[0].partition(":")
    said = {
        "PGHOST": ",".join(server.host or "" for server in target.servers),
        "PGPORT": ",".join(str(server.port or "") for server in target.servers),
        "PGUSER": unquote(user),
        "PGPASSWORD": unquote(password),
        "PGDATABASE": unquote(parts.path.removeprefix("/")),
        "PGCONNECT_TIMEOUT": str(ceil(target.connect_timeout_seconds or 0) or ""),
    }
    options = [] if target.search_path is None else [f"-c search_path={_escaped(target.search_path)}"]
    for word, value in parse_qsl(parts.query):
        if (variable := _VARIABLES.get(word)) is not None:
            said[variable] = said.get(variable) or value
        else:  # asyncpg takes it for a setting of the session
            options.append(f"-c {word}={_escaped(value)}")
    said["PGOPTIONS"] = " ".join(filter(None, [said.get("PGOPTIONS"), *options]))
    kept = {name: value for name, value in inherited.items() if name not in _NOT_INHERITED}
    named = {name: value for name, value in said.items() if value.strip(",")}
    environment = {"PGHOST": _DEFAULT_HOSTS, **kept, **named, "PGAPPNAME": application, "LC_ALL": "C"}
    files = {name: environment[name] for name in _FILES if environment.get(name, "system") != "system"}
    return environment | {name: str(Path(path).absolute()) for name, path in files.items()}  # a program runs in /


def _escaped(value: str) -> str:
    """Return a value for PGOPTIONS, where spaces separate and backslashes escape."""
    return value.replace("\\", "\\\\").replace(" ", "\\ ")


class RunningProgram:
    """A program that runs, and what it complains of."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._complaints = asyncio.create_task(_last_of(process.stderr))

    async def read(self, size: int = -1) -> bytes:
        """Return up to `size` bytes that it writes, or all of them; nothing when it has ended."""
        return b"" if self._process.stdout is None else await self._process.stdout.read(size)

    async def read_line(self) -> bytes:
        """Return one line that it writes; nothing when it has ended."""
        return b"" if self._process.stdout is None else await self._process.stdout.readline()

    async def feed(self, text: bytes) -> None:
        """Have it read the text.

        Raises:
            ProgramFailed: it ended before.
        """
        if self._process.stdin is None:
            return
        try:
            self._process.stdin.write(text)
            await self._process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            await self.finish()
            raise ProgramFailed("It ended early.") from None

    async def finish(self) -> None:
        """Have it read no more, and return when it has ended well.

        Raises:
            ProgramFailed: it ended with an error.
        """
        if self._process.stdin is not None:
            self._process.stdin.close()
        status = await self._process.wait()
        if status != 0:
            raise ProgramFailed(await self._complaints or f"It ended with status {status}.")

    async def kill(self) -> None:
        """End it if it still runs, and wait for its end."""
        with suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        await asyncio.wait([self._complaints])


@asynccontextmanager
async def running(
    program: Path, *arguments: str, environment: Mapping[str, str], reads: bool = False, writes: bool = False
) -> AsyncIterator[RunningProgram]:
    """Run a program for the block: `reads` opens a pipe to it, `writes` one from it.

    It is killed when the block ends or raises, and when this process dies.
    """
    started = RunningProgram(
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", launcher.__file__, str(os.getpid()), str(int(signal.SIGKILL))),
            *(str(launcher.STAY), str(launcher.STAY), str(program), *arguments),
            stdin=asyncio.subprocess.PIPE if reads else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE if writes else asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment,
        )
    )
    try:
        yield started
    finally:
        await started.kill()


async def _last_of(stream: asyncio.StreamReader | None) -> str:
    """Return the end of what a stream has, which is read to its end."""
    kept = b""
    while stream is not None and (piece := await stream.read(_KEPT_BYTES)):
        kept = (kept + piece)[-_KEPT_BYTES:]
    return kept.decode("utf-8", "replace").strip()
