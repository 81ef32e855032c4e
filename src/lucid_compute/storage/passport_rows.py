"""The rows of passports, inside a transaction: locked, read, changed."""

from __future__ import annotations

from typing import Any

from sqlalchemy import RowMapping, func, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import Forbidden, PassportNotFound
from lucid_compute.passports import Passport, PassportType
from lucid_compute.storage.passport_search import ids_are_uuids
from lucid_compute.storage.rows import read_passport
from lucid_compute.storage.tables import passports


async def lock_passport(connection: AsyncConnection, passport_id: str, sees: str | None) -> RowMapping:
    """Answer the owner's passport until the transaction ends; `sees` None locks any.

    Raises:
        PassportNotFound: there is none.
        Forbidden: it is another owner's model, which everyone may see.
    """
    row = None
    if ids_are_uuids(passport_id):
        rows = await connection.execute(select(passports).where(passports.c.id == passport_id).with_for_update())
        row = rows.mappings().one_or_none()
    if row is None or (sees is not None and row["owner"] != sees and row["type"] != PassportType.MODEL):
        raise PassportNotFound(passport_id)
    if sees is not None and row["owner"] != sees:
        message = "Only its owner or an admin may change this model's passport."
        raise Forbidden(message)
    return row


async def get_passport(connection: AsyncConnection, passport_id: str) -> Passport:
    """Answer a passport.

    Raises:
        PassportNotFound: there is none.
    """
    row = None
    if ids_are_uuids(passport_id):
        rows = await connection.execute(select(passports).where(passports.c.id == passport_id))
        row = rows.mappings().one_or_none()
    if row is None:
        raise PassportNotFound(passport_id)
    return read_passport(row)


def update_passport(passport_id: str, **changes: Any) -> Any:
    """Answer an UPDATE of one passport that the feed will notice, and that returns its row."""
    return (
        update(passports)
        .where(passports.c.id == passport_id)
        .values(
            updated_at=func.now(),
            revision=passports.c.revision + 1,
            changed_xid=func.pg_current_xact_id(),
            **changes,
        )
        .returning(passports)
    )
