"""Long loops that yield to the event loop, so that requests are served in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class in_batches(AsyncIterator[Sequence[Item]]):  # noqa: N801 - used as a function
    """Yield the items `size` at a time; the event loop runs other tasks between two batches.

    It is a class because a generator that is left early has to be closed by the event loop.
    """

    __slots__ = ("_items", "_size", "_start")

    def __init__(self, items: Sequence[Item], size: int) -> None:
        self._items = items
        self._size = size
        self._start = 0

    async def __anext__(self) -> Sequence[Item]:
        """Return the next batch."""
        start = self._start
        if start >= len(self._items):
            raise StopAsyncIteration
        if start:
            await asyncio.sleep(0)
        self._start = start + self._size
        return self._items[start : self._start]


async def in_turns(items: Iterable[Item], size: int) -> AsyncIterator[Item]:
    """Yield the items one by one; the event loop runs other tasks after every `size` of them.

    The items are copied first, so later changes are not seen.
    """
    async for batch in in_batches(list(items), size):
        for item in batch:
            yield item
