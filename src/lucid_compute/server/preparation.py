"""Prepares the database before any replica serves: migrations, an admin key, and the terms of payouts."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from lucid_compute.accounting.payouts.revenue import DEFAULT_TERMS, Terms
from lucid_compute.accounting.payouts.store import record_terms
from lucid_compute.postgres import revisions
from lucid_compute.postgres.changes import adopt_restored_rows
from lucid_compute.postgres.database import Database, check_usable
from lucid_compute.registry.keys import store as key_store

ADMIN_KEY_FILE = "admin.key"


class Prepared(NamedTuple):
    """`admin_key` is set only if it was just created; `admin_key_file` is the file with a valid one."""

    admin_key: str | None
    admin_key_file: Path | None


async def prepare(
    database_url: str, *, data_dir: Path, bootstrap_admin_key: str | None, terms: Terms = DEFAULT_TERMS
) -> Prepared:
    """Migrate, one replica at a time, and make sure that there is an admin key and that prices are split by `terms`.

    Raises:
        DatabaseNotUsable: the database can't be used; a sentence says what to change.
    """
    await check_usable(database_url)
    if not await revisions.fits(database_url):
        from lucid_compute.postgres import schema  # noqa: PLC0415 - Alembic, which only a migration needs

        await schema.upgrade(database_url)
    await adopt_restored_rows(database_url)
    file = AdminKeyFile(data_dir / ADMIN_KEY_FILE)
    database = Database(database_url, pool_size=1, timeout_seconds=30)
    try:
        await record_terms(database, terms)
        admin_key = await key_store.bootstrap(database, bootstrap_admin_key, file.write)
        is_kept = await key_store.is_valid(database, file.read())
    finally:
        await database.close()
    return Prepared(admin_key, file.path if is_kept else None)


def sentence_of(error: Exception) -> str:
    """Return one sentence about an error of the preparation; our own errors say what to do."""
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if type(error).__module__.startswith("lucid_compute."):
        return text
    if isinstance(error, OSError):
        return f"The database can't be reached ({text}): check that Postgres runs and what LUCID_DATABASE_URL says."
    return (
        f"The database can't be prepared ({type(error).__name__}: {text}): check LUCID_DATABASE_URL; "
        "LUCID_LOG_LEVEL=DEBUG shows where."
    )


class AdminKeyFile:
    """The file with the first admin key, which only its owner can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> str | None:
        """Return the key in the file; None when it can't be read."""
        try:
            return self.path.read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None

    def write(self, admin_key: str) -> None:
        """Replace the file, mode 0600; in a folder that can't be written the key is only printed."""
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.unlink(missing_ok=True)
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(f"{admin_key}\n")
                file.flush()
                os.fsync(descriptor)
