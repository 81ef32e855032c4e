"""The order of heartbeats."""

from __future__ import annotations

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.capability_index import FreshnessOrder
from tests.factories import NOW


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 9), st.sampled_from(["touch", "touch", "discard"]))))
def test_the_newest_and_the_expired_are_those_of_a_plain_dict(steps: list[tuple[str, int, str]]) -> None:
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
    edge = NOW + timedelta(seconds=5)
    assert set(order.expire_before(edge)) == {key for key, at in plain.items() if at < edge}
    assert len(order) == sum(at >= edge for at in plain.values())
    assert order.newest_at == max((at for at in plain.values() if at >= edge), default=None)
    assert (None if order.newest is None else plain[order.newest]) == order.newest_at
