"""Schema migrations: upgrade, downgrade and check, by one replica at a time. Only what migrates imports this."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from alembic import command, context, op
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from lucid_compute.postgres.database import (
    SLOW_CONNECT_TIMEOUT_SECONDS,
    DatabaseNotUsable,
    check_usable,
    connect,
    sqlstate_of,
)
from lucid_compute.postgres.embedded import open_embedded_database
from lucid_compute.postgres.revisions import (
    fits,
    judge_revision,
    known_revisions,
    migrations_folder,
    read_revisions,
)

SCHEMA_LOCK = 0x6C756369  # the number of an advisory lock: "luci" in ASCII
MIGRATION_PATIENCE_SECONDS = 300.0
_IS_BUILT_SQL = "SELECT coalesce(bool_and(indisvalid), false) FROM pg_index WHERE indexrelid = to_regclass('{name}')"
LOCK_WAIT_SECONDS = 1  # requests queue up behind a migration that waits for a lock
_LOCK_SQLSTATES = {"55P03", "40P01"}  # a lock was not granted in time, or granting it would be a deadlock
_POLL_SECONDS = 0.05
_RETRY_SECONDS = 0.5
_log = logging.getLogger(__name__)


async def upgrade(url: str, revision: str = "head", *, patience_seconds: float = MIGRATION_PATIENCE_SECONDS) -> None:
    """Upgrade the database to `revision`; replicas that start together wait for the one that does it.

    A database that a newer version has migrated is left alone if this version can still serve on it.

    Raises:
        DatabaseNotUsable: this version can't serve on what a newer version has made of the database, there is no such
            revision, or a table was locked for longer than `patience_seconds`.
    """
    if revision != "head" or not await fits(url):
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
        at, oldest = await read_revisions(url)
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


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
