"""A call that hangs delays nobody, and is not asked again until it returns."""

from __future__ import annotations

import threading

import pytest

from lucid_compute.agent.observer import ThreadedCall


async def test_an_answer_comes_from_one_other_thread() -> None:
    calls = ThreadedCall(threading.get_ident)
    first, second = await calls.call(5), await calls.call(5)
    assert first == second != threading.get_ident()


async def test_a_call_that_hangs_is_waited_for_only_so_long_and_answers_the_next_one() -> None:
    released = threading.Event()
    count = 0

    def hang() -> int:
        nonlocal count
        count += 1
        released.wait()
        return count

    calls = ThreadedCall(hang)
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await calls.call(0.01)
    released.set()
    assert await calls.call(5) == 1
    assert await calls.call(5) == 2


async def test_a_fault_is_raised_where_it_is_waited_for() -> None:
    def fail() -> None:
        raise ValueError("broken")

    calls = ThreadedCall(fail)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            await calls.call(5)
