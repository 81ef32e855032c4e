"""One client request as the gateway serves it: its state while it runs, the criteria for its node, its response."""

from __future__ import annotations

from collections.abc import Container
from random import getrandbits
from urllib.parse import quote

from lucid_compute.accounting.jobs import Job
from lucid_compute.egress.faults import Blame, EgressFault
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.gateway.tracing import Span
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.keys.authentication import Admission
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy, context_on
from lucid_compute.web.lanes import Headers, IncomingRequest, LaneClient, Response

Failed = tuple[FleetNode | None, EgressFault]


class RunningRequest(Admission):
    """A request that runs: what the watchdog inspects, and what its exchange with a node calls.

    - `key_id`: empty until the request is authenticated.
    - `has_body`: the request has arrived completely. `has_begun`: its response has begun.
    - `sending_since`: when the client stopped reading what was written; 0 while it reads.
    - `job`: the attempt that runs or ran last.
    """

    key_id = ""
    job: Job | None = None
    sending_since = 0.0
    has_body = False
    has_begun = False

    def __init__(self, client: LaneClient, request: IncomingRequest, started_at: float) -> None:
        super().__init__(client, request)
        self.started_at = started_at

    def succeed(self, response: Response | bytes) -> None:
        """End the request with the response of a node, or with the last part of one that has begun."""
        raise NotImplementedError


class Criteria:
    """The criteria for choosing a node: model, endpoint, the request's policy, its session, and nodes already tried.

    `owner` is of the request's key: what nodes said that they lack counts for who met it, and then for all.
    `longer_than`: the longest context in tokens that was too short for the request, if one was.
    """

    __slots__ = ("endpoint", "is_stream", "kind", "longer_than", "model", "owner", "policy", "session", "tried")

    def __init__(
        self,
        model: ModelPassport,
        policy: RoutingPolicy = NO_POLICY,
        *,
        endpoint: str = "chat/completions",
        session: str | None = None,
        is_stream: bool = False,
        owner: str = "",
    ) -> None:
        self.model = model
        self.owner = owner
        self.policy = policy
        self.endpoint = endpoint
        self.session = session
        self.is_stream = is_stream
        self.kind = (model.id, is_stream)  # requests of one kind have similar latencies
        self.tried: Container[str] = ()
        self.longer_than: int | None = None


class TriedNodes:
    """The nodes not to try for a request: those that were tried, and those without a longer context than they had.

    The latter are left out once a context was too short.
    """

    def __init__(self, fleet: Fleet, criteria: Criteria, failed: list[Failed]) -> None:
        self._fleet = fleet
        self._criteria = criteria
        self._ids = {node.state.id for node, _ in failed if node is not None}

    def __contains__(self, node_id: object) -> bool:
        """Return whether the node is not to be tried."""
        longer_than, is_tried = self._criteria.longer_than, node_id in self._ids
        if longer_than is None or is_tried:
            return is_tried
        node = self._fleet.find_node(str(node_id))
        limit = None if node is None else context_on(self._criteria.model, node.state)
        return limit is not None and limit <= longer_than


_OF_STREAMS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # nginx would hold events back
_IN_HEADER = " !#$&'()*+,/:;<=>?@[]^`{|}"  # as they are; in names of models only letters of other scripts are escaped
_VARIANT = 0b10 << 62  # RFC 9562's, in the upper bits of the id's second half


def new_job_id(time_ns: int) -> str:
    """Return a new UUID of version 7: ids made one after another are neighbours in the ledger's index."""
    ms, rest = time_ns // 1_000_000, getrandbits(74)
    low = rest >> 12 | _VARIANT
    return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{rest & 0xFFF:03x}-{low >> 48:04x}-{low & 0xFFFFFFFFFFFF:012x}"


class GatewayRequest:
    """An admitted request: what it asks, who makes it, and its response.

    - `inference`: the OpenAI request. `running`: its state.
    - `headers`: added to every response.
    - `span`: None if the request is not traced.
    - `tokens`: what it has cost so far.
    - `routed_from`: the criteria of the first model of a route. `variants`: all its models that the key may
      use. `others`: those of them that were not tried yet.
    - `failed`: the nodes of its attempts that failed, and how.
    - `avoids_idle`: an idle connection turned out to be closed, so the next attempts open new ones. Otherwise a node
      could receive the request a third time.
    """

    __slots__ = (
        "avoids_idle",
        "criteria",
        "failed",
        "headers",
        "inference",
        "job_id",
        "model",
        "others",
        "principal",
        "routed_from",
        "running",
        "span",
        "tokens",
        "variants",
    )

    def __init__(
        self, principal: Principal, inference: InferenceRequest, model: ModelPassport, running: RunningRequest
    ) -> None:
        self.principal = principal
        self.inference = inference
        self.model = model
        self.running = running
        self.job_id = ""
        self.headers: Headers = []
        self.span: Span | None = None
        self.tokens = 0
        self.avoids_idle = False
        self.failed: list[Failed] = []
        self.routed_from: Criteria | None = None
        self.variants: list[ModelPassport] = []
        self.others: list[ModelPassport] = []
        self.criteria = Criteria(
            model,
            inference.policy,
            endpoint=inference.endpoint.name,
            is_stream=inference.is_stream,
            owner=principal.owner,
        )

    def identify(self, job_id: str, session: str | None, headers: Headers) -> None:
        """Set the job's id, the session that ties the request to a node, and the headers of every response."""
        self.job_id = job_id
        self.criteria.session = session
        self.headers = headers

    def use(self, variants: list[ModelPassport]) -> None:
        """Ask for the first of these models, and later for the others in turn; `variants` is not empty."""
        former, inference = self.criteria, self.inference
        self.model, self.others = variants[0], variants[1:]
        self.criteria = Criteria(
            self.model,
            inference.policy,
            endpoint=inference.endpoint.name,
            session=former.session,
            is_stream=inference.is_stream,
            owner=former.owner,
        )
        self.routed_from = self.routed_from or self.criteria
        self.variants = self.variants or variants

    def failed_alike(self, fault: EgressFault) -> bool:
        """Return whether another node failed in the same way, and may have failed because of the request."""
        return fault.blame is Blame.PERHAPS_THE_REQUEST and any(
            other is not fault and other.reason == fault.reason for _, other in self.failed
        )

    @property
    def has_begun(self) -> bool:
        """Return whether the client has received a part of its response."""
        return self.running.has_begun

    def response_headers(self, content_type: bytes, node_id: str | None, attempt: int, length: int = -1) -> Headers:
        """Return the headers of a node's response; a `length` below 0 means that it is unknown."""
        headers = [
            (b"content-type", content_type),
            (b"x-lucid-job", self.job_id.encode()),
            (b"x-lucid-attempts", b"%d" % attempt),
            *self.headers,
        ]
        if node_id is not None:
            headers.append((b"x-lucid-node", node_id.encode()))
        if self.routed_from is not None:
            headers.append((b"x-lucid-model", quote(self.model.record.name, safe=_IN_HEADER).encode()))
        headers += [(b"content-length", b"%d" % length)] if length >= 0 else _OF_STREAMS
        return headers
