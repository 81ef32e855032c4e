"""Node events: what happened to a node, written beside the change that it tells of."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import and_, func, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.storage.database import Database
from lucid_compute.storage.passport_search import in_order
from lucid_compute.storage.tables import node_events
from lucid_compute.storage.webhook_outbox import enqueue_recorded
from lucid_compute.wire.compute import EventView
from lucid_compute.wire.lists import SortBy, SortOrder


class EventType(StrEnum):
    """What can happen to a node. The first row is written with a request, the second by the sweep."""

    REGISTERED = "registered"
    UPDATED = "updated"
    MODELS_DECLARED = "models_declared"
    DRAINING = "draining"
    RESUMED = "resumed"
    DEREGISTERED = "deregistered"
    REVOKED = "revoked"
    RESTARTED = "restarted"

    HEALTHY = "healthy"
    STALE = "stale"
    UNHEALTHY = "unhealthy"
    DRAINED = "drained"


_TOLD = {EventType.DEREGISTERED, EventType.REVOKED}  # to webhooks; the sweep has those of its own events told

# An event is written once and never changed, and what names it is its type.
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
    """Write one event, at the database's now, and have the webhooks told of it."""
    values = {"passport_id": passport_id, "type": event.value, "reason": reason, "details": details or {}}
    event_id = await connection.scalar(insert(node_events).values(values).returning(node_events.c.id))
    if event in _TOLD:
        await enqueue_recorded(connection, event_id)


class NodeEvents:
    """Reads events."""

    def __init__(self, database: Database) -> None:
        """Read from `database`."""
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
        """Answer a page of one node's events and how many there are, those at `since` or later, of one type or all."""
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
