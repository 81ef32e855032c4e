"""The order of heartbeats, and the queue of those that no longer count."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.freshness import ExpiryQueue, FreshnessOrder
from tests.factories import NOW

STEPS = st.lists(
    st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.sampled_from(["touch", "touch", "discard", "expire"]))
)


@given(STEPS)
def test_the_newest_is_that_of_a_plain_dict(steps: list[tuple[str, int, str]]) -> None:
    """In any order of touches and removals."""
    order: FreshnessOrder[str] = FreshnessOrder()
    plain = {}
    for key, seconds, step in steps:
        at = NOW + timedelta(seconds=seconds)
        if step == "touch":
            order.touch(key, at)
            plain[key] = at
        else:
            order.discard(key)
            plain.pop(key, None)
        assert order.newest_at == max(plain.values(), default=None)
        assert plain.get(order.newest or "") == order.newest_at
        assert set(order) == set(plain)
        assert len(order) == len(plain)


@given(STEPS)
def test_the_expired_are_those_of_a_plain_dict(steps: list[tuple[str, int, str]]) -> None:
    """In any order of touches, also to an earlier instant, removals and expiries."""
    queue: ExpiryQueue[str] = ExpiryQueue()
    plain = {}
    for key, seconds, step in steps:
        at = NOW + timedelta(seconds=seconds)
        if step == "touch":
            queue.touch(key, at)
            plain[key] = at
        elif step == "discard":
            queue.discard(key)
            plain.pop(key, None)
        else:
            expired = queue.expire_before(at)
            assert sorted(expired) == sorted(key for key, instant in plain.items() if instant < at)
            plain = {key: instant for key, instant in plain.items() if instant >= at}
        assert len(queue) == len(plain)


def test_keys_that_come_and_go_leave_nothing_in_a_queue_that_nobody_reads() -> None:
    queue: ExpiryQueue[object] = ExpiryQueue()
    for number in range(10_000):
        key = object()
        queue.touch(key, NOW - timedelta(seconds=number))
        queue.touch("kept", NOW - timedelta(seconds=number))
        queue.discard(key)
    assert len(queue._heap) < 200
    assert queue.expire_before(NOW + timedelta(seconds=1)) == ["kept"]


def test_keys_that_leave_together_leave_nothing_behind() -> None:
    """Also when no other is touched from then on, and nobody asks what has expired."""
    queue: ExpiryQueue[object] = ExpiryQueue()
    keys = [object() for _ in range(1000)]
    for key in keys:
        queue.touch(key, NOW)
    for key in keys:
        queue.discard(key)
    assert len(queue._heap) <= 64
    assert len(queue._queued) <= 64
