"""The nodes that serve one model, in the order of a hash, so that some can be picked at a cost that does not grow."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Iterable
from hashlib import blake2b


def place_of(text: str) -> int:
    """Answer where a node's id or a session's name stands on every ring, the same on every replica."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


class ModelRing:
    """Ids of nodes in the order of `place_of`.

    Picking at random costs a fixed number of steps, and the node at or after a session's place is the same on every
    replica and for as long as that node serves: what node affinity needs.
    """

    __slots__ = ("_node_ids", "_places")

    def __init__(self) -> None:
        """Start empty."""
        self._places: list[tuple[int, str]] = []
        self._node_ids: list[str] = []

    def __len__(self) -> int:
        """How many nodes there are."""
        return len(self._node_ids)

    def __contains__(self, node_id: str) -> bool:
        """Whether the node is on the ring."""
        return self._find(place_of(node_id), node_id) is not None

    def fill(self, node_ids: Iterable[str]) -> None:
        """Put these nodes, and no others, on the ring: one by one it would take eight times as long."""
        self._places = sorted((place_of(node_id), node_id) for node_id in node_ids)
        self._node_ids = [node_id for _, node_id in self._places]

    def add(self, node_id: str) -> None:
        """Put a node on the ring, if it is not there."""
        place = place_of(node_id)
        at = bisect_left(self._places, (place, node_id))
        if at == len(self._places) or self._places[at] != (place, node_id):
            self._places.insert(at, (place, node_id))
            self._node_ids.insert(at, node_id)

    def discard(self, node_id: str) -> None:
        """Take a node off the ring, if it is there."""
        if (at := self._find(place_of(node_id), node_id)) is not None:
            del self._places[at], self._node_ids[at]

    def some(self, count: int) -> list[str]:
        """Answer every node when there are at most `count`, else about so many at random, each once."""
        node_ids = self._node_ids
        length = len(node_ids)
        if length <= count:
            return node_ids
        pick = random.random
        return list({node_ids[int(pick() * length)] for _ in range(count)})

    def all(self) -> list[str]:
        """Answer every node, as of now."""
        return list(self._node_ids)

    def onward_from(self, place: int, count: int) -> list[str]:
        """Answer `count` nodes, or all there are, in the ring's order from the first at or after `place`."""
        node_ids = self._node_ids
        start = bisect_left(self._places, (place, ""))
        onward = node_ids[start : start + count]
        return onward + node_ids[: min(count - len(onward), start)] if len(onward) < count else onward

    def _find(self, place: int, node_id: str) -> int | None:
        at = bisect_left(self._places, (place, node_id))
        return at if at < len(self._places) and self._places[at][1] == node_id else None
