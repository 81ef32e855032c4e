"""Where requests go: a node's or an upstream's URL, read and judged once, and the head of a request to it."""

from __future__ import annotations

from typing import Any, NamedTuple

from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.policy import EgressPolicy, ProviderUrl
from lucid_compute.registry.domain.passports import ModelPassport, Passport
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode

HOP_HEADER = "x-lucid-replica"
JOB_HEADER = b"x-request-id: "


class Target(NamedTuple):
    """A provider to send requests to. `heads` keeps each endpoint's head, all of it but the request's id."""

    url: ProviderUrl
    bearer: str | None
    replica_id: str
    heads: dict[str, bytes]

    def head(self, endpoint: str, job_id: str) -> bytes:
        """Return the head of a request to `/v1/{endpoint}`; nothing of the client's own head is in it."""
        head = self.heads.get(endpoint)
        if head is None:
            kind = ("Content-Type: application/json", "Accept: application/json, text/event-stream")
            head = self.heads[endpoint] = self._head("POST", endpoint, *kind) + JOB_HEADER
        return b"%b%b\r\n" % (head, job_id.encode())

    def listing_head(self) -> bytes:
        """Return the head of a question for the models that are served, `GET /v1/models`."""
        return self._head("GET", "models", "Accept: application/json")

    def _head(self, method: str, endpoint: str, *kind: str) -> bytes:
        lines = [
            f"{method} {self.url.base_path}/v1/{endpoint} HTTP/1.1",
            f"Host: {self.url.authority}",
            *kind,
            "Accept-Encoding: identity",
            "User-Agent: lucid-compute",
            f"{HOP_HEADER}: {self.replica_id}",
        ]
        if self.bearer is not None:
            lines.append(f"Authorization: Bearer {self.bearer}")
        return "\r\n".join([*lines, ""]).encode()


class _Known(NamedTuple):
    revision: int
    secrets: Any
    target: Target | EgressFault


class Upstreams:
    """The targets of nodes and upstreams, made again when a passport or its secret changes."""

    def __init__(self, fleet: Fleet, policy: EgressPolicy, replica_id: str) -> None:
        """Judge URLs by `policy`; `replica_id` is how a request that comes back to us is recognised."""
        self._fleet = fleet
        self._policy = policy
        self._replica_id = replica_id
        self._known: dict[str, _Known] = {}

    def of_node(self, node: FleetNode) -> Target:
        """Return where the node is.

        Raises:
            EgressFault: its URL is not one that this service may call.
        """
        return self._find(node.record, "inferenceKey")

    def of_upstream(self, model: ModelPassport) -> Target | None:
        """Return where an API model is served; None when nobody has said.

        Raises:
            EgressFault: as `of_node`.
        """
        return self._find(model.record, "upstreamApiKey") if model.record.metadata.get("upstream") else None

    def forget_ended(self) -> None:
        """Drop what is known of passports that are gone."""
        find_node, find_model = self._fleet.find_node, self._fleet.find_model
        for passport_id in [id_ for id_ in self._known if find_node(id_) is None and find_model(id_) is None]:
            del self._known[passport_id]

    def _find(self, record: Passport, secret: str) -> Target:
        secrets = self._fleet.secrets.of(record.id)
        known = self._known.get(record.id)
        if known is None or known.revision != record.revision or known.secrets is not secrets:
            known = self._known[record.id] = _Known(record.revision, secrets, self._make(record, secrets.get(secret)))
        if isinstance(known.target, EgressFault):
            raise EgressFault(known.target.kind, known.target.message)
        return known.target

    def _make(self, record: Passport, bearer: str | None) -> Target | EgressFault:
        upstream = record.metadata.get("upstream")
        text = upstream["url"] if upstream else record.metadata["inferenceUrl"]
        try:
            url = self._policy.check_url(text)
        except ValueError as error:
            return EgressFault(FaultKind.ADDRESS_REFUSED, str(error))
        if bearer is not None and not (bearer.isascii() and bearer.isprintable()):
            return EgressFault(FaultKind.ADDRESS_REFUSED, "The stored key has characters that no header may hold.")
        return Target(url, bearer, self._replica_id, {})
