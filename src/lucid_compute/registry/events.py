"""Node events: written in the transaction of the change that they record, queued for webhooks, and listed."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, and_, false, func, insert, literal, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import at_least, count_some, ids_are_uuids, in_order, unnest_ids
from lucid_compute.postgres.tables import node_events, passports
from lucid_compute.registry.domain.event_types import EventType, WebhookEvent
from lucid_compute.registry.shapes import EventView, FleetEventView
from lucid_compute.wire import SortBy, SortOrder

# Follows a CTE `told (subject_id, type, at, reason, details)`; webhooks get no row whose type is null.
ENQUEUE = """
    INSERT INTO webhook_deliveries (webhook_id, event_id, subject_id, type, occurred_at, payload)
    SELECT w.id, t.event_id, t.subject_id, t.type, t.at,
        jsonb_build_object('owner', p.owner, 'name', p.name, 'reason', t.reason, 'details', t.details)
    FROM (SELECT gen_random_uuid() AS event_id, told.* FROM told WHERE told.type IS NOT NULL) t
    JOIN passports p ON p.id = t.subject_id
    JOIN LATERAL (
        SELECT * FROM webhooks WHERE owner = p.owner AND NOT all_owners
        UNION ALL SELECT * FROM webhooks WHERE all_owners
    ) w ON w.disabled_at IS NULL AND t.type = ANY (w.events)
        AND (w.passport_ids IS NULL OR t.subject_id = ANY (w.passport_ids))
"""


# Follows a CTE `recorded` of rows of `node_events` that this statement writes. Webhooks get no `stale` events, so a
# `healthy` event is a recovery when the last event before it, among `healthy` and `unhealthy`, was `unhealthy`.
ENQUEUE_NODE_EVENTS = f"""
    , told AS (
        SELECT e.passport_id AS subject_id, e.at, e.reason, e.details, CASE
            WHEN e.type = 'unhealthy' THEN '{WebhookEvent.NODE_UNHEALTHY}'
            WHEN e.type = 'drained' THEN '{WebhookEvent.NODE_DRAINED}'
            WHEN e.type IN ('deregistered', 'revoked') THEN '{WebhookEvent.NODE_DEREGISTERED}'
            WHEN e.type = 'healthy' AND 'unhealthy' = (
                SELECT f.type FROM node_events f
                WHERE f.passport_id = e.passport_id AND f.type IN ('healthy', 'unhealthy')
                ORDER BY f.at DESC, f.id DESC LIMIT 1
            ) THEN '{WebhookEvent.NODE_RECOVERED}'
        END AS type
        FROM recorded e
    )
    {ENQUEUE}
"""


async def enqueue_recorded(connection: AsyncConnection, event_id: int) -> None:
    """Queue a node's event, which this transaction has just written, for the webhooks that want it."""
    recorded = "SELECT passport_id, type, at, reason, details FROM node_events WHERE id = :id"
    await connection.execute(text(f"WITH recorded AS ({recorded}) {ENQUEUE_NODE_EVENTS}"), {"id": event_id})


_QUEUED = {EventType.DEREGISTERED, EventType.REVOKED}  # for webhooks; the sweep queues its own events itself
# An event never changes, and its name is its type.
_SORT_COLUMNS = {
    SortBy.CREATED_AT: node_events.c.at,
    SortBy.UPDATED_AT: node_events.c.at,
    SortBy.NAME: node_events.c.type,
}


async def record_event(
    connection: AsyncConnection,
    passport_id: str,
    event: EventType,
    *,
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> None:
    """Write one event, at the database's now, and queue it for webhooks if its type is one that they get."""
    values = {"passport_id": passport_id, "type": event.value, "reason": reason, "details": details or {}}
    event_id = await connection.scalar(insert(node_events).values(values).returning(node_events.c.id))
    if event in _QUEUED:
        await enqueue_recorded(connection, event_id)


async def record_registrations(connection: AsyncConnection, passport_ids: Sequence[str]) -> None:
    """Write that these nodes were registered, at the database's now. Webhooks get no such event."""
    rows = select(unnest_ids(passport_ids), literal(EventType.REGISTERED.value))
    await connection.execute(insert(node_events).from_select(["passport_id", "type"], rows))


class EventQuery(NamedTuple):
    """Which events of several nodes to read: at `since` or later and before `until`; None sets no condition."""

    owner: str | None
    passport_id: str | None
    event_type: str | None
    since: datetime
    until: datetime | None


class NodeEvents:
    """Reads the events of nodes."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list_page(
        self,
        passport_id: str,
        *,
        since: datetime | None,
        event_type: str | None,
        sort_by: SortBy,
        sort_order: SortOrder,
        offset: int,
        limit: int,
    ) -> tuple[list[EventView], int]:
        """Return a page of a node's events and their total: those at `since` or later, of one type or (None) of all."""
        conditions = [node_events.c.passport_id == passport_id]
        if since is not None:
            conditions.append(node_events.c.at >= since)
        if event_type is not None:
            conditions.append(node_events.c.type == event_type)
        tie = node_events.c.id.desc() if sort_order is SortOrder.DESCENDING else node_events.c.id
        order = in_order(_SORT_COLUMNS, tie, sort_by, sort_order)
        page = select(node_events).where(and_(*conditions)).order_by(*order)
        async with self._database.transaction() as connection:
            total = await connection.scalar(select(func.count()).select_from(node_events).where(and_(*conditions)))
            rows = await connection.execute(page.offset(offset).limit(limit))
            return [EventView(**{**row, "id": str(row["id"])}) for row in rows.mappings()], total or 0

    async def list_all(
        self, query: EventQuery, *, sort_by: SortBy, sort_order: SortOrder, offset: int, limit: int
    ) -> tuple[list[FleetEventView], int]:
        """Return a page of the events of several nodes, with the nodes' names, and their number, up to 100,000."""
        condition = _condition(query)
        tie = node_events.c.id.desc() if sort_order is SortOrder.DESCENDING else node_events.c.id
        page = (
            select(node_events, passports.c.name, passports.c.owner)
            .join(passports, passports.c.id == node_events.c.passport_id)
            .where(condition)
            .order_by(*in_order(_SORT_COLUMNS, tie, sort_by, sort_order))
        )
        async with self._database.transaction() as connection:
            total = await count_some(connection, node_events, condition)
            rows = (await connection.execute(page.offset(offset).limit(limit))).mappings().all()
            views = [FleetEventView(**{**row, "id": str(row["id"])}) for row in rows]
            return views, at_least(total, offset, len(views), limit)


def _condition(query: EventQuery) -> ColumnElement[bool]:
    conditions: list[ColumnElement[bool]] = [node_events.c.at >= query.since]
    if query.until is not None:
        conditions.append(node_events.c.at < query.until)
    if query.event_type is not None:
        conditions.append(node_events.c.type == query.event_type)
    if query.owner is not None:
        conditions.append(node_events.c.passport_id.in_(select(passports.c.id).where(passports.c.owner == query.owner)))
    if query.passport_id is not None:
        is_id = ids_are_uuids(query.passport_id)
        conditions.append(node_events.c.passport_id == query.passport_id if is_id else false())
    return and_(*conditions)
