"""No healthy node starves: one that was slow once is tried again within seconds under load, and has its share again."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from random import Random

import pytest

from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.fleet.fleet import FleetNode
from tests.small_fleets import SmallFleet

PER_SECOND = 50
USUAL_MS = 100.0
SLOW_MS = 5000.0
TRIED_AGAIN_SECONDS = 5.0
RECOVERED_SECONDS = 20.0
MEASURED_SECONDS = 60.0  # of 24 nodes each gets some 125 requests; by chance alone, never as few as half


class Load:
    """Requests to `count` nodes that are alike: they come at random, and each takes its own time. The seed decides."""

    def __init__(self, count: int, seed: int) -> None:
        self.random = Random(seed)
        self.fleet = SmallFleet(chance=self.random)
        self.nodes = self.fleet.add_nodes(count)
        self.clock = self.fleet.clock
        self.slowness: Counter[str] = Counter()  # how many times longer than usual a node takes
        self.started: list[tuple[float, str]] = []
        self._running: list[tuple[float, int, str, float, Criteria]] = []
        self._number = itertools.count()

    def run(self, seconds: float, per_second: float = PER_SECOND, *, sessions: int = 0) -> Counter[str]:
        """Let so much time pass; return how many requests each node was sent."""
        end, sent = self.clock.monotonic() + seconds, Counter[str]()
        while (at := self.clock.monotonic() + self.random.expovariate(per_second)) < end:
            self._pass_to(at)
            session = f"acme {self.random.randrange(sessions)}" if sessions else None
            criteria = self.fleet.criteria(session=session)
            node = self.fleet.dispatcher.find_quickly(criteria, self.fleet.now)
            assert node is not None
            self.start(node, criteria)
            sent[node.state.id] += 1
        self._pass_to(end)
        return sent

    def start(self, node: FleetNode, criteria: Criteria, latency_ms: float | None = None) -> None:
        """Send a node a request."""
        node_id, now = node.state.id, self.clock.monotonic()
        if latency_ms is None:
            latency_ms = self.random.uniform(0.7, 1.3) * USUAL_MS * (1 + self.slowness[node_id])
        self.fleet.fleet.replicas.begin(node_id)
        self.started.append((now, node_id))
        heapq.heappush(self._running, (now + latency_ms / 1000, next(self._number), node_id, latency_ms, criteria))

    def _pass_to(self, at: float) -> None:
        while self._running and self._running[0][0] <= at:
            ends_at, _, node_id, latency_ms, criteria = heapq.heappop(self._running)
            self.clock.pass_seconds(ends_at - self.clock.monotonic())
            self.fleet.stats.record_latency(node_id, criteria.kind, latency_ms)
            self.fleet.fleet.replicas.end(node_id)
        self.clock.pass_seconds(at - self.clock.monotonic())


@pytest.mark.parametrize("sessions", [0, 200])
@pytest.mark.parametrize("count", [2, 3, 10, 24])
@pytest.mark.parametrize("seed", range(5))
def test_a_node_that_was_slow_once_has_its_share_again_within_seconds(count: int, sessions: int, seed: int) -> None:
    """Eight answers of one stall came late; the node is idle and as fast as the others ever since."""
    load = Load(count, seed)
    nodes = load.nodes
    usual = load.run(MEASURED_SECONDS, sessions=sessions)[nodes[0].state.id]
    for _ in range(8):
        load.start(nodes[0], load.fleet.criteria(), SLOW_MS)
    load.run(SLOW_MS / 1000 + 0.001, sessions=sessions)
    learnt_at = load.clock.monotonic()
    load.run(RECOVERED_SECONDS, sessions=sessions)
    after = [at for at, node_id in load.started if node_id == nodes[0].state.id and at > learnt_at]
    assert after
    assert after[0] - learnt_at < TRIED_AGAIN_SECONDS
    share = load.run(MEASURED_SECONDS, sessions=sessions)[nodes[0].state.id]
    assert share > usual / 2


@pytest.mark.parametrize("per_second", [0.5, 5, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_node_that_stays_slow_is_spared_but_for_a_few_tries(per_second: float, seed: int) -> None:
    """One of three takes twenty times as long: one request in fifty at most looks whether it still does."""
    load = Load(3, seed)
    load.slowness[load.nodes[0].state.id] = 19
    load.run(20, per_second)
    sent = load.run(600, per_second)
    assert sent[load.nodes[0].state.id] / sent.total() < (0.06 if per_second > 1 else 0.2)


@pytest.mark.parametrize("seed", range(3))
def test_of_many_slow_nodes_each_is_tried_now_and_then(seed: int) -> None:
    """Half of a hundred: what they cost together stays as small."""
    load = Load(100, seed)
    slow = {node.state.id for node in load.nodes[:50]}
    load.slowness.update(dict.fromkeys(slow, 19))
    load.run(60, 200)
    sent = load.run(60, 200)
    assert sum(sent[node_id] for node_id in slow) / sent.total() < 0.12
