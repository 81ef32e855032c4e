"""What this replica learnt of each node by sending it requests: how fast it answers, and whether it fails."""

from __future__ import annotations

import time
from collections.abc import Iterable
from datetime import UTC, datetime
from operator import itemgetter

from lucid_compute.gateway.breakers import Breaker
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.routing_rules import limit_of, stretch_of

NEWEST_WEIGHT = 0.2
BETTER_WEIGHT = 0.5  # of one that is better than what was known: what made the node slow seems to be over
BETTER_SECONDS = 10.0  # after which such a one counts for all
EXPLORE_EVERY = 50  # requests of a kind: one of them may go to a node that would not be chosen by what is known of it
EXPLORE_SECONDS = 0.1  # and at most one in so long
FORGET_SECONDS = 60.0
TRIAL_SECONDS = 30.0
UNMEASURED_MS = 100.0  # as a model on a GPU; only its proportion to the slack of sessions matters
SHUN_SECONDS = 1.0
SHUN_FACTOR = 100.0  # a node that fails at once has nothing in flight, and would draw every request to it
LACK_SECONDS = 60.0  # after which a node is asked again for what it did not offer
ANY_ENDPOINT = ""  # of a model that the node does not have
Kind = tuple[str, bool]
_NEVER = datetime.min.replace(tzinfo=UTC)


class NodeStats:
    """One node: its breaker, until when it said to be full, what it lacks and its latencies.

    `lacks` says until when an endpoint, or `ANY_ENDPOINT`, is taken not to be offered for a model, by its id.

    `has_doubts` while any of the first three may keep a request from it. One that failed is shunned for a second: the
    last choice. Beside that, what choices weigh of `state`, so that it is read once for each heartbeat and not at each
    look.
    """

    __slots__ = (
        "breaker",
        "full_until",
        "has_doubts",
        "lacks",
        "latencies",
        "limit",
        "node",
        "received_at",
        "shunned_until",
        "state",
        "stretch",
    )

    def __init__(self, node: FleetNode) -> None:
        self.node = node
        self.breaker = Breaker()
        self.full_until = self.shunned_until = 0.0
        self.lacks: dict[tuple[str, str], float] = {}
        self.has_doubts = False
        self.latencies: dict[Kind, tuple[float, float]] = {}
        self.read()

    def read(self) -> None:
        """Hold what choices weigh of the node's state as it is now: how old its heartbeat is, and what it takes."""
        state = self.state = self.node.state
        self.received_at = state.last_heartbeat.received_at if state.last_heartbeat else _NEVER
        self.limit = limit_of(state)
        self.stretch = stretch_of(state)

    def may_serve(self, wanted: Criteria, now: float, *, minds_breaker: bool = True) -> bool:
        """Return whether nothing that was learnt keeps the request from the node; `now` is `time.monotonic`'s."""
        if self.full_until > now or (self.lacks and self.lack_of(wanted, now) is not None):
            return False
        return not minds_breaker or not self.breaker.failures or not self.breaker.blocked_seconds(now)

    def lack_of(self, wanted: Criteria, now: float) -> str | None:
        """Return what of the wanted the node does not offer, an endpoint or `ANY_ENDPOINT`; None when nothing."""
        for endpoint in (wanted.endpoint, ANY_ENDPOINT):
            if self.lacks.get((endpoint, wanted.model.id), 0.0) > now:
                return endpoint
        return None

    def forget_old_doubts(self, now: float) -> None:
        """Forget what the node did not offer long ago, and drop `has_doubts` when nothing stands against it now."""
        if self.lacks:
            self.lacks = {key: until for key, until in self.lacks.items() if until > now}
        self.has_doubts = self.full_until > now or bool(self.lacks or self.breaker.failures)

    def latency_ms(self, kind: Kind, now: float) -> float | None:
        """Return the time to the first byte of such requests; None before the first, and when the last is long ago."""
        known = self.latencies.get(kind)
        return known[0] if known and now - known[1] < FORGET_SECONDS else None

    def wait_ms(self, kind: Kind, in_flight: int, typical_ms: float, now: float) -> float:
        """Return the expected wait, by the latency that was measured, less and less as that grows old.

        After a minute, and before the first measurement, a node counts as typical.
        """
        measured = self.latencies.get(kind)
        latency_ms = typical_ms
        if measured is not None and (weight := 1.0 - (now - measured[1]) / FORGET_SECONDS) > 0:
            latency_ms += (measured[0] - typical_ms) * weight
        if self.has_doubts and now < self.shunned_until:
            latency_ms *= SHUN_FACTOR
        stretch = self.stretch
        return latency_ms * (stretch.idle + in_flight * stretch.each)


class KindStats:
    """Requests that take alike long: how long typically, how many came since one explored, and when that was."""

    __slots__ = ("explored_at", "typical_ms", "unexplored")

    def __init__(self) -> None:
        self.typical_ms = UNMEASURED_MS
        self.unexplored = 0
        self.explored_at = 0.0


class FleetStats:
    """What one replica knows of every node that it sent requests to, or thought of sending them to."""

    def __init__(self, fleet: Fleet) -> None:
        """Know nothing yet of the nodes of `fleet`."""
        self._fleet = fleet
        self.nodes: dict[str, NodeStats] = {}
        self._kinds: dict[Kind, KindStats] = {}
        self._open: set[str] = set()

    def find(self, node_id: str) -> NodeStats | None:
        """Return what is known of a node, from now on something; None when there is no such node."""
        known = self.nodes.get(node_id)
        if known is None and (node := self._fleet.find_node(node_id)) is not None:
            known = self.nodes[node_id] = NodeStats(node)
        elif known is not None and known.state is not known.node.state:
            known.read()
        return known

    def typical_ms(self, kind: Kind) -> float:
        """Return the latency to expect of a node that was not measured, or long ago."""
        known = self._kinds.get(kind)
        return known.typical_ms if known is not None else UNMEASURED_MS

    def count_request(self, kind: Kind) -> bool:
        """Count a request; return whether it may explore: see how a node does by now that others are preferred to."""
        known = self._kinds.get(kind)
        if known is None:
            return False
        known.unexplored += 1
        return known.unexplored > EXPLORE_EVERY and time.monotonic() - known.explored_at >= EXPLORE_SECONDS

    def stalest(self, kind: Kind, nodes: Iterable[FleetNode]) -> FleetNode | None:
        """Return the node, of those on which nothing runs, that was measured the longest ago or never."""
        nothing = (0.0, 0.0)
        in_flight, now = self._fleet.in_flight, time.monotonic()
        idle = []
        for node in nodes:
            known = self.nodes[node.state.id]
            if now >= known.shunned_until and not in_flight(node.state.id):
                idle.append((known.latencies.get(kind, nothing)[1], node))
        return min(idle, key=itemgetter(0))[1] if idle else None

    def note_exploring(self, kind: Kind) -> None:
        """Note that a request explores."""
        known = self._kinds[kind]
        known.unexplored, known.explored_at = 0, time.monotonic()

    def put_off_exploring(self, kind: Kind) -> None:
        """Note that it was not sent: the next one explores."""
        if (known := self._kinds.get(kind)) is not None:
            known.unexplored, known.explored_at = EXPLORE_EVERY, 0.0

    def blocked_seconds(self, node_id: str) -> float:
        """Return how long the node's breaker stays open; 0 when it is closed."""
        known = self.nodes.get(node_id)
        return known.breaker.blocked_seconds(time.monotonic()) if known else 0.0

    def blocked_on(self, model_id: str) -> list[FleetNode]:
        """Return the nodes of a model's ring whose breakers are open or on trial."""
        now = time.monotonic()
        known = (self.nodes[node_id] for node_id in self._open)
        nodes = (each.node for each in known if each.breaker.blocked_seconds(now))
        return [node for node in nodes if node.capability_class.has_on_ring(node.state.id, model_id)]

    def note_latency(self, node_id: str, kind: Kind, latency_ms: float) -> None:
        """Learn from one first byte: the newest counts for a fifth, or for half and more if it is better."""
        now = time.monotonic()
        if (known := self.find(node_id)) is not None:
            smooth = latency_ms
            former = known.latencies.get(kind)
            if former is not None:
                is_better = latency_ms < former[0]
                weight = 1.0 - (now - former[1]) / (BETTER_SECONDS if is_better else FORGET_SECONDS)
                if weight > 0:
                    weight *= 1.0 - (BETTER_WEIGHT if is_better else NEWEST_WEIGHT)
                    smooth += (former[0] - latency_ms) * weight
            known.latencies[kind] = (smooth, now)
            if known.breaker.failures:
                known.breaker.answer()
                self._open.discard(node_id)
        typical = self._kinds.get(kind)
        if typical is None:
            typical = self._kinds[kind] = KindStats()
            typical.typical_ms = latency_ms
        typical.typical_ms += (latency_ms - typical.typical_ms) * NEWEST_WEIGHT

    def note_start(self, node_id: str) -> int:
        """Note that a request is sent to the node, and return its number, to be told with what became of it."""
        known = self.nodes.get(node_id)
        if known is None:
            return 0
        breaker = known.breaker
        return breaker.start(time.monotonic(), TRIAL_SECONDS) if breaker.failures else breaker.newest

    def note_success(self, node_id: str) -> None:
        """Note that the node did what it was asked, or told the client that it could not have."""
        known = self.nodes.get(node_id)
        if known is not None and known.breaker.failures:
            known.breaker.succeed()
            self._open.discard(node_id)

    def note_nothing(self, node_id: str, number: int) -> None:
        """Note that the request of this number ended without telling anything of the node: its client left."""
        known = self.nodes.get(node_id)
        if known is not None:
            known.breaker.withdraw(number)

    def note_failure(self, node: FleetNode, number: int) -> bool:
        """Note that the node failed the request of this number; return whether that opened its breaker."""
        node_id = node.state.id
        if (known := self.find(node_id)) is None:
            return False
        known.has_doubts = True
        breaker, now = known.breaker, time.monotonic()
        known.shunned_until = now + SHUN_SECONDS
        opened = breaker.fail(now, lambda: self._may_open(node), number)
        if opened:
            self._open.add(node_id)
        return opened

    def note_full(self, node_id: str, seconds: float) -> None:
        """Note that the node said to be full: it is given no more requests for a while."""
        if (known := self.find(node_id)) is not None:
            known.full_until = time.monotonic() + seconds
            known.has_doubts = True

    def note_lack(self, node_id: str, endpoint: str, model_id: str) -> None:
        """Note that the node does not offer a model at an endpoint, or at `ANY_ENDPOINT`."""
        if (known := self.find(node_id)) is not None:
            known.lacks[endpoint, model_id] = time.monotonic() + LACK_SECONDS
            known.has_doubts = True

    def open_count(self) -> int:
        """Return how many nodes' breakers are open or on trial."""
        return len(self._open)

    def forget_ended(self) -> None:
        """Drop what is known of nodes and models that are gone, and what nodes did not offer long ago."""
        now = time.monotonic()
        for node_id in [id_ for id_, known in self.nodes.items() if self._fleet.find_node(id_) is not known.node]:
            del self.nodes[node_id]
            self._open.discard(node_id)
        gone = [kind for kind in self._kinds if self._fleet.find_model(kind[0]) is None]
        for kind in gone:
            del self._kinds[kind]
        for known in self.nodes.values():
            known.forget_old_doubts(now)
            for kind in gone:
                known.latencies.pop(kind, None)

    def _may_open(self, node: FleetNode) -> bool:
        """Return whether no model would have more than half of its nodes blocked if this one was."""
        for model_id, ring in node.capability_class.rings.items():
            most = len(ring) // 2
            if most <= len(self._open) and 1 + sum(other is not node for other in self.blocked_on(model_id)) > most:
                return False
        return True
