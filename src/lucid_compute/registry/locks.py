"""Statements on the rows of passports and nodes, for callers inside a transaction: lock, change, drain, end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import RowMapping, Select, func, insert, or_, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.errors import Forbidden, NodeDeregistered, NodeNotFound, PassportNotFound
from lucid_compute.postgres.queries import ids_are_uuids, unnest_ids
from lucid_compute.postgres.tables import heartbeats, nodes, passports
from lucid_compute.registry.domain.passports import Passport, PassportStatus, PassportType
from lucid_compute.registry.fleet.rows import read_passport


async def lock_passport(connection: AsyncConnection, passport_id: str, visible_owner: str | None) -> RowMapping:
    """Lock the owner's passport until the transaction ends and return its row; `visible_owner` None locks any.

    Raises:
        PassportNotFound: there is no such passport, or it is another owner's.
        Forbidden: it is another owner's model, which everyone may see.
    """
    row: RowMapping | None = None
    if ids_are_uuids(passport_id):
        rows = await connection.execute(_select_visible(passport_id, visible_owner).with_for_update())
        row = rows.mappings().one_or_none()
    if row is None:
        raise PassportNotFound(passport_id)
    if visible_owner is not None and row["owner"] != visible_owner:
        message = "Only its owner or an admin may change this model's passport."
        raise Forbidden(message)
    return row


async def get_passport(connection: AsyncConnection, passport_id: str, visible_owner: str | None = None) -> Passport:
    """Return the owner's passport, or any model's; `visible_owner` None returns any.

    Raises:
        PassportNotFound: there is no such passport, or it is another owner's.
    """
    row = None
    if ids_are_uuids(passport_id):
        rows = await connection.execute(_select_visible(passport_id, visible_owner))
        row = rows.mappings().one_or_none()
    if row is None:
        raise PassportNotFound(passport_id)
    return read_passport(row)


def _select_visible(passport_id: str, visible_owner: str | None) -> Select[Any]:
    """Return a SELECT that finds no passport of another owner, just as it finds no missing one, and takes as long."""
    found = select(passports).where(passports.c.id == passport_id)
    if visible_owner is None:
        return found
    return found.where(or_(passports.c.owner == visible_owner, passports.c.type == PassportType.MODEL.value))


def update_passport(passport_id: str, **changes: Any) -> Any:
    """Return an UPDATE of one passport that the change feed delivers, and that returns its row."""
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


async def add_node_rows(connection: AsyncConnection, passport_ids: Sequence[str]) -> None:
    """Insert the rows of new compute passports that heartbeats and drains update."""
    for table in (nodes, heartbeats):
        await connection.execute(insert(table).from_select(["passport_id"], select(unnest_ids(passport_ids))))


async def lock_node(connection: AsyncConnection, passport_id: str, visible_owner: str | None) -> RowMapping:
    """Lock the owner's node, also an ended one, and return its row; `visible_owner` None locks any.

    Raises:
        NodeNotFound: there is no such node, or it is another owner's.
    """
    if not ids_are_uuids(passport_id):
        raise NodeNotFound(passport_id)
    columns = (passports.c.owner, passports.c.status, passports.c.deregistered_at, *nodes.c)
    statement = select(*columns).join_from(passports, nodes).where(passports.c.id == passport_id)
    if visible_owner is not None:
        statement = statement.where(passports.c.owner == visible_owner)
    row = (await connection.execute(statement.with_for_update())).mappings().one_or_none()
    if row is None:
        raise NodeNotFound(passport_id)
    return row


async def lock_registered_node(connection: AsyncConnection, passport_id: str, visible_owner: str | None) -> RowMapping:
    """Lock the owner's node that has not ended and return its row.

    Raises:
        NodeNotFound: there is no such node, or it is another owner's.
        NodeDeregistered: it was deregistered or revoked.
    """
    row = await lock_node(connection, passport_id, visible_owner)
    if has_ended(row):
        raise NodeDeregistered(passport_id)
    return row


def has_ended(row: RowMapping) -> bool:
    """Return whether the node of this row was deregistered or revoked."""
    return row["deregistered_at"] is not None or row["status"] == PassportStatus.REVOKED


async def change_node(connection: AsyncConnection, passport_id: str, **changes: Any) -> RowMapping:
    """Change the node's lifecycle so that the change feed delivers it; return its row."""
    statement = (
        update(nodes)
        .where(nodes.c.passport_id == passport_id)
        .values(revision=nodes.c.revision + 1, changed_xid=func.pg_current_xact_id(), **changes)
        .returning(nodes)
    )
    row: RowMapping = (await connection.execute(statement)).mappings().one()
    return row


async def drain_node(connection: AsyncConnection, passport_id: str) -> RowMapping:
    """Begin a drain and store this transaction's id with it; return the node's row."""
    xid = func.pg_current_xact_id()
    return await change_node(connection, passport_id, draining_since=func.now(), drain_xid=xid)


async def resume_node(connection: AsyncConnection, passport_id: str) -> RowMapping:
    """End the drain; return the node's row."""
    return await change_node(connection, passport_id, draining_since=None, drain_xid=None)


async def end_node(connection: AsyncConnection, passport_id: str) -> Passport:
    """Deregister the node; return its passport."""
    rows = await connection.execute(update_passport(passport_id, deregistered_at=func.now()))
    return read_passport(rows.mappings().one())
