"""The matching engine: pure predicates that alone decide which node can run which model.

Source of the rules: the models guide, "Availability Check per Model" and "Compute Matching", and the contract's
section on models. The time is an argument; nothing here reads a clock, a database or the fleet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from lucid_compute.registry.domain.node_state import FRESH_SECONDS, DeclaredModel, NodeState, ReportedStatus
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport

FORMAT_RUNTIMES = {
    ModelFormat.SAFETENSORS: frozenset({"vllm", "tgi", "sglang", "tensorrt"}),
    ModelFormat.GGUF: frozenset({"ollama", "llama.cpp", "vllm"}),
    ModelFormat.API: frozenset[str](),
}


class ReasonCode(StrEnum):
    """Why a node can't run a model. The last six, of `routing_rules`, say why it gets no request for the model."""

    RUNTIME_MISMATCH = "RUNTIME_MISMATCH"
    VRAM_TOO_LOW = "VRAM_TOO_LOW"
    CONTEXT_TOO_SHORT = "CONTEXT_TOO_SHORT"
    HEARTBEAT_STALE = "HEARTBEAT_STALE"
    HEARTBEAT_MISSING = "HEARTBEAT_MISSING"
    REPORTED_UNHEALTHY = "REPORTED_UNHEALTHY"
    DRAINING = "DRAINING"
    DEREGISTERED = "DEREGISTERED"
    PASSPORT_INACTIVE = "PASSPORT_INACTIVE"
    NOT_CONNECTED = "NOT_CONNECTED"
    MODEL_NOT_SERVED = "MODEL_NOT_SERVED"
    AT_CAPACITY = "AT_CAPACITY"
    BREAKER_OPEN = "BREAKER_OPEN"
    REGION_NOT_ALLOWED = "REGION_NOT_ALLOWED"
    PRICE_TOO_HIGH = "PRICE_TOO_HIGH"
    LATENCY_TOO_HIGH = "LATENCY_TOO_HIGH"


class Reason(NamedTuple):
    """One failing rule: its code, a message with the next step, the value required and the value found."""

    code: ReasonCode
    message: str
    wanted: Any
    found: Any


def runtime_compatible(model: ModelPassport, node: NodeState) -> bool:
    """Return whether node and model share a runtime; a node that names none is compatible with models it serves."""
    runtimes = node.runtimes
    return not runtimes.isdisjoint(wanted_runtimes(model)) if runtimes else serves(model, node)


def hardware_compatible(model: ModelPassport, node: NodeState) -> bool:
    """Return whether the node has the VRAM and the context length that the model needs."""
    declaration = declaration_of(model, node)
    return _has_vram(model, node, declaration) and _has_context(model, node, declaration)


def is_healthy(node: NodeState, now: datetime) -> bool:
    """Return whether the node is fresh, reports healthy, is not draining, and its passport is active and not ended.

    An outbound node also has to have a connection to this replica.
    """
    return (
        node.is_fresh(now)
        and node.reported_status is ReportedStatus.HEALTHY
        and node.draining_since is None
        and node.passport.record.deregistered_at is None
        and node.passport.record.is_active
        and node.is_connected
    )


def is_available_on(model: ModelPassport, node: NodeState, now: datetime) -> bool:
    """Return whether this node could run the model right now."""
    return is_healthy(node, now) and runtime_compatible(model, node) and hardware_compatible(model, node)


def has_available_compute(model: ModelPassport, nodes: Iterable[NodeState], now: datetime) -> bool:
    """Return whether any of `nodes` could run the model right now; stops at the first. API models always run."""
    if model.format is ModelFormat.API:
        return True
    for node in nodes:  # noqa: SIM110 - a generator would cost as much as the judgement
        if is_available_on(model, node, now):
            return True
    return False


def has_serving_compute(model: ModelPassport, nodes: Iterable[NodeState], now: datetime) -> bool:
    """Return whether any of `nodes` could run the model now and declares or reports it. API models always run."""
    return model.format is ModelFormat.API or any(
        serves(model, node) and is_available_on(model, node, now) for node in nodes
    )


def serves(model: ModelPassport, node: NodeState) -> bool:
    """Return whether the node declares or reports the model, by its id, name or an alias."""
    return declaration_of(model, node) is not None or not node.reported_models.isdisjoint(model.known_as)


def rejection_reasons(
    model: ModelPassport, node: NodeState, now: datetime, *, of_kind: tuple[Reason, ...] | None = None
) -> tuple[Reason, ...]:
    """Return every failing rule, not only the first; none exactly when `is_available_on`.

    `of_kind` are the node's `fit_reasons` if they are known; all nodes of one capability class have the same.
    """
    of_kind = fit_reasons(model, node) if of_kind is None else of_kind
    return of_kind if is_healthy(node, now) else (*of_kind, *health_reasons(node, now))


def fit_reasons(model: ModelPassport, node: NodeState) -> tuple[Reason, ...]:
    """Return why the node's runtime and hardware don't fit the model; none exactly when they do."""
    asked = (model, node, declaration_of(model, node))
    return tuple(explain(*asked) for holds, explain in _FIT_RULES if not holds(*asked))


def health_reasons(node: NodeState, now: datetime) -> tuple[Reason, ...]:
    """Return why the node counts for no model right now; none exactly when `is_healthy`."""
    return tuple(explain(node, now) for holds, explain in _HEALTH_RULES if not holds(node, now))


def distance_of(reasons: Iterable[Reason]) -> float:
    """Return how far a node is from running the model: 0 when it can.

    A heartbeat or a drain is nearer than a runtime, and memory or context are as far as the node has too little.
    """
    return sum(_DISTANCES.get(reason.code, 1.0) * _lack(reason) for reason in reasons)


def declaration_of(model: ModelPassport, node: NodeState) -> DeclaredModel | None:
    """Return the node's declaration of the model, looked up by id, then name, then aliases; None: it declares none."""
    declared = node.declared
    if declared:
        for name in model.known_as:
            if name in declared:
                return declared[name]
    return None


def wanted_runtimes(model: ModelPassport) -> frozenset[str]:
    """Return the runtimes that can run the model: those it lists, else the recommended one, else its format's."""
    if model.runtimes:
        return model.runtimes
    if model.runtime_recommended:
        return frozenset({model.runtime_recommended})
    return FORMAT_RUNTIMES[model.format]


def minimum_vram_gb(model: ModelPassport, declaration: DeclaredModel | None) -> float:
    """Return the GB of VRAM that the model needs on a node with this declaration; 0 when it names no minimum."""
    by_quantization = model.min_vram_by_quantization
    if by_quantization:
        quantization = declaration.quantization.lower() if declaration and declaration.quantization else None
        return by_quantization.get(quantization or "", min(by_quantization.values()))
    return model.min_vram_gb or 0.0


def context_limit(node: NodeState, declaration: DeclaredModel | None) -> int | None:
    """Return the node's context length in tokens for a model with this declaration; None is no limit."""
    if declaration is not None and declaration.max_tokens is not None:
        return declaration.max_tokens
    return node.passport.max_context


_DISTANCES = {
    ReasonCode.PASSPORT_INACTIVE: 2.0,
    ReasonCode.RUNTIME_MISMATCH: 4.0,
    ReasonCode.CONTEXT_TOO_SHORT: 4.0,
    ReasonCode.VRAM_TOO_LOW: 8.0,
    ReasonCode.DEREGISTERED: 1e6,
}


def _lack(reason: Reason) -> float:
    """Return how many times the value found is in the value wanted, where both are amounts; else 1."""
    if reason.code not in {ReasonCode.VRAM_TOO_LOW, ReasonCode.CONTEXT_TOO_SHORT} or not reason.found:
        return 1.0
    return float(reason.wanted / reason.found)


def _has_vram(model: ModelPassport, node: NodeState, declaration: DeclaredModel | None) -> bool:
    return node.passport.vram_gb >= minimum_vram_gb(model, declaration)


def _has_context(model: ModelPassport, node: NodeState, declaration: DeclaredModel | None) -> bool:
    limit = context_limit(node, declaration)
    return limit is None or model.context_length is None or limit >= model.context_length


def _runtime_reason(model: ModelPassport, node: NodeState, _: DeclaredModel | None) -> Reason:
    wanted = sorted(wanted_runtimes(model))
    found = sorted(node.runtimes)
    message = (
        f"The model runs on {', '.join(wanted)}; the node runs {', '.join(found)}."
        if found
        else "The node names no runtime and does not declare this model: name its runtimes, or declare the model."
    )
    return Reason(ReasonCode.RUNTIME_MISMATCH, message, wanted, found)


def _vram_reason(model: ModelPassport, node: NodeState, declaration: DeclaredModel | None) -> Reason:
    wanted = minimum_vram_gb(model, declaration)
    found = node.passport.vram_gb
    message = f"The model needs {wanted:g} GB of VRAM; the node has {found:g} GB."
    return Reason(ReasonCode.VRAM_TOO_LOW, message, wanted, found)


def _context_reason(model: ModelPassport, node: NodeState, declaration: DeclaredModel | None) -> Reason:
    found = context_limit(node, declaration)
    message = f"The model's context is {model.context_length} tokens; the node takes {found}."
    return Reason(ReasonCode.CONTEXT_TOO_SHORT, message, model.context_length, found)


def _deregistered_reason(_: NodeState, __: datetime) -> Reason:
    message = "The node was deregistered; register it again."
    return Reason(ReasonCode.DEREGISTERED, message, "registered", "deregistered")


def _inactive_reason(node: NodeState, _: datetime) -> Reason:
    record = node.passport.record
    what = "is revoked, for good; register the node again" if record.has_ended else "is not active; make it so"
    return Reason(ReasonCode.PASSPORT_INACTIVE, f"The passport {what}.", "active", record.status.value)


def _unconnected_reason(_: NodeState, __: datetime) -> Reason:
    message = (
        "The node opens its own connections, and this replica of the service has none from it; "
        "see whether lucid agent run --outbound still runs there."
    )
    return Reason(ReasonCode.NOT_CONNECTED, message, "connected", "not connected")


def _draining_reason(node: NodeState, _: datetime) -> Reason:
    message = (
        "The node's operator drains it; POST /compute/resume/{passportId} ends that."
        if node.draining_since is not None
        else "The node said that it drains, as before a stop; it counts again when it reports healthy."
    )
    return Reason(ReasonCode.DRAINING, message, "not draining", "draining")


def _unhealthy_reason(_: NodeState, __: datetime) -> Reason:
    message = "The node's last heartbeat says unhealthy; look at its inference server."
    return Reason(ReasonCode.REPORTED_UNHEALTHY, message, "healthy", "unhealthy")


def _heartbeat_reason(node: NodeState, now: datetime) -> Reason:
    if node.last_heartbeat is None:
        message = "The node has sent no heartbeat yet; start its heartbeats."
        return Reason(ReasonCode.HEARTBEAT_MISSING, message, f"one within {FRESH_SECONDS} s", None)
    age = round((now - node.last_heartbeat.received_at).total_seconds(), 3)
    message = f"The newest heartbeat is {age:.0f} s old, over {FRESH_SECONDS} s; see whether the sender still runs."
    return Reason(ReasonCode.HEARTBEAT_STALE, message, FRESH_SECONDS, age)


# Each rule is the predicate that must hold and the reason when it does not, in the order of the reasons. Those of fit
# also get what the node declares of the model. `runtime_compatible`, `hardware_compatible` and `is_healthy` decide.
_FIT_RULES: tuple[
    tuple[
        Callable[[ModelPassport, NodeState, DeclaredModel | None], bool],
        Callable[[ModelPassport, NodeState, DeclaredModel | None], Reason],
    ],
    ...,
] = (
    (lambda model, node, _: runtime_compatible(model, node), _runtime_reason),
    (_has_vram, _vram_reason),
    (_has_context, _context_reason),
)
_HEALTH_RULES: tuple[
    tuple[Callable[[NodeState, datetime], bool], Callable[[NodeState, datetime], Reason]],
    ...,
] = (
    (lambda node, _: node.passport.record.deregistered_at is None, _deregistered_reason),
    (lambda node, _: node.passport.record.is_active, _inactive_reason),
    (lambda node, _: not node.is_draining, _draining_reason),
    (lambda node, _: node.reported_status is not ReportedStatus.UNHEALTHY, _unhealthy_reason),
    (NodeState.is_fresh, _heartbeat_reason),
    (lambda node, _: node.is_connected, _unconnected_reason),
)
