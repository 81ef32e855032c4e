"""Parts of queries that several stores share: the order of a list, and the check of ids that Postgres compares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from uuid import UUID

from sqlalchemy import asc, desc

from lucid_compute.wire import SortBy, SortOrder


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
