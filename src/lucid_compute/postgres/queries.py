"""Parts of queries that several stores share: the order and the length of a list, ids, and the replicas' secret."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Table, asc, cast, desc, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import UUID as UUID_TYPE
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.tables import response_secret
from lucid_compute.wire import SortBy, SortOrder

COUNTED = 100_000
"""How far rows of tables without a bound are counted: about 30 ms."""


async def count_some(connection: AsyncConnection, table: Table, condition: ColumnElement[bool]) -> int:
    """Return the number of rows, up to `COUNTED`: one day, counting all of a table that only grows takes too long."""
    rows = select(table.c[0]).where(condition).limit(COUNTED).subquery()
    return int(await connection.scalar(select(func.count()).select_from(rows)) or 0)


def at_least(counted: int, offset: int, shown: int, limit: int) -> int:
    """Return the total of a list that was counted up to `COUNTED`: at least one more than a full page shows."""
    return max(counted, offset + shown + (shown == limit)) if counted == COUNTED else counted


def in_order(columns: Mapping[SortBy, Any], tie: Any, sort_by: SortBy, sort_order: SortOrder) -> tuple[Any, Any]:
    """Return the terms of a total ORDER BY: the column of `sort_by`, then `tie`, which is unique."""
    direction = asc if sort_order is SortOrder.ASCENDING else desc
    return direction(columns[sort_by]), tie


def ids_are_uuids(*ids: str) -> bool:
    """Return whether each id is a UUID in canonical form. Others match no row, and Postgres refuses to compare them."""
    try:
        return all(str(UUID(id_)) == id_ for id_ in ids)
    except ValueError:
        return False


def unnest_ids(ids: Sequence[str]) -> ColumnElement[str]:
    """Return a column that has one row for each id."""
    return func.unnest(cast(list(ids), ARRAY(UUID_TYPE(as_uuid=False))))


async def read_response_secret(database: Database) -> bytes:
    """Return the secret with which replicas seal the ids of responses.

    Raises:
        DatabaseUnavailable: Postgres did not respond in time.
    """
    async with database.transaction() as connection:
        return bytes(await connection.scalar(select(response_secret.c.secret)) or b"")
