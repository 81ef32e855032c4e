"""A hash ring of the nodes that serve one model: picks random nodes, or a session's nodes, at a fixed cost."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b
from typing import TypeVar

NEIGHBOURS = 16  # a session's node is chosen among so many; all sessions share a smaller ring
_MIX = 0x9E3779B97F4A7C15  # odd: 2**64 divided by the golden ratio, as in Knuth's multiplicative hashing
_MASK = 2**64 - 1
Item = TypeVar("Item")


def place_of(text: str) -> int:
    """Return the position of a node's id or a session's name on every ring, the same on every replica."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class NodeRing:
    """Ids of nodes in the order of `place_of`.

    Picking at random costs a fixed number of steps. A session's nodes are the same on every replica and as long as they
    serve, which node affinity needs.
    """

    __slots__ = ("_node_ids", "_places")

    def __init__(self) -> None:
        self._places: list[int] = []
        self._node_ids: list[str] = []

    def __len__(self) -> int:
        """Return the number of nodes."""
        return len(self._node_ids)

    def __contains__(self, node_id: str) -> bool:
        """Return whether the node is on the ring."""
        return self._find(place_of(node_id), node_id) is not None

    def fill(self, node_ids: Iterable[str]) -> None:
        """Replace the ring's nodes with these. Adding them one at a time would take eight times as long."""
        placed = sorted((place_of(node_id), node_id) for node_id in node_ids)
        self._places = [place for place, _ in placed]
        self._node_ids = [node_id for _, node_id in placed]

    def add(self, node_id: str) -> None:
        """Add a node, unless it is on the ring."""
        place = place_of(node_id)
        if self._find(place, node_id) is None:
            at = bisect_left(self._places, place)
            while at < len(self._places) and (self._places[at], self._node_ids[at]) < (place, node_id):
                at += 1
            self._places.insert(at, place)
            self._node_ids.insert(at, node_id)

    def discard(self, node_id: str) -> None:
        """Remove a node, if it is on the ring."""
        if (at := self._find(place_of(node_id), node_id)) is not None:
            del self._places[at], self._node_ids[at]

    def some(self, count: int) -> list[str]:
        """Return all nodes if there are at most `count`, else about `count` different ones at random."""
        node_ids = self._node_ids
        length = len(node_ids)
        if length <= count:
            return node_ids
        pick = random.random
        return list({node_ids[int(pick() * length)] for _ in range(count)})

    def all(self) -> list[str]:
        """Return a list of every node."""
        return list(self._node_ids)

    def onward_from(self, place: int, count: int) -> list[str]:
        """Return up to `count` nodes in the ring's order, from the first at or after `place`."""
        node_ids = self._node_ids
        return _onward(node_ids, bisect_left(self._places, place), count)

    def of_session(self, place: int, count: int) -> list[str]:
        """Return `count` nodes, or all there are, in the order in which a session at `place` prefers them.

        The next `NEIGHBOURS` on the ring come first, each as high as the hash of both puts it: so sessions are spread
        evenly, however unevenly the nodes stand, and the nodes of one that leaves are shared among all of these.
        """
        places = self._places
        start = bisect_left(places, place) if len(places) > NEIGHBOURS else 0
        near = [*zip(_onward(places, start, NEIGHBOURS), _onward(self._node_ids, start, NEIGHBOURS), strict=True)]
        preferred = rendezvous(place, near)
        if count <= NEIGHBOURS:
            return preferred[:count]
        return preferred + _onward(self._node_ids, start, count)[NEIGHBOURS:]

    def home_of(self, place: int) -> str | None:
        """Return the first of `of_session`, for a quarter of what that costs; None on an empty ring."""
        near = self._places
        if not near:
            return None
        start = 0
        if len(near) > NEIGHBOURS:
            start = bisect_left(near, place)
            near = _onward(near, start, NEIGHBOURS)
        ranks = [(node_place ^ place) * _MIX & _MASK for node_place in near]
        return self._node_ids[(start + ranks.index(min(ranks))) % len(self._node_ids)]

    def _find(self, place: int, node_id: str) -> int | None:
        places, at = self._places, bisect_left(self._places, place)
        while at < len(places) and places[at] == place:
            if self._node_ids[at] == node_id:
                return at
            at += 1
        return None


def rendezvous(place: int, nodes: Iterable[tuple[int, str]]) -> list[str]:
    """Return the ids of `nodes`, given with their places, in the order in which a session at `place` prefers them.

    Each pair of a session and a node has its own rank, so a node that leaves moves only its own sessions (rendezvous
    hashing). One multiplication mixes well enough, because places are hashes already.
    """
    ranked = [((node_place ^ place) * _MIX & _MASK, node_id) for node_place, node_id in nodes]
    ranked.sort()
    return [node_id for _, node_id in ranked]


def _onward(ring: list[Item], start: int, count: int) -> list[Item]:
    onward = ring[start : start + count]
    return onward + ring[: min(count - len(onward), start)] if len(onward) < count else onward
