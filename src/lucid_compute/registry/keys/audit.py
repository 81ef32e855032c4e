"""The audit trail: who changed what, when and from where, in the same transaction as the change."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, insert, or_, select, true
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import at_least, count_some, in_order
from lucid_compute.postgres.tables import audit_log
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.keys.shapes import AuditView
from lucid_compute.wire import SortBy, SortOrder

# A row is written once and never changed; its action serves as its name.
_SORT_COLUMNS = {
    SortBy.CREATED_AT: audit_log.c.at,
    SortBy.UPDATED_AT: audit_log.c.at,
    SortBy.NAME: audit_log.c.action,
}


class Change(NamedTuple):
    """An action on a target; `before` and `after` are stored only as hashes."""

    action: str
    target_type: str
    target_id: str
    before: Any = None
    after: Any = None
    details: dict[str, Any] | None = None


class AuditQuery(NamedTuple):
    """Which changes to read; None sets no condition.

    `action` is an action or a group of them (`key`), `actor` an owner or a key's id. `until` itself is not included.
    """

    target_id: str | None = None
    action: str | None = None
    actor: str | None = None
    since: datetime | None = None
    until: datetime | None = None

    def condition(self) -> ColumnElement[bool]:
        """Return what selects these rows."""
        columns = audit_log.c
        conditions: list[ColumnElement[bool]] = [true()]
        if self.target_id is not None:
            conditions.append(columns.target_id == self.target_id)
        if self.action is not None:
            in_group = columns.action.startswith(f"{self.action}.", autoescape=True)
            conditions.append(or_(columns.action == self.action, in_group))
        if self.actor is not None:
            conditions.append(or_(columns.actor_owner == self.actor, columns.actor_key_id == self.actor))
        if self.since is not None:
            conditions.append(columns.at >= self.since)
        if self.until is not None:
            conditions.append(columns.at < self.until)
        return and_(*conditions)


async def record_change(connection: AsyncConnection, actor: Actor, change: Change) -> None:
    """Write one row of the trail in the connection's transaction."""
    await record_changes(connection, actor, (change,))


async def record_changes(connection: AsyncConnection, actor: Actor, changes: Iterable[Change]) -> None:
    """Write a row of the trail for each change in the connection's transaction."""
    rows = [
        {
            "actor_key_id": actor.key_id,
            "actor_owner": actor.owner,
            "action": change.action,
            "target_type": change.target_type,
            "target_id": change.target_id,
            "before_hash": _hash(change.before),
            "after_hash": _hash(change.after),
            "ip": actor.ip,
            "request_id": actor.request_id,
            "details": change.details or {},
        }
        for change in changes
    ]
    await connection.execute(insert(audit_log), rows)


class AuditTrail:
    """Reads the trail, which cannot be changed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_page(
        self, query: AuditQuery, *, sort_by: SortBy, sort_order: SortOrder, offset: int, limit: int
    ) -> tuple[list[AuditView], int]:
        """Return a page of the trail and the number of rows, up to 100,000."""
        condition = query.condition()
        tie = audit_log.c.id.desc() if sort_order is SortOrder.DESCENDING else audit_log.c.id
        page = select(audit_log).where(condition).order_by(*in_order(_SORT_COLUMNS, tie, sort_by, sort_order))
        async with self._database.transaction() as connection:
            total = await count_some(connection, audit_log, condition)
            rows = (await connection.execute(page.offset(offset).limit(limit))).mappings().all()
            views = [AuditView(**{**row, "id": str(row["id"])}) for row in rows]
            return views, at_least(total, offset, len(views), limit)


def _hash(value: Any) -> str | None:
    if value is None:
        return None
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
