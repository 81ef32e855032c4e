"""lucid_compute.postgres.queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import asc, desc

from lucid_compute.wire import SortBy, SortOrder


def in_order(columns: Mapping[SortBy, Any], tie: Any, sort_by: SortBy, sort_order: SortOrder) -> tuple[Any, Any]:
    """Return an ORDER BY that is total: the column that is asked for, then `tie`."""
    direction = asc if sort_order is SortOrder.ASCENDING else desc
    return direction(columns[sort_by]), tie


def ids_are_uuids(*ids: str) -> bool:
    """Return whether each id could be one of ours: a UUID in its canonical form."""
    try:
        return all(str(UUID(id_)) == id_ for id_ in ids)
    except ValueError:
        return False
