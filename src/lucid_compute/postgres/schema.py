"""The schema: bringing the database's tables to this version, one replica at a time."""

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
from lucid_compute.postgres.database import PATIENT_TIMEOUT_SECONDS, DatabaseNotUsable, check_usable, connect
from lucid_compute.postgres.embedded import visit

SCHEMA_LOCK = 0x6C756369  # an advisory lock of our own: "luci"
_VERSION_SQL = "SELECT version_num FROM alembic_version"


@cache
def migrations_folder() -> Path:
    """Return the folder of the migrations: inside the package of a wheel, at the repository's top in a clone.

    Raises:
        DatabaseNotUsable: neither is there.
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
    """Return the revision of the database that a connection leads to."""
    revision: str | None = await connection.scalar(text(_VERSION_SQL))
    return revision


async def current_revision(url: str) -> str | None:
    """Return the revision that the database is at; None when it is empty."""
    connection = await connect(url, timeout_seconds=PATIENT_TIMEOUT_SECONDS)
    try:
        if await connection.fetchval("SELECT to_regclass('alembic_version')") is None:
            return None
        revision: str | None = await connection.fetchval(_VERSION_SQL)
        return revision
    finally:
        await connection.close()


async def upgrade(url: str, revision: str = "head") -> None:
    """Bring the database up to `revision`; replicas that start together wait for the one that does it.

    Raises:
        DatabaseNotUsable: a newer version than this one has migrated it, or there is no such revision.
    """
    if revision == "head" and await current_revision(url) == head_revision():
        return
    await _run(url, lambda config: command.upgrade(config, revision))


async def downgrade(url: str, revision: str) -> None:
    """Take the database back to `revision` (`base`: to nothing)."""
    await _run(url, lambda config: command.downgrade(config, revision))


async def adopt_restored_rows(url: str) -> None:
    """Give rows of a dump from another cluster, whose transactions lie ahead of this one's, the present transaction.

    Without it the feed would read them at every poll, and a drain among them would never be known as applied.
    """
    connection = await connect(url, lock_timeout_seconds=0, timeout_seconds=PATIENT_TIMEOUT_SECONDS)
    try:
        for table in ("passports", "nodes", "api_keys", "heartbeat_batches"):
            ahead = f"UPDATE {table} SET changed_xid = pg_current_xact_id() WHERE changed_xid > pg_current_xact_id()"
            await connection.execute(ahead)
        await connection.execute(
            "UPDATE nodes SET drain_xid = pg_current_xact_id() WHERE drain_xid > pg_current_xact_id()"
        )
    finally:
        await connection.close()


async def check(url: str) -> None:
    """Refuse a database whose tables differ from what `tables` says.

    Raises:
        DatabaseNotUsable: naming the differences.
    """
    await _run(url, command.check)


@contextmanager
def open_database(url: str | None, data_dir: Path) -> Iterator[str]:
    """Yield the URL of the database that a command works on: `url`, else that of the data folder's own Postgres.

    To be used in the main thread, without an event loop.

    Raises:
        DatabaseNotUsable, EmbeddedPostgresError: with a sentence that says what to do.
    """
    with nullcontext(url) if url else visit(data_dir) as there:
        asyncio.run(check_usable(there))
        yield there


async def _run(url: str, step: Callable[[Config], object]) -> None:
    await run_locked(url, lambda connection: step(_config(connection)))


async def run_locked(url: str, step: Callable[[Connection], object]) -> None:
    """Take a step with the schema in one transaction, while every other replica waits.

    Raises:
        DatabaseNotUsable: a newer version than this one has migrated it, or there is no such revision.
    """
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(url, lock_timeout_seconds=0, timeout_seconds=PATIENT_TIMEOUT_SECONDS),
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
    """Return every revision that this version knows, the newest first."""
    return [script.revision for script in _scripts().walk_revisions()]


def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(migrations_folder()))


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config
