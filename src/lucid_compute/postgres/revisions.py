"""Revisions of the schema: what this version knows, what the database has, and whether the two fit.

Every worker asks this, so it reads the migrations' files and leaves Alembic to `schema`.
"""

from __future__ import annotations

import logging
import re
from functools import cache
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

import lucid_compute
from lucid_compute.postgres.database import SLOW_CONNECT_TIMEOUT_SECONDS, DatabaseNotUsable, connect

_VERSION_SQL = "SELECT version_num FROM alembic_version"
_HAS_COMPATIBILITY_SQL = "SELECT to_regclass('schema_compatibility') IS NOT NULL"
_OLDEST_SQL = "SELECT oldest_revision FROM schema_compatibility"
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
def known_revisions() -> list[str]:
    """Return every revision that this version of the code knows, newest first."""
    texts = [file.read_text() for file in (migrations_folder() / "versions").glob("*.py")]
    after = {_assigned("down_revision", text): revision for text in texts if (revision := _assigned("revision", text))}
    known: list[str] = []
    while (following := after.get(known[-1] if known else None)) is not None:
        known.append(following)
    return known[::-1]


def _assigned(name: str, text: str) -> str | None:
    """Return the revision that a migration's file assigns to `name`; None when that is None."""
    found = re.search(rf"""^{name}\b[^=\n]*= ["'](\w+)["']""", text, re.MULTILINE)
    return found and found[1]


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
    return (await read_revisions(url))[0]


async def read_revisions(url: str) -> tuple[str | None, str | None]:
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


async def fits(url: str) -> bool:
    """Return whether this version can serve on the database as it is; otherwise the database has to be migrated.

    Raises:
        DatabaseNotUsable: a newer version has migrated the database to what this version can't serve on.
    """
    at, oldest = await read_revisions(url)
    if at is None or at == head_revision():
        return at is not None
    if at in known_revisions():
        return False
    if misfit := judge_revision(at, oldest):
        raise DatabaseNotUsable(misfit)
    _log.info("a newer version has migrated the database to %s; this version still serves on it", at)
    return True
