"""What this replica measured of each node by sending it requests: how fast it responds, and whether it fails."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from operator import itemgetter
from typing import NamedTuple

from lucid_compute.gateway.breakers import Breaker
from lucid_compute.gateway.request import Criteria
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.routing_rules import limit_of, stretch_of

NEWEST_WEIGHT = 0.2
BETTER_WEIGHT = 0.5  # of a latency below the known one: what made the node slow seems to be over
BETTER_SECONDS = 10.0  # after which a better latency replaces the known one
EXPLORE_EVERY = 50  # requests of a kind, of which one may go to a node that its statistics would not choose
EXPLORE_SECONDS = 0.1  # between two explorations of a kind, at least
FORGET_SECONDS = 60.0
TRIAL_SECONDS = 30.0
UNMEASURED_MS = 100.0  # as of a model on a GPU; only its proportion to the slack of sessions matters
SHUN_SECONDS = 1.0
SHUN_FACTOR = 100.0  # a node that fails at once has nothing in flight, and would attract every request
LACK_SECONDS = 60.0  # after which a node is asked again for what it did not offer
QUESTION_SECONDS = 3600.0  # after which a node that refused `stream_options` is asked for a stream's usage again
ANY_ENDPOINT = ""  # in `lacks`: the node does not have the model at all
PROOF_KEYS = 2  # whose requests a model's only node fails one after the other: then it is not what they ask for
PROOF_OWNERS = 2  # whose requests met it: what one client can make a node say takes the node from no other client
MAX_FULL_SECONDS = 30.0  # for which a node that says that it is busy is not asked again
Kind = tuple[str, bool]
_NEVER = datetime.min.replace(tzinfo=UTC)


class Suspicion(NamedTuple):
    """A request that failed, perhaps by what it asks for: of which model and key, and whether the node was silent."""

    model_id: str
    key_id: str
    is_timeout: bool


class NodeStats:
    """Statistics of one node: its breaker, until when it is full, what it lacks, and its latencies.

    - `lacks`: by endpoint (or `ANY_ENDPOINT`) and model id, which owners' requests met that the node does not offer it,
      and until when that counts: for these owners, and for all when there are two.
    - `full_until`: when a node that said that it is busy is asked again; `free_at`: when it said that it is free.
    - `has_doubts`: the breaker, `full_until`, `lacks` or `shunned_until` may keep a request from the node.
    - `shunned_until`: a node that failed is the last choice for a second.
    - `suspected_by`: the keys whose requests it failed since it last served one; `unproven`: how many of these requests
      are not counted as its failures.
    - `received_at`, `limit`, `stretch`: read from `state` once per heartbeat instead of once per request.
    """

    __slots__ = (
        "breaker",
        "free_at",
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
        "suspected_by",
        "unproven",
    )

    def __init__(self, node: FleetNode) -> None:
        self.node = node
        self.breaker = Breaker()
        self.full_until = self.free_at = self.shunned_until = 0.0
        self.lacks: dict[tuple[str, str], dict[str, float]] = {}
        self.has_doubts = False
        self.suspected_by: set[str] = set()
        self.unproven = 0
        self.latencies: dict[Kind, tuple[float, float]] = {}
        self.read_state()

    def read_state(self) -> None:
        """Read the age of the heartbeat, the limit and the stretch from the node's current state."""
        state = self.state = self.node.state
        self.received_at = state.last_heartbeat.received_at if state.last_heartbeat else _NEVER
        self.limit = limit_of(state)
        self.stretch = stretch_of(state)

    def may_serve(self, criteria: Criteria, now: float, *, minds_breaker: bool = True) -> bool:
        """Return whether the node may be sent the request; `now` is an instant of `time.monotonic`."""
        if self.full_until > now or (self.lacks and self.lack_of(criteria, now) is not None):
            return False
        return not minds_breaker or not self.breaker.failures or not self.breaker.blocked_seconds(now)

    def lack_of(self, criteria: Criteria, now: float) -> str | None:
        """Return what the node does not offer: the endpoint, or `ANY_ENDPOINT`; None when it lacks nothing."""
        for endpoint in (criteria.endpoint, ANY_ENDPOINT):
            owners = self.lacks.get((endpoint, criteria.model.id))
            if owners is not None and (
                owners.get(criteria.owner, 0.0) > now or sum(until > now for until in owners.values()) >= PROOF_OWNERS
            ):
                return endpoint
        return None

    def forget_old_doubts(self, now: float) -> None:
        """Forget what the node lacked too long ago, and clear `has_doubts` when no doubt is left."""
        if self.lacks:
            self.lacks = {key: owners for key, owners in self.lacks.items() if max(owners.values()) > now}
        doubts = self.lacks or self.breaker.failures or self.suspected_by
        self.has_doubts = max(self.full_until, self.shunned_until) > now or bool(doubts)

    def prove(self, suspicion: Suspicion) -> int:
        """Return how many failures prove to be the node's, as it failed this one too; no other node has the model.

        It is what requests of several keys have in common. A node that is silent fails whoever asks.
        """
        if len(self.suspected_by) < PROOF_KEYS:
            self.suspected_by.add(suspicion.key_id)
        self.unproven += 1
        if not suspicion.is_timeout and len(self.suspected_by) < PROOF_KEYS:
            return 0
        proven, self.unproven = self.unproven, 0
        return proven

    def latency_ms(self, kind: Kind, now: float) -> float | None:
        """Return the time to the first byte of such requests; None when none was measured in the last minute."""
        measured = self.latencies.get(kind)
        return measured[0] if measured and now - measured[1] < FORGET_SECONDS else None

    def wait_ms(self, kind: Kind, in_flight: int, typical_ms: float, now: float) -> float:
        """Return the expected wait in milliseconds.

        The measured latency counts less as it ages. After a minute, and before the first measurement, the node counts
        as typical.
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
    """Requests of one model, streamed or not: their typical latency, and when and how long ago one explored."""

    __slots__ = ("explored_at", "typical_ms", "unexplored")

    def __init__(self) -> None:
        self.typical_ms = UNMEASURED_MS
        self.unexplored = 0
        self.explored_at = 0.0


class FleetStats:
    """Statistics of every node that this replica considered for a request, or sent one."""

    def __init__(self, fleet: Fleet, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._fleet = fleet
        self.nodes: dict[str, NodeStats] = {}
        self._kinds: dict[Kind, KindStats] = {}
        self._open: set[str] = set()
        self._questions_refused: dict[str, float] = {}  # by node, or by model with an upstream: until when
        self._lack_until: dict[str, float] = {}  # by owner: until when nodes may lack something for it alone

    def track(self, node_id: str) -> NodeStats | None:
        """Return the statistics of a node, starting them if there are none; None when there is no such node."""
        stats = self.nodes.get(node_id)
        if stats is None and (node := self._fleet.find_node(node_id)) is not None:
            stats = self.nodes[node_id] = NodeStats(node)
        elif stats is not None and stats.state is not stats.node.state:
            stats.read_state()
        return stats

    def typical_ms(self, kind: Kind) -> float:
        """Return the latency to expect of a node that was not measured in the last minute."""
        stats = self._kinds.get(kind)
        return stats.typical_ms if stats is not None else UNMEASURED_MS

    def count_request(self, kind: Kind) -> bool:
        """Count a request; return whether it may explore, that is measure a node that is not the best known."""
        stats = self._kinds.get(kind)
        if stats is None:
            return False
        stats.unexplored += 1
        return stats.unexplored > EXPLORE_EVERY and self.monotonic() - stats.explored_at >= EXPLORE_SECONDS

    def least_recently_measured(self, kind: Kind, nodes: Iterable[FleetNode]) -> FleetNode | None:
        """Return the idle node that was never measured, or the longest ago; None when no node is idle."""
        nothing = (0.0, 0.0)
        in_flight, now = self._fleet.in_flight, self.monotonic()
        idle = []
        for node in nodes:
            stats = self.nodes[node.state.id]
            if now >= stats.shunned_until and not in_flight(node.state.id):
                idle.append((stats.latencies.get(kind, nothing)[1], node))
        return min(idle, key=itemgetter(0))[1] if idle else None

    def record_exploration(self, kind: Kind) -> None:
        """Record that a request explores now."""
        stats = self._kinds[kind]
        stats.unexplored, stats.explored_at = 0, self.monotonic()

    def blocked_seconds(self, node_id: str) -> float:
        """Return for how many seconds the node's breaker stays open; 0 when it is closed."""
        stats = self.nodes.get(node_id)
        return stats.breaker.blocked_seconds(self.monotonic()) if stats else 0.0

    def blocked_on(self, model_id: str) -> list[FleetNode]:
        """Return the nodes of a model's ring whose breakers are open or on trial."""
        now = self.monotonic()
        stats = (self.nodes[node_id] for node_id in self._open)
        nodes = (each.node for each in stats if each.breaker.blocked_seconds(now))
        return [node for node in nodes if node.capability_class.has_on_ring(node, model_id)]

    def record_latency(self, node_id: str, kind: Kind, latency_ms: float) -> None:
        """Record the time to a first byte: the newest counts for a fifth, a better one for half or more."""
        now = self.monotonic()
        if (stats := self.track(node_id)) is not None:
            smooth = latency_ms
            previous = stats.latencies.get(kind)
            if previous is not None:
                is_better = latency_ms < previous[0]
                weight = 1.0 - (now - previous[1]) / (BETTER_SECONDS if is_better else FORGET_SECONDS)
                if weight > 0:
                    weight *= 1.0 - (BETTER_WEIGHT if is_better else NEWEST_WEIGHT)
                    smooth += (previous[0] - latency_ms) * weight
            stats.latencies[kind] = (smooth, now)
            if stats.breaker.failures:
                stats.breaker.begin_response()
                self._open.discard(node_id)
        typical = self._kinds.get(kind)
        if typical is None:
            typical = self._kinds[kind] = KindStats()
            typical.typical_ms = latency_ms
        typical.typical_ms += (latency_ms - typical.typical_ms) * NEWEST_WEIGHT

    def record_start(self, node_id: str) -> int:
        """Record that a request is sent to the node; return its number, to be passed with its outcome."""
        stats = self.nodes.get(node_id)
        if stats is None:
            return 0
        breaker = stats.breaker
        return breaker.start(self.monotonic(), TRIAL_SECONDS) if breaker.failures else breaker.newest

    def record_success(self, node_id: str) -> None:
        """Record that the node served the request, or refused it as the client's fault."""
        stats = self.nodes.get(node_id)
        if stats is not None and stats.has_doubts:
            stats.shunned_until = 0.0
            stats.suspected_by.clear()
            stats.unproven = 0
            if stats.breaker.failures:
                stats.breaker.succeed()
                self._open.discard(node_id)

    def record_inconclusive(self, node_id: str, number: int) -> None:
        """Record that request `number` ended without evidence about the node, because its client left."""
        stats = self.nodes.get(node_id)
        if stats is not None:
            stats.breaker.withdraw(number)

    def record_failure(self, node: FleetNode, number: int) -> bool:
        """Record that the node failed request `number`; return whether that opened its breaker."""
        node_id = node.state.id
        if (stats := self.track(node_id)) is None:
            return False
        stats.has_doubts = True
        breaker, now = stats.breaker, self.monotonic()
        stats.shunned_until = now + SHUN_SECONDS
        opened = breaker.fail(now, lambda: self._may_open(node), number)
        if opened:
            self._open.add(node_id)
        return opened

    def record_suspicion(
        self, node_id: str, number: int, seconds: float = SHUN_SECONDS, *, suspicion: Suspicion | None = None
    ) -> None:
        """Record that request `number` failed, perhaps not by the node's fault: it is the last choice for `seconds`.

        Call `record_failure` when another node has served the request. Where there is no other, `suspicion` may prove
        that it is the node's fault.
        """
        self.record_inconclusive(node_id, number)
        if (stats := self.track(node_id)) is not None:
            stats.shunned_until = self.monotonic() + seconds
            stats.has_doubts = True
            if suspicion is not None and self._is_only_node(stats.node, suspicion.model_id):
                for _ in range(stats.prove(suspicion)):
                    self.record_failure(stats.node, number)

    def record_full(self, node_id: str, seconds: float) -> None:
        """Send the node no requests for a while: it said that it is busy for `seconds`."""
        if (stats := self.track(node_id)) is not None:
            stats.free_at = self.monotonic() + seconds
            stats.full_until = self.monotonic() + min(seconds, MAX_FULL_SECONDS)
            stats.has_doubts = True

    def record_lack(self, node_id: str, endpoint: str, model_id: str, owner: str) -> None:
        """Record that a request of `owner` met that the node lacks a model at an endpoint, or at `ANY_ENDPOINT`."""
        if (stats := self.track(node_id)) is not None:
            now = self.monotonic()
            known = stats.lacks.get((endpoint, model_id), {})
            owners = {name: until for name, until in known.items() if until > now}
            stats.lacks[endpoint, model_id] = {**owners, owner: now + LACK_SECONDS}
            stats.has_doubts = True
            self._lack_until[owner] = now + LACK_SECONDS

    def has_met_lacks(self, owner: str) -> bool:
        """Return whether nodes may lack something for this owner that they do not lack for all."""
        return self._lack_until.get(owner, 0.0) > self.monotonic()

    def record_question_refused(self, id_: str) -> None:
        """Ask the node, or the upstream of the model, no more for the usage of its streams: it refuses to be asked."""
        self._questions_refused[id_] = self.monotonic() + QUESTION_SECONDS

    def refuses_question(self, id_: str) -> bool:
        """Return whether the node, or the upstream of the model, refuses to be asked for the usage of its streams."""
        return bool(self._questions_refused) and self._questions_refused.get(id_, 0.0) > self.monotonic()

    def open_count(self) -> int:
        """Return how many nodes' breakers are open or on trial."""
        return len(self._open)

    def forget_ended(self) -> None:
        """Drop the statistics of deleted nodes and models, and what nodes lacked or refused too long ago."""
        now = self.monotonic()
        self._questions_refused = {id_: until for id_, until in self._questions_refused.items() if until > now}
        for node_id in [id_ for id_, stats in self.nodes.items() if self._fleet.find_node(id_) is not stats.node]:
            del self.nodes[node_id]
            self._open.discard(node_id)
        gone = [kind for kind in self._kinds if self._fleet.find_model(kind[0]) is None]
        for kind in gone:
            del self._kinds[kind]
        self._lack_until = {owner: until for owner, until in self._lack_until.items() if until > now}
        for stats in self.nodes.values():
            stats.forget_old_doubts(now)
            for kind in gone:
                stats.latencies.pop(kind, None)

    def _is_only_node(self, node: FleetNode, model_id: str) -> bool:
        ring = node.capability_class.rings.get(model_id)
        return ring is not None and len(ring) == 1

    def _may_open(self, node: FleetNode) -> bool:
        """Return whether no model would have more than half of its nodes blocked if this one was."""
        for model_id, ring in node.capability_class.rings.items():
            most = len(ring) // 2
            if most <= len(self._open) and 1 + sum(other is not node for other in self.blocked_on(model_id)) > most:
                return False
        return True
