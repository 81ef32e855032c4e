"""What every list has in common."""

from __future__ import annotations

from enum import StrEnum

from lucid_compute.field_types import AnswerShape

DEFAULT_PER_PAGE = 20
MAX_PER_PAGE = 100


class Pagination(AnswerShape):
    """Where a page stands in the whole list; pages count from 1."""

    total: int
    page: int
    per_page: int
    total_pages: int


class SortBy(StrEnum):
    """What a list is ordered by."""

    CREATED_AT = "createdAt"
    UPDATED_AT = "updatedAt"
    NAME = "name"


class NodeSortBy(StrEnum):
    """What a list of nodes is ordered by: as any list, or by what its nodes do now."""

    CREATED_AT = "createdAt"
    UPDATED_AT = "updatedAt"
    NAME = "name"
    LOAD = "load"
    QUEUE_DEPTH = "queueDepth"
    IN_FLIGHT = "inFlight"
    HEARTBEAT_AT = "heartbeatAt"


class SortOrder(StrEnum):
    """Which end comes first."""

    ASCENDING = "asc"
    DESCENDING = "desc"
