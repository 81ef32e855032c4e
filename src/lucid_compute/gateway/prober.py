"""Probes: the service asks a node which models it serves, over the same egress client that serves requests.

The node's response is not passed on. The caller gets a code, a sentence of ours, and which of the model names that the
registry knew already are in the node's list. Source: the security page, "Probes".
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, NamedTuple

from pydantic import BaseModel, FailFast, ValidationError

from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines, HttpConnection
from lucid_compute.egress.connection_kinds import ProbeConnection, TlsSession
from lucid_compute.egress.faults import ConnectTimedOut, EgressFault, FaultKind
from lucid_compute.errors import Overloaded, RoutingLoop
from lucid_compute.gateway.shapes import ProbeCode
from lucid_compute.gateway.upstreams import Target, Upstreams
from lucid_compute.registry.fleet.fleet import FleetNode

ANSWER_SECONDS = 5.0
MAX_LIST_BYTES = 1024 * 1024
MAX_PROBES = 64  # at a time
DEADLINES = Deadlines(answer_seconds=ANSWER_SECONDS, total_seconds=ANSWER_SECONDS)
_RUNTIMES = {"vllm": "vllm", "sglang": "sglang", "llamacpp": "llama.cpp", "library": "ollama"}
_KEY_REFUSED = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


class ListedModel(BaseModel):
    """An entry of a list of models in OpenAI's shape; other fields are ignored."""

    id: str
    owned_by: object = None


class ListedModels(BaseModel):
    """A list of models in OpenAI's shape; the first entry that is none ends the reading."""

    data: Annotated[list[ListedModel], FailFast()]

    def listed(self, model_ids: list[str]) -> tuple[str, ...]:
        """Return which of these ids the node serves; Ollama serves `name:latest` as `name` too."""
        served = {model.id for model in self.data}
        return tuple(model_id for model_id in model_ids if model_id in served or f"{model_id}:latest" in served)

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
    """The outcome of a probe; fields of steps that it did not reach are None."""

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
    """A node responded with something other than a list of models."""

    def __init__(self, code: ProbeCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Prober:
    """Probes nodes, a bounded number at a time."""

    def __init__(
        self,
        upstreams: Upstreams,
        client: HttpClient,
        spend: Callable[[str], None],
        *,
        deadlines: Deadlines = DEADLINES,
        max_probes: int = MAX_PROBES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """`spend` subtracts a probe from a host's allowance, or raises RateLimited when none is left."""
        self._upstreams = upstreams
        self._client = client
        self._spend = spend
        self._deadlines = deadlines
        self._max_probes = max_probes
        self._monotonic = monotonic
        self._running = 0

    async def probe(self, node: FleetNode) -> ProbeResult:
        """Probe the node and return the outcome.

        Raises:
            RateLimited: its host was probed less than ten seconds ago.
            Overloaded: too many probes run.
        """
        try:
            target = self._upstreams.of_node(node)
        except EgressFault as fault:
            return ProbeResult(_code_of(fault), fault.message)
        if self._running >= self._max_probes:
            message = "Many nodes are being probed right now. Ask again in 1 s."
            raise Overloaded(message, retry_after_seconds=1)
        self._spend(target.url.host)
        self._running += 1
        try:
            return await self._connect_and_ask(target, sorted({*node.state.declared, *node.state.reported_models}))
        finally:
            self._running -= 1

    async def _connect_and_ask(self, target: Target, expected: list[str]) -> ProbeResult:
        began = self._monotonic()
        try:
            connection = await self._client.connect(target.url, ProbeConnection, owner=target.owner)
        except EgressFault as fault:
            return ProbeResult(_code_of(fault), fault.message)
        try:
            tls = connection.tls if isinstance(connection, ProbeConnection) else None
            result = ProbeResult(ProbeCode.OK, "", connect_ms=self._ms_since(began), tls=tls)
            return await self._ask(connection, target, expected, result)
        finally:
            self._client.release(target.url, connection)

    async def _ask(
        self, connection: HttpConnection, target: Target, expected: list[str], result: ProbeResult
    ) -> ProbeResult:
        """Return the result completed with what the node says of its models."""
        sent_at = self._monotonic()
        try:
            connection.send(target.model_list_head(), b"", self._deadlines, wants_stream=False)
            body = await connection.receive()
        except EgressFault as fault:
            return result._replace(code=_code_of(fault), message=fault.message, http_status=connection.status or None)
        result = result._replace(http_status=connection.status, answer_ms=self._ms_since(sent_at))
        try:
            models = _parse_list(connection.status, body)
        except ProbeFault as fault:
            return result._replace(code=fault.code, message=fault.message)
        return _compare(models, expected, result)

    def _ms_since(self, began: float) -> float:
        return round((self._monotonic() - began) * 1000, 1)


def _parse_list(status: int, body: bytes) -> ListedModels:
    """Return the node's list of models.

    Raises:
        ProbeFault: the response is none.
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
        raise ProbeFault(
            ProbeCode.BAD_STATUS, f"The node answered the request for its list of models with status {status}."
        )
    if len(body) > MAX_LIST_BYTES:
        raise ProbeFault(ProbeCode.BAD_RESPONSE, f"The node's list of models is over {MAX_LIST_BYTES} bytes.")
    try:
        return ListedModels.model_validate_json(body)
    except ValidationError:
        raise ProbeFault(ProbeCode.NOT_JSON, "The node's answer is no list of models in JSON.") from None


def _compare(models: ListedModels, expected: list[str], result: ProbeResult) -> ProbeResult:
    listed = models.listed(expected)
    found = set(listed)
    missing = tuple(model for model in expected if model not in found)
    code, message = ProbeCode.OK, "The node answers, and lists every model that it declares or reports."
    if missing:
        code, message = ProbeCode.MODEL_MISSING, f"The node answers, and does not list {', '.join(missing)}."
    elif not expected:
        message = "The node answers; it declares and reports no model yet."
    return result._replace(code=code, message=message, runtime=models.runtime, listed=listed, missing=missing)


def _code_of(fault: EgressFault) -> ProbeCode:
    if isinstance(fault, ConnectTimedOut):
        return ProbeCode.CONNECT_TIMED_OUT
    if fault.kind in {FaultKind.ANSWER_TIMEOUT, FaultKind.TOTAL_TIMEOUT}:
        return ProbeCode.FIRST_BYTE_TIMEOUT
    if fault.kind is FaultKind.TOO_LARGE:
        return ProbeCode.BAD_RESPONSE
    return ProbeCode(fault.kind.value)
