"""Schema migrations: revisions, upgrade, downgrade and check, by one replica at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from alembic import command, context, op
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

import lucid_compute
from lucid_compute.postgres.changes import adopt_rows
from lucid_compute.postgres.database import (
    SLOW_CONNECT_TIMEOUT_SECONDS,
    DatabaseNotUsable,
    check_usable,
    connect,
    sqlstate_of,
)
from lucid_compute.postgres.embedded import open_embedded_database

SCHEMA_LOCK = 0x6C756369  # the number of an advisory lock: "luci" in ASCII
MIGRATION_PATIENCE_SECONDS = 300.0
_IS_BUILT_SQL = "SELECT coalesce(bool_and(indisvalid), false) FROM pg_index WHERE indexrelid = to_regclass('{name}')"
LOCK_WAIT_SECONDS = 1  # requests queue up behind a migration that waits for a lock
_VERSION_SQL = "SELECT version_num FROM alembic_version"
_HAS_COMPATIBILITY_SQL = "SELECT to_regclass('schema_compatibility') IS NOT NULL"
_OLDEST_SQL = "SELECT oldest_revision FROM schema_compatibility"
_LOCK_SQLSTATES = {"55P03", "40P01"}  # a lock was not granted in time, or granting it would be a deadlock
_POLL_SECONDS = 0.05
_RETRY_SECONDS = 0.5
_log = logging.getLogger(__name__)


@cache
def migrations_folder() -> Path:
    """Return the folder of the migrations: inside the package in a wheel, at the top of the repository in a clone.

    Raises:
        DatabaseNotUsable: neither folder exists.
    """
    package = Path(lucid_compute.__file__).parent
    of_wheel, of_clone = package / "migrations", package.parents[1] / "migrations"
    for folder in (of_wheel, of_clone):
        if (folder / "env.py").is_file():
            return folder
    raise DatabaseNotUsable(f"No migrations are in {of_wheel} or {of_clone}. Install lucid-compute again.")


@cache
def head_revision() -> str:
    """Return the revision that this version of the code needs."""
    return known_revisions()[0]


async def find_misfit(connection: AsyncConnection) -> str | None:
    """Return why this version can't serve on the connection's database, as a sentence; None when it can."""
    revision: str | None = await connection.scalar(text(_VERSION_SQL))
    if revision == head_revision():
        return None
    oldest: str | None = None
    if await connection.scalar(text(_HAS_COMPATIBILITY_SQL)):
        oldest = await connection.scalar(text(_OLDEST_SQL))
    return judge_revision(revision, oldest)


def judge_revision(revision: str | None, oldest: str | None) -> str | None:
    """Return why this version can't serve on a database at `revision`, as a sentence; None when it can.

    It can serve at its own revision, and ahead of it as long as it knows `oldest`, the oldest revision that can serve.
    """
    known = known_revisions()
    if revision == known[0]:
        return None
    if revision is None or revision in known:
        return f"The database is at {revision or 'no revision'}. This version needs {known[0]}: `lucid db upgrade`."
    if oldest in known:
        return None
    return (
        f"A newer version of lucid-compute has migrated this database: it is at {revision}, and "
        f"{lucid_compute.__version__} knows up to {known[0]}. Install the newer version, or restore a backup from "
        "before."
    )


async def current_revision(url: str) -> str | None:
    """Return the revision of the database; None when it is empty."""
    return (await _read_revisions(url))[0]


async def _read_revisions(url: str) -> tuple[str | None, str | None]:
    """Return the database's revision, and the oldest that can serve on it; None for what it does not say."""
    connection = await connect(url, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
    try:
        revision = oldest = None
        if await connection.fetchval("SELECT to_regclass('alembic_version')") is not None:
            revision = await connection.fetchval(_VERSION_SQL)
        if await connection.fetchval(_HAS_COMPATIBILITY_SQL):
            oldest = await connection.fetchval(_OLDEST_SQL)
        return revision, oldest
    finally:
        await connection.close()


async def upgrade(url: str, revision: str = "head", *, patience_seconds: float = MIGRATION_PATIENCE_SECONDS) -> None:
    """Upgrade the database to `revision`; replicas that start together wait for the one that does it.

    A database that a newer version has migrated is left alone if this version can still serve on it.

    Raises:
        DatabaseNotUsable: this version can't serve on what a newer version has made of the database, there is no such
            revision, or a table was locked for longer than `patience_seconds`.
    """
    if revision == "head":
        at, oldest = await _read_revisions(url)
        if at == head_revision():
            return
        if at is not None and at not in known_revisions():
            if misfit := judge_revision(at, oldest):
                raise DatabaseNotUsable(misfit)
            _log.info("a newer version has migrated the database to %s; this version still serves on it", at)
            return
    await _run(url, lambda config: command.upgrade(config, revision), patience_seconds)


async def downgrade(url: str, revision: str) -> None:
    """Downgrade the database to `revision`; `base` removes every table."""
    await _run(url, lambda config: command.downgrade(config, revision))


def build_index(name: str, on: str) -> None:
    """Build an index within a migration while replicas write: after a commit, and in no transaction.

    A migration that was interrupted goes on: an index that is complete is kept, another one is built again. It waits as
    long as it must for transactions that are under way, because nobody waits behind it.
    """
    with op.get_context().autocommit_block():
        if context.is_offline_mode() or not op.get_bind().scalar(text(_IS_BUILT_SQL.format(name=name))):
            op.execute(f"SET lock_timeout = '{MIGRATION_PATIENCE_SECONDS:.0f}s'")
            try:
                op.execute(f"DROP INDEX CONCURRENTLY IF EXISTS {name}")
                op.execute(f"CREATE INDEX CONCURRENTLY {name} ON {on}")
            finally:
                op.execute(f"SET lock_timeout = '{LOCK_WAIT_SECONDS}s'")


async def adopt_restored_rows(url: str) -> None:
    """Call `adopt_rows` on a connection of its own."""
    connection = await connect(url, lock_timeout_seconds=0, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
    try:
        await adopt_rows(connection)
    finally:
        await connection.close()


async def check(url: str) -> None:
    """Refuse a database whose tables differ from `tables`.

    Raises:
        DatabaseNotUsable: they differ; the text names the differences.
    """
    await _run(url, command.check)


@contextmanager
def open_database(url: str | None, data_dir: Path) -> Iterator[str]:
    """Yield the URL of a command's database: `url` if given, else that of the embedded Postgres in the data folder.

    Call it in the main thread, without a running event loop.

    Raises:
        DatabaseNotUsable: the database can't be used; the text says what to change.
        EmbeddedPostgresError: the embedded Postgres can't be started; the text says what to do.
    """
    with nullcontext(url) if url else open_embedded_database(data_dir) as database_url:
        asyncio.run(check_usable(database_url))
        yield database_url


async def _run(
    url: str, step: Callable[[Config], object], patience_seconds: float = MIGRATION_PATIENCE_SECONDS
) -> None:
    await run_locked(url, lambda connection: step(_config(connection)), patience_seconds=patience_seconds)


async def run_locked(
    url: str, step: Callable[[Connection], object], *, patience_seconds: float = MIGRATION_PATIENCE_SECONDS
) -> None:
    """Run `step` under the schema's advisory lock, so that only one replica migrates at a time.

    `step` waits a second for each lock of a table, because requests queue up behind it. Then what it has not committed
    is undone, and it is run again, for `patience_seconds` in all.

    Raises:
        DatabaseNotUsable: a newer version of the code has migrated the database, there is no such revision, or another
            transaction has held a table for too long.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(
            url, lock_timeout_seconds=LOCK_WAIT_SECONDS, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS
        ),
        poolclass=NullPool,
    )
    try:
        async with engine.connect() as connection:
            await _take_turn(connection)
            await _run_patiently(connection, step, patience_seconds)
    except CommandError as error:
        at, oldest = await _read_revisions(url)
        misfit = None if at is None or at in known_revisions() else judge_revision(at, oldest)
        raise DatabaseNotUsable(misfit or f"{str(error).rstrip('.')}.") from error
    finally:
        await engine.dispose()


async def _take_turn(connection: AsyncConnection) -> None:
    """Wait for the schema's lock, which the session then holds until it ends.

    It asks again and again: a session that waited inside a statement would hold up CREATE INDEX CONCURRENTLY.
    """
    while not await connection.scalar(text(f"SELECT pg_try_advisory_lock({SCHEMA_LOCK})")):
        await connection.rollback()
        await asyncio.sleep(_POLL_SECONDS)
    await connection.commit()


async def _run_patiently(connection: AsyncConnection, step: Callable[[Connection], object], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            await connection.run_sync(step)
            await connection.commit()
        except DBAPIError as error:
            await connection.rollback()
            if sqlstate_of(error) not in _LOCK_SQLSTATES:
                raise
            if time.monotonic() >= deadline:
                message = (
                    "Another transaction holds a table that is to be migrated. Find it in pg_stat_activity, end it and "
                    "start again. Revisions that were reached stay."
                )
                raise DatabaseNotUsable(message) from error
            _log.info("a migration waits for another transaction, and is tried again")
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            return


@cache
def known_revisions() -> list[str]:
    """Return every revision that this version of the code knows, newest first."""
    return [script.revision for script in _scripts().walk_revisions()]


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(migrations_folder()))


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
