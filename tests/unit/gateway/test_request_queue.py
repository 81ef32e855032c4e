"""The queue of requests: bounded, fair between keys, and with nothing left of those that went away."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

from lucid_compute.gateway.request_queue import QueuePlace, RequestQueue


class Waiting:
    """Requests in a queue, each in a task, as the gateway has them; `order` is of their turns."""

    def __init__(self, queue: RequestQueue) -> None:
        self.queue = queue
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[bool]] = []
        self.places: list[QueuePlace] = []

    async def add(self, key: str, model: str = "m") -> QueuePlace:
        """Let one more request wait."""
        place = self.queue.enter(model, key)
        assert place is not None
        self.tasks.append(asyncio.create_task(self._wait(place)))
        self.places.append(place)
        await asyncio.sleep(0)
        return place

    async def _wait(self, place: QueuePlace) -> bool:
        has_turn = await self.queue.wait(place)
        self.order += [place.key_id] * has_turn
        self.queue.leave(place)
        return has_turn


def a_queue(most: int = 100, seconds: float = 30.0) -> RequestQueue:
    """A queue whose requests wait for long."""
    return RequestQueue(most, seconds)


async def test_keys_take_turns_and_each_keys_requests_keep_their_order() -> None:
    waiting = Waiting(a_queue())
    for key in "aaaaabbc":
        await waiting.add(key)
    assert waiting.queue.depth == 8
    assert (waiting.queue.waiting("m"), waiting.queue.waiting("another")) == (8, 0)
    assert waiting.queue.must_wait("m", None)
    waiting.queue.give_turn("m")  # each that leaves gives the next its turn
    assert all(await asyncio.gather(*waiting.tasks))
    assert "".join(waiting.order) == "abcabaaa"
    assert (waiting.queue.depth, sum(waiting.queue.waits)) == (0, 8)
    assert waiting.queue.waiting("m") == 0
    assert not waiting.queue.must_wait("m", None)


async def test_one_that_found_no_node_is_the_next_again() -> None:
    queue = a_queue()
    first, others = queue.enter("m", "a"), Waiting(queue)
    assert first is not None
    task = asyncio.create_task(queue.wait(first))
    await asyncio.sleep(0)
    for key in "ab":
        await others.add(key)
    queue.give_turn("m")
    assert await task
    assert not queue.must_wait("m", first)
    assert queue.must_wait("m", others.places[0])
    again = asyncio.create_task(queue.wait(first))
    await asyncio.sleep(0)
    queue.give_turn("m")
    assert await again
    queue.leave(first)
    await asyncio.gather(*others.tasks)
    assert others.order == ["b", "a"]


async def test_the_queue_is_bounded_in_number_and_in_time() -> None:
    queue = a_queue(most=2, seconds=0.001)
    waiting = Waiting(queue)
    await waiting.add("a")
    await waiting.add("b", model="another")
    assert queue.enter("m", "c") is None
    assert await asyncio.gather(*waiting.tasks) == [False, False]
    assert queue.depth == 0
    assert queue.enter("m", "c") is not None


async def test_nothing_is_left_of_requests_whatever_they_do() -> None:
    """They leave before, in and after their turn; all others get their turn."""
    rng, queue = random.Random(7), a_queue(most=1000)
    waiting = Waiting(queue)
    for number in range(300):
        await waiting.add(f"key {number % 7}", model=f"model {number % 3}")
        if rng.random() < 0.3:
            index = rng.randrange(len(waiting.tasks))
            if waiting.tasks[index].cancel():
                queue.leave(waiting.places[index])
        if rng.random() < 0.1:
            queue.give_turn(f"model {rng.randrange(3)}")
        if rng.random() < 0.2:
            await asyncio.sleep(0)
    ended = Counter(type(end) for end in await asyncio.gather(*waiting.tasks, return_exceptions=True))
    assert ended[bool] == len(waiting.order) > 100
    assert ended[asyncio.CancelledError] > 10
    assert queue.depth == 0
    assert not any(queue.must_wait(f"model {number}", None) for number in range(3))
