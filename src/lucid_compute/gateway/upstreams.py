"""Where requests are sent: the checked URL of a node or of an API model's upstream, and the head of a request to it."""

from __future__ import annotations

from typing import Any, NamedTuple

from lucid_compute.egress.base_path import root_path_of
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.policy import EgressPolicy, ProviderUrl, tunnel_to
from lucid_compute.gateway.endpoints import InferenceEndpoint
from lucid_compute.registry.domain.passports import Connectivity, ModelPassport, Passport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode

HOP_HEADER = "x-lucid-replica"
JOB_HEADER = b"x-request-id: "


class Target(NamedTuple):
    """A node or upstream to send requests to. `heads` caches each endpoint's head without the request's id."""

    url: ProviderUrl
    bearer: str | None
    replica_id: str
    heads: dict[str, bytes]
    owner: str

    def head(self, endpoint: InferenceEndpoint, job_id: str, resource: str = "") -> bytes:
        """Return the head of a request to the endpoint; it contains nothing of the client's head.

        `resource`: the path below the base URL, if it is another one in each request.
        """
        head = None if resource else self.heads.get(endpoint.name)
        if head is None:
            further = [line.format(key=self.bearer) for line in endpoint.headers if self.bearer or "{key}" not in line]
            accepted = "*/*" if endpoint.shape.media else "application/json, text/event-stream"
            kind = [f"Accept: {accepted}", *further]
            if not (endpoint.is_form or endpoint.is_stored):  # the one's Content-Type has a boundary, the other no body
                kind.insert(0, "Content-Type: application/json")
            head = self._head(endpoint.method, resource or endpoint.name, *kind) + JOB_HEADER
            if not resource:
                self.heads[endpoint.name] = head
        return b"%b%b\r\n" % (head, job_id.encode())

    def path_of(self, name: str) -> str:
        """Return an endpoint's path on the node: below its base URL, or its root if the name begins with a slash."""
        base = self.url.base_path
        return f"{root_path_of(base)}{name}" if name.startswith("/") else f"{base}/{name}"

    def model_list_head(self) -> bytes:
        """Return the head of `GET` for `models` below the base URL, which lists the models that are served."""
        return self._head("GET", "models", "Accept: application/json")

    def _head(self, method: str, name: str, *kind: str) -> bytes:
        lines = [
            f"{method} {self.path_of(name)} HTTP/1.1",
            f"Host: {self.url.authority}",
            *kind,
            "Accept-Encoding: identity",
            "User-Agent: lucid-compute",
            f"{HOP_HEADER}: {self.replica_id}",
        ]
        if self.bearer is not None:
            lines.append(f"Authorization: Bearer {self.bearer}")
        return "\r\n".join([*lines, ""]).encode()


class _CachedTarget(NamedTuple):
    revision: int
    secrets: Any
    target: Target | EgressFault


class Upstreams:
    """The targets of nodes and of API models, cached until the passport or its credentials change."""

    def __init__(self, fleet: Fleet, policy: EgressPolicy, replica_id: str) -> None:
        """`replica_id` is sent with each request, so that one that comes back is recognised."""
        self._fleet = fleet
        self._policy = policy
        self._replica_id = replica_id
        self._cached: dict[str, _CachedTarget] = {}

    def of_node(self, node: FleetNode) -> Target:
        """Return the target of a node.

        Raises:
            EgressFault: the egress policy forbids its URL.
        """
        return self._find(node.record, "inferenceKey")

    def of_api_model(self, model: ModelPassport) -> Target | None:
        """Return the target of an API model; None when its passport names no upstream.

        Raises:
            EgressFault: the egress policy forbids its URL.
        """
        return self._find(model.record, "upstreamApiKey") if model.record.metadata.get("upstream") else None

    def forget_ended(self) -> None:
        """Drop the targets of deleted passports."""
        find_node, find_model = self._fleet.find_node, self._fleet.find_model
        for passport_id in [id_ for id_ in self._cached if find_node(id_) is None and find_model(id_) is None]:
            del self._cached[passport_id]

    def _find(self, record: Passport, secret: str) -> Target:
        secrets = self._fleet.secrets.of(record.id)
        cached = self._cached.get(record.id)
        if cached is None or cached.revision != record.revision or cached.secrets is not secrets:
            target = self._build(record, secrets.get(secret))
            cached = self._cached[record.id] = _CachedTarget(record.revision, secrets, target)
        if isinstance(cached.target, EgressFault):
            raise EgressFault(cached.target.kind, cached.target.message)
        return cached.target

    def _build(self, record: Passport, bearer: str | None) -> Target | EgressFault:
        if record.metadata.get("connectivity") == Connectivity.OUTBOUND:  # its agent adds the key, and knows the URL
            return Target(tunnel_to(record.id), None, self._replica_id, {}, record.owner)
        upstream = record.metadata.get("upstream")
        text = upstream["url"] if upstream else record.metadata["inferenceUrl"]
        try:
            url = self._policy.check_base_url(text)
        except ValueError as error:
            return EgressFault(FaultKind.ADDRESS_REFUSED, str(error))
        if bearer is not None and not (bearer.isascii() and bearer.isprintable()):
            return EgressFault(FaultKind.ADDRESS_REFUSED, "The stored key has characters that no header may hold.")
        return Target(url, bearer, self._replica_id, {}, record.owner)
