"""Lists of the service. Pages are requested when they are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lucid_compute.client.call import PagedCall
from lucid_compute.client.transport import AsyncTransport, Transport
from lucid_compute.wire import DEFAULT_PER_PAGE, MAX_PER_PAGE, Pagination

T = TypeVar("T")


class _Paginated(Protocol):
    @property
    def pagination(self) -> Pagination: ...


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list, and its place in the list."""

    items: list[T]
    pagination: Pagination

    def __iter__(self) -> Iterator[T]:
        """Iterate over the page's items."""
        return iter(self.items)

    def __len__(self) -> int:
        """Return the number of items on the page."""
        return len(self.items)


class Pages(Generic[T]):
    """A list of the service. Iteration requests each page when its first item is needed."""

    def __init__(self, transport: Transport, listing: PagedCall[Any, T]) -> None:
        self._transport, self._listing = transport, listing

    def __iter__(self) -> Iterator[T]:
        """Iterate over the items of all pages. An item that moves to the next page in the meantime comes once."""
        for page in self.pages():
            yield from page

    def page(self, number: int = 1, *, per_page: int = DEFAULT_PER_PAGE) -> Page[T]:
        """Return one page. Pages count from 1; a page after the last one is empty."""
        return _read(self._listing, self._transport.run(self._listing.page(number, per_page)))

    def pages(self, *, per_page: int = MAX_PER_PAGE) -> Iterator[Page[T]]:
        """Iterate over the pages that are not empty."""
        cursor = _PageCursor(self._listing)
        while cursor.has_more:
            if fresh := cursor.keep_new(self.page(cursor.number, per_page=per_page)):
                yield fresh


class AsyncPages(Generic[T]):
    """A list of the service. Iteration requests each page when its first item is needed."""

    def __init__(self, transport: AsyncTransport, listing: PagedCall[Any, T]) -> None:
        self._transport, self._listing = transport, listing

    async def __aiter__(self) -> AsyncIterator[T]:
        """Iterate over the items of all pages. An item that moves to the next page in the meantime comes once."""
        async for page in self.pages():
            for item in page:
                yield item

    async def page(self, number: int = 1, *, per_page: int = DEFAULT_PER_PAGE) -> Page[T]:
        """Return one page. Pages count from 1; a page after the last one is empty."""
        return _read(self._listing, await self._transport.run(self._listing.page(number, per_page)))

    async def pages(self, *, per_page: int = MAX_PER_PAGE) -> AsyncIterator[Page[T]]:
        """Iterate over the pages that are not empty."""
        cursor = _PageCursor(self._listing)
        while cursor.has_more:
            if fresh := cursor.keep_new(await self.page(cursor.number, per_page=per_page)):
                yield fresh


class _PageCursor(Generic[T]):
    """The position in a list. It removes items that moved from the last page to this one."""

    def __init__(self, listing: PagedCall[Any, T]) -> None:
        self._identity = listing.identity
        self._last: set[Hashable] = set()
        self.number = 1
        self.has_more = True

    def keep_new(self, page: Page[T]) -> Page[T]:
        """Return the page without items of the previous page, and move to the next page."""
        items = [item for item in page if self._identity(item) not in self._last]
        self._last = {self._identity(item) for item in page}
        self.has_more = bool(page.items) and self.number < page.pagination.total_pages
        self.number += 1
        return Page(items, page.pagination)


def _read(listing: PagedCall[Any, T], answer: _Paginated) -> Page[T]:
    return Page(listing.items(answer), answer.pagination)
