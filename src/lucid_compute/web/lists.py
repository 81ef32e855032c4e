"""Query parameters of lists: paging and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Generic, TypeVar

from fastapi import Depends, Query

from lucid_compute.wire import DEFAULT_PER_PAGE, MAX_PER_PAGE, ModelSortBy, NodeSortBy, Pagination, SortBy, SortOrder

_MAX_PAGE = 1_000_000_000
Item = TypeVar("Item")
By = TypeVar("By", SortBy, NodeSortBy, ModelSortBy)


@dataclass(frozen=True, slots=True)
class PageRequest:
    """The requested page of a list; pages count from 1."""

    number: int
    per_page: int

    @property
    def offset(self) -> int:
        """Return how many items come before the page."""
        return (self.number - 1) * self.per_page

    def slice_of(self, items: list[Item]) -> list[Item]:
        """Return this page of a complete list."""
        return items[self.offset : self.offset + self.per_page]

    def pagination(self, total: int) -> Pagination:
        """Return the page's position in a list of `total` items, for the response."""
        total_pages = -(-total // self.per_page)
        return Pagination(total=total, page=self.number, per_page=self.per_page, total_pages=total_pages)


async def get_page(
    page: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Counts from 1; past the end is empty.")] = 1,
    per_page: Annotated[int, Query(alias="perPage", ge=1, le=MAX_PER_PAGE)] = DEFAULT_PER_PAGE,
) -> PageRequest:
    """Return the requested page, the first by default."""
    return PageRequest(page, per_page)


async def find_page(
    page: Annotated[int | None, Query(ge=1, le=_MAX_PAGE, description="Counts from 1; past the end is empty.")] = None,
    per_page: Annotated[int | None, Query(alias="perPage", ge=1, le=MAX_PER_PAGE)] = None,
) -> PageRequest | None:
    """Return the requested page; None when the request names none."""
    if page is None and per_page is None:
        return None
    return PageRequest(page or 1, per_page or DEFAULT_PER_PAGE)


@dataclass(frozen=True, slots=True)
class Order(Generic[By]):
    """The field that orders a list, and the direction."""

    by: By
    direction: SortOrder


Direction = Annotated[SortOrder, Query(alias="sortOrder")]


async def get_order(
    sort_by: Annotated[SortBy, Query(alias="sortBy")] = SortBy.CREATED_AT, sort_order: Direction = SortOrder.DESCENDING
) -> Order[SortBy]:
    """Return the requested order, the newest first by default."""
    return Order(sort_by, sort_order)


PageDependency = Annotated[PageRequest, Depends(get_page)]
OptionalPageDependency = Annotated[PageRequest | None, Depends(find_page)]
OrderDependency = Annotated[Order[SortBy], Depends(get_order)]
