"""Reads that simultaneous callers share."""

from __future__ import annotations

import asyncio

import pytest

from lucid_compute.postgres.long_transactions import SharedReads


class Report:
    """A report that takes as long as the test wants, and says how many were begun before it."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = asyncio.Event()

    async def read(self) -> int:
        """Return the number of this read."""
        self.begun += 1
        number = self.begun
        await self.may_end.wait()
        if number == 3:
            msg = "the third fails"
            raise ValueError(msg)
        return number


async def ask(reads: SharedReads, report: Report, callers: int, key: str = "a") -> list[asyncio.Task[int]]:
    """Let so many callers ask at once; return when those that can begin have begun."""
    asked = [asyncio.create_task(reads.get(key, report.read)) for _ in range(callers)]
    for _ in range(5):
        await asyncio.sleep(0)
    return asked


async def test_callers_share_a_read_that_has_not_begun() -> None:
    """A read under way may lack what was written since: those that ask meanwhile share the next one."""
    reads, report = SharedReads(), Report()
    asked = await ask(reads, report, 2) + await ask(reads, report, 30)
    assert report.begun == 1
    report.may_end.set()
    assert await asyncio.gather(*asked) == [1, 1, *[2] * 30]
    assert not reads._running
    assert not reads._next


async def test_other_reads_do_not_wait() -> None:
    reads, report = SharedReads(), Report()
    asked = await ask(reads, report, 2) + await ask(reads, report, 2, "b")
    assert report.begun == 2
    report.may_end.set()
    assert await asyncio.gather(*asked) == [1, 1, 2, 2]


async def test_a_caller_that_leaves_takes_nothing_from_the_others() -> None:
    reads, report = SharedReads(), Report()
    first, second = await ask(reads, report, 2)
    first.cancel()
    await asyncio.sleep(0)
    report.may_end.set()
    assert await second == 1


async def test_a_failure_is_that_of_its_callers_alone() -> None:
    reads, report = SharedReads(), Report()
    report.begun = 2
    failing = await ask(reads, report, 2)
    well = await ask(reads, report, 2)
    report.may_end.set()
    for task in failing:
        with pytest.raises(ValueError, match="third"):
            await task
    assert await asyncio.gather(*well) == [4, 4]
