"""The schema: bringing the database's tables to this version, one replica at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, text
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine
from sqlalchemy.pool import NullPool

from lucid_compute import __version__
from lucid_compute.storage.database import PATIENT_TIMEOUT_SECONDS, DatabaseNotUsable, connect
from lucid_compute.storage.tables import TransactionId

MIGRATIONS = Path(__file__).parent / "migrations"
SCHEMA_LOCK = 0x6C756369  # an advisory lock of our own: "luci"
_VERSION_SQL = "SELECT version_num FROM alembic_version"


@cache
def head_revision() -> str:
    """Answer the revision that this version of the code needs."""
    head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
    if head is None:  # pragma: no cover - a checkout without migrations
        message = "no migrations are installed"
        raise RuntimeError(message)
    return head


async def revision_of(connection: AsyncConnection) -> str | None:
    """Answer the revision of the database that a connection leads to."""
    revision: str | None = await connection.scalar(text(_VERSION_SQL))
    return revision


async def current_revision(url: str) -> str | None:
    """Answer the revision that the database is at; None when it is empty."""
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
    _know_xid8()
    await _run(url, command.check)


async def revise(url: str, message: str) -> None:
    """Write the next migration from what `tables` says beyond the database: for people who change the tables."""
    _know_xid8()
    await _run(url, lambda config: command.revision(config, message, autogenerate=True))


def _know_xid8() -> None:
    """Teach SQLAlchemy to read `xid8` columns back, for the comparison with what `tables` says."""
    ischema_names["xid8"] = TransactionId


async def _run(url: str, step: Callable[[Config], object]) -> None:
    engine = create_async_engine(
        "postgresql+asyncpg://",
        async_creator=lambda: connect(url, lock_timeout_seconds=0, timeout_seconds=PATIENT_TIMEOUT_SECONDS),
        poolclass=NullPool,
    )
    try:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": SCHEMA_LOCK})
            await connection.run_sync(lambda sync: step(_config(sync)))
    except CommandError as error:
        at = await current_revision(url)
        if at is None or at in _known_revisions():
            raise DatabaseNotUsable(f"{error}.") from error
        message = (
            f"A newer version of lucid-compute has migrated this database: it is at {at}, and {__version__} knows up "
            f"to {head_revision()}. Install the newer version, or restore a backup from before."
        )
        raise DatabaseNotUsable(message) from error
    finally:
        await engine.dispose()


def _known_revisions() -> set[str]:
    return {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.set_main_option("file_template", "%%(year)d-%%(month).2d-%%(day).2d-%%(hour).2d%%(minute).2d_%%(slug)s")
    config.set_main_option("timezone", "UTC")
    config.attributes["connection"] = connection
    return config
