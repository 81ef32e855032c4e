"""Probes: the service goes to a node itself and asks which models it serves, over the same way as requests go.

What the node answers stays here. Who asked is told a code, a sentence of ours, and which of the names that we knew
before are in the node's list. Source: the security page, "Probes".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import NamedTuple

from pydantic import BaseModel, ValidationError

from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines, HttpConnection
from lucid_compute.egress.connection_kinds import ObservedConnection, TlsSession
from lucid_compute.egress.faults import ConnectTimedOut, EgressFault, FaultKind
from lucid_compute.errors import Overloaded, RoutingLoop
from lucid_compute.gateway.shapes import ProbeCode
from lucid_compute.gateway.upstreams import Target, Upstreams
from lucid_compute.registry.fleet.fleet import FleetNode

ANSWER_SECONDS = 5.0
MAX_LIST_BYTES = 1024 * 1024
MAX_PROBES = 64  # at a time
_DEADLINES = Deadlines(answer_seconds=ANSWER_SECONDS, total_seconds=ANSWER_SECONDS)
_RUNTIMES = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "library": "ollama"}
_KEY_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


class ListedModel(BaseModel):
    """An entry of a list of models in OpenAI's shape; what else it says is ignored."""

    id: str
    owned_by: object = None


class ListedModels(BaseModel):
    """A list of models in OpenAI's shape."""

    data: list[ListedModel]

    def lists(self, model_id: str) -> bool:
        """Return whether the node serves a model by this id; Ollama serves `name:latest` as `name` too."""
        return any(model.id in (model_id, f"{model_id}:latest") for model in self.data)

    @property
    def runtime(self) -> str | None:
        """The runtime that `owned_by` suggests; None when it suggests none."""
        for model in self.data:
            owner = model.owned_by
            if owner == model.id:
                return "tgi"
            if isinstance(owner, str) and owner in _RUNTIMES:
                return _RUNTIMES[owner]
        return None


class ProbeResult(NamedTuple):
    """What came of a probe; None is what it did not come to."""

    code: ProbeCode
    message: str
    http_status: int | None = None
    connect_ms: float | None = None
    answer_ms: float | None = None
    tls: TlsSession | None = None
    runtime: str | None = None
    listed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def is_reachable(self) -> bool:
        """Return whether the node answered with a list of models."""
        return self.code in {ProbeCode.OK, ProbeCode.MODEL_MISSING}


class ProbeFault(Exception):
    """A node answered something that is no list of models."""

    def __init__(self, code: ProbeCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Prober:
    """Probes nodes, a bounded number at a time."""

    def __init__(self, targets: Upstreams, client: HttpClient, spend: Callable[[str], None]) -> None:
        """Go out by `client`; `spend` takes a host's allowance and raises when it has none left."""
        self._targets = targets
        self._client = client
        self._spend = spend
        self._running = 0

    async def probe(self, node: FleetNode) -> ProbeResult:
        """Go to the node and answer what came of it.

        Raises:
            RateLimited: its host was probed only just.
            Overloaded: too many probes are under way.
        """
        try:
            target = self._targets.of_node(node)
        except EgressFault as fault:
            return ProbeResult(_code_of(fault), fault.message)
        if self._running >= MAX_PROBES:
            message = "Many nodes are being probed right now. Ask again after Retry-After seconds."
            raise Overloaded(message, retry_after_seconds=1)
        self._spend(target.url.host)
        self._running += 1
        try:
            return await self._go_to(target, sorted({*node.state.declared, *node.state.reported_models}))
        finally:
            self._running -= 1

    async def _go_to(self, target: Target, wanted: list[str]) -> ProbeResult:
        began = time.monotonic()
        try:
            connection = await self._client.connect(target.url, ObservedConnection)
        except EgressFault as fault:
            return ProbeResult(_code_of(fault), fault.message)
        try:
            tls = connection.tls if isinstance(connection, ObservedConnection) else None
            finding = ProbeResult(ProbeCode.OK, "", connect_ms=_ms_since(began), tls=tls)
            return await _ask(connection, target, wanted, finding)
        finally:
            self._client.give_back(target.url, connection)


async def _ask(connection: HttpConnection, target: Target, wanted: list[str], finding: ProbeResult) -> ProbeResult:
    """Return the finding with what the node says of its models."""
    asked = time.monotonic()
    try:
        connection.send(target.listing_head(), b"", _DEADLINES, wants_stream=False)
        body = await connection.receive()
    except EgressFault as fault:
        return finding._replace(code=_code_of(fault), message=fault.message, http_status=connection.status or None)
    finding = finding._replace(http_status=connection.status, answer_ms=_ms_since(asked))
    try:
        models = _read(connection.status, body)
    except ProbeFault as fault:
        return finding._replace(code=fault.code, message=fault.message)
    return _compare(models, wanted, finding)


def _read(status: int, body: bytes) -> ListedModels:
    """Read the node's list.

    Raises:
        ProbeFault: it is none.
    """
    if status == RoutingLoop.status:
        raise ProbeFault(ProbeCode.ROUTING_LOOP, "The URL leads back to this service.")
    if status in _KEY_REFUSED:
        sentence = f"The node refused the key that this service sent, or that it sent none (status {status})."
        raise ProbeFault(ProbeCode.AUTH_REFUSED, sentence)
    if HTTPStatus.MULTIPLE_CHOICES <= status < HTTPStatus.BAD_REQUEST:
        sentence = f"The node redirects elsewhere (status {status}), and redirects are not followed."
        raise ProbeFault(ProbeCode.REDIRECTED, sentence)
    if status != HTTPStatus.OK:
        raise ProbeFault(ProbeCode.BAD_STATUS, f"The node answered GET /v1/models with status {status}.")
    if len(body) > MAX_LIST_BYTES:
        raise ProbeFault(ProbeCode.BAD_RESPONSE, f"The node's list of models is over {MAX_LIST_BYTES} bytes.")
    try:
        return ListedModels.model_validate_json(body)
    except ValidationError:
        raise ProbeFault(ProbeCode.NOT_JSON, "The node's answer is no list of models in JSON.") from None


def _compare(models: ListedModels, wanted: list[str], finding: ProbeResult) -> ProbeResult:
    missing = tuple(model for model in wanted if not models.lists(model))
    listed = tuple(model for model in wanted if model not in missing)
    code, message = ProbeCode.OK, "The node answers, and lists every model that it declares or reports."
    if missing:
        code, message = ProbeCode.MODEL_MISSING, f"The node answers, and does not list {', '.join(missing)}."
    elif not wanted:
        message = "The node answers; it declares and reports no model yet."
    return finding._replace(code=code, message=message, runtime=models.runtime, listed=listed, missing=missing)


def _code_of(fault: EgressFault) -> ProbeCode:
    if isinstance(fault, ConnectTimedOut):
        return ProbeCode.CONNECT_TIMED_OUT
    if fault.kind in {FaultKind.ANSWER_TIMEOUT, FaultKind.TOTAL_TIMEOUT}:
        return ProbeCode.FIRST_BYTE_TIMEOUT
    return ProbeCode(fault.kind.value)


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)
