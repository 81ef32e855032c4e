"""Long loops: everything is seen once and in order, and others run in between."""

from __future__ import annotations

import asyncio

from lucid_compute.web.turns import in_batches, in_turns


class Others:
    """Counts how often the event loop had a turn."""

    def __init__(self) -> None:
        self.turns = 0
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.turns += 1
            await asyncio.sleep(0)

    def stop(self) -> None:
        """End counting."""
        self._task.cancel()


async def test_items_come_once_and_in_order_with_a_turn_for_others_between_batches() -> None:
    others = Others()
    assert [item async for item in in_turns(range(7), 3)] == [*range(7)]
    assert others.turns == 2
    assert [batch async for batch in in_batches([*range(7)], 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert others.turns == 4
    others.stop()


async def test_what_fits_into_one_batch_gives_no_turn_away() -> None:
    others = Others()
    assert [item async for item in in_turns("", 3)] == []
    assert [item async for item in in_turns("abc", 3)] == ["a", "b", "c"]
    assert others.turns == 0
    others.stop()


async def test_what_changes_while_others_run_is_not_seen() -> None:
    names = {"a": 1, "b": 2, "c": 3}
    seen = []
    async for name in in_turns(names, 1):
        seen.append(name)
        names.clear()
    assert seen == ["a", "b", "c"]
