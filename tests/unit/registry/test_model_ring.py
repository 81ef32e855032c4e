"""A model's ring: the same order on every replica, and picks that cost no more when it grows."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lucid_compute.registry.fleet.node_ring import NEIGHBOURS, NodeRing, place_of

IDS = st.text(min_size=1, max_size=8)
ALL = 2**64


def ring_of(node_ids: list[str]) -> NodeRing:
    """Return a ring to which the nodes were added one at a time."""
    ring = NodeRing()
    for node_id in node_ids:
        ring.add(node_id)
    return ring


@given(node_ids=st.lists(IDS), gone=st.lists(IDS), seed=st.integers())
def test_the_order_in_which_nodes_came_and_went_does_not_show(node_ids: list[str], gone: list[str], seed: int) -> None:
    """Two replicas receive nodes in different orders, and agree."""
    shuffled = [*node_ids, *gone]
    Random(seed).shuffle(shuffled)
    first, second = ring_of([*gone, *node_ids]), ring_of(shuffled)
    for ring in (first, second):
        for node_id in gone:
            ring.discard(node_id)
            ring.discard(node_id)
    filled = NodeRing()
    filled.fill(set(node_ids) - set(gone))
    assert first.all() == second.all() == filled.all()
    assert set(first.all()) == set(node_ids) - set(gone)
    assert len(first) == len(first.all())
    assert all(node_id in first for node_id in first.all())
    assert not any(node_id in first for node_id in gone)


@given(node_ids=st.sets(IDS), place=st.integers(0, ALL - 1), count=st.integers(0, 40))
def test_onward_goes_once_around_from_the_place(node_ids: set[str], place: int, count: int) -> None:
    """The first node is the one at or after the place; no node comes twice."""
    expected = sorted(node_ids, key=lambda node_id: ((place_of(node_id) - place) % ALL, node_id))
    assert ring_of(sorted(node_ids)).onward_from(place, count) == expected[:count]


@given(node_ids=st.sets(IDS, max_size=40), place=st.integers(0, ALL - 1), count=st.integers(0, 50))
def test_a_session_prefers_every_node_once_and_its_home_first(node_ids: set[str], place: int, count: int) -> None:
    """However many are asked for, the first ones are the same."""
    ring = ring_of(sorted(node_ids))
    preferred = ring.of_session(place, len(node_ids))
    assert sorted(preferred) == sorted(node_ids)
    assert ring.of_session(place, count) == preferred[:count]
    assert ring.home_of(place) == next(iter(preferred), None)


@given(node_ids=st.sets(IDS, min_size=1, max_size=NEIGHBOURS), place=st.integers(0, ALL - 1))
def test_on_a_small_ring_the_order_of_the_others_stays_when_one_goes(node_ids: set[str], place: int) -> None:
    """So a node that leaves moves only its own sessions."""
    ring = ring_of(sorted(node_ids))
    preferred = ring.of_session(place, len(node_ids))
    gone = preferred[len(preferred) // 2]
    ring.discard(gone)
    assert ring.of_session(place, len(node_ids)) == [node_id for node_id in preferred if node_id != gone]


def test_all_are_picked_when_there_are_few_and_each_once_when_there_are_many() -> None:
    """`some` returns all nodes, or a sample without duplicates."""
    names = [f"node-{number}" for number in range(40)]
    few, many = ring_of(names[:8]), ring_of(names)
    assert few.some(8) == few.all()
    for _ in range(100):
        picked = many.some(8)
        assert 1 <= len(picked) <= 8
        assert len(set(picked)) == len(picked)
        assert set(picked) <= set(names)


def test_picks_reach_every_node_alike() -> None:
    """4,000 picks of about 8 from 40: each node is in some 730 of them, give or take 27."""
    ring = ring_of([f"node-{number}" for number in range(40)])
    counts = Counter(node_id for _ in range(4000) for node_id in ring.some(8))
    assert len(counts) == 40
    assert min(counts.values()) > 550
    assert max(counts.values()) < 950


def test_what_all_answers_stays_as_it_was() -> None:
    """A search goes on over it while nodes come and go."""
    ring = ring_of(["a", "b"])
    before = ring.all()
    ring.discard("a")
    assert len(before) == 2


@pytest.mark.parametrize("text", ["", "a", "ünï😀", "\ud800", "x" * 10_000])
def test_any_text_has_a_place(text: str) -> None:
    """A session's name is the client's, whatever is in it."""
    assert 0 <= place_of(text) < ALL
    assert place_of(text) == place_of(text)
