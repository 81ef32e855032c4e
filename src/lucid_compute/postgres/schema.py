"""Schema migrations: revisions, upgrade, downgrade and check, by one replica at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

import lucid_compute
from lucid_compute.postgres.changes import adopt_rows
from lucid_compute.postgres.database import SLOW_CONNECT_TIMEOUT_SECONDS, DatabaseNotUsable, check_usable, connect
from lucid_compute.postgres.embedded import open_embedded_database

SCHEMA_LOCK = 0x6C756369  # the number of an advisory lock: "luci" in ASCII
_VERSION_SQL = "SELECT version_num FROM alembic_version"


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
    return str(_scripts().get_current_head())


async def revision_of(connection: AsyncConnection) -> str | None:
    """Return the revision of the connection's database."""
    revision: str | None = await connection.scalar(text(_VERSION_SQL))
    return revision


async def current_revision(url: str) -> str | None:
    """Return the revision of the database; None when it is empty."""
    connection = await connect(url, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
    try:
        if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
            return None
        revision: str | None = await connection.fetchval(_VERSION_SQL)
        return revision
    finally:
        await connection.close()


async def upgrade(url: str, revision: str = "head") -> None:
    """Upgrade the database to `revision`; replicas that start together wait for the one that does it.

    Raises:
        DatabaseNotUsable: a newer version of the code has migrated the database, or there is no such revision.
    """
    if revision == "head" and await current_revision(url) == head_revision():
        return
    await _run(url, lambda config: command.upgrade(config, revision))


async def downgrade(url: str, revision: str) -> None:
    """Downgrade the database to `revision`; `base` removes every table."""
    await _run(url, lambda config: command.downgrade(config, revision))


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


async def _run(url: str, step: Callable[[Config], object]) -> None:
    await run_locked(url, lambda connection: step(_config(connection)))


async def run_locked(url: str, step: Callable[[Connection], object]) -> None:
    """Run `step` in one transaction under the schema's advisory lock, so that only one replica migrates at a time.

    Raises:
        DatabaseNotUsable: a newer version of the code has migrated the database, or there is no such revision.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(url, lock_timeout_seconds=0, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS),
        poolclass=NullPool,
    )
    try:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            await connection.run_sync(step)
    except CommandError as error:
        at = await current_revision(url)
        if at is None or at in known_revisions():
            raise DatabaseNotUsable(f"{str(error).rstrip('.')}.") from error
        message = (
            f"A newer version of lucid-compute has migrated this database: it is at {at}, and "
            f"{lucid_compute.__version__} knows up to {head_revision()}. Install the newer version, or restore a "
            "backup from before."
        )
        raise DatabaseNotUsable(message) from error
    finally:
        await engine.dispose()


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
