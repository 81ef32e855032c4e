"""The error of a request that no node served, from how its attempts failed. Pure."""

from __future__ import annotations

from collections import Counter
from http import HTTPStatus
from typing import Any

from lucid_compute.egress.faults import (
    OURS,
    TIMEOUTS,
    BadStatus,
    Blame,
    ContextTooShort,
    EgressFault,
    FaultKind,
    NodeBusy,
    NotOffered,
)
from lucid_compute.errors import (
    InvalidRequest,
    LucidError,
    ModelUnavailable,
    NodeFailed,
    NodeTimeout,
    Overloaded,
    RefusedByNode,
    RoutingLoop,
    Shortage,
)
from lucid_compute.gateway.request import Failed, GatewayRequest
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.wire import FieldFault

_TOO_LARGE = (
    ": the answer is larger than this service passes on. Ask for less at a time, or ask its operator to raise "
    "LUCID_ANSWER_MAX_MIB, LUCID_STREAM_MAX_MIB or LUCID_EVENT_MAX_MIB"
)
_NOT_STORED = "The node answered 404: it has not stored what the request names, such as previous_response_id."


def error_of(request: GatewayRequest, failed: list[Failed], why: str = "") -> LucidError:
    """Return the error of a request whose attempts all failed; `why` says why there was no further attempt."""
    faults = [fault for _, fault in failed]
    attempts: list[dict[str, Any]] = [
        {"passportId": node.state.id if node else None, "reason": fault.reason} for node, fault in failed
    ]
    if any(_is_loop(fault) for fault in faults):
        return RoutingLoop(attempts)
    if (refused := _refused(failed)) is not None:
        return refused
    if are_passing(failed):
        return _unavailable(request, failed)
    if all(fault.kind in OURS for fault in faults):
        message = f"This service could not connect to a node ({faults[-1].message}). Send it again after Retry-After."
        return Overloaded(message, retry_after_seconds=1)
    if all(fault.kind in TIMEOUTS for fault in faults):
        return NodeTimeout(attempts, has_begun=request.has_begun)
    said = next((fault.said for fault in reversed(faults) if isinstance(fault, BadStatus) and fault.said), "")
    if faults[-1].kind is FaultKind.TOO_LARGE:
        why = _TOO_LARGE
    return NodeFailed(attempts, why=why, said=said, is_requests_own=_is_requests_own(request, faults))


def _refused(failed: list[Failed]) -> InvalidRequest | None:
    """Return the error of a request that the nodes refused, as one too long or for what they have not stored."""
    fault = failed[-1][1]
    if isinstance(fault, ContextTooShort) and _is_too_long(failed):
        return RefusedByNode(fault.status, fault.body)
    if not is_about_stored(failed):
        return None
    said = next((fault.said for _, fault in failed if isinstance(fault, NotOffered) and fault.said), "")
    return InvalidRequest([FieldFault("", said or _NOT_STORED)], status=HTTPStatus.NOT_FOUND)


def are_passing(failed: list[Failed]) -> bool:
    """Return whether no node failed: each one lacks what was asked for or a long context, is busy, or has left.

    A request that is too long for all of them is refused for that, see `error_of`.
    """
    return (
        bool(failed)
        and not _is_too_long(failed)
        and all(
            isinstance(fault, (NotOffered, NodeBusy, ContextTooShort)) or fault.kind is FaultKind.NODE_LEFT
            for _, fault in failed
        )
    )


def _is_too_long(failed: list[Failed]) -> bool:
    return all(isinstance(fault, ContextTooShort) for _, fault in failed)


def is_about_stored(failed: list[Failed]) -> bool:
    """Return whether each node answered 404 to a request that may name a thing which a node has stored."""
    return bool(failed) and all(
        isinstance(fault, NotOffered) and not fault.is_learned and fault.status == HTTPStatus.NOT_FOUND
        for _, fault in failed
    )


def busy_count(failed: list[Failed]) -> int:
    """Return how many nodes answered that they are busy."""
    return sum(isinstance(fault, NodeBusy) for _, fault in failed)


def soonest_seconds(failed: list[Failed]) -> float | None:
    """Return when the first of the busy nodes said that it is free; None if no node is busy."""
    return min((fault.retry_after_seconds for _, fault in failed if isinstance(fault, NodeBusy)), default=None)


def _unavailable(request: GatewayRequest, failed: list[Failed]) -> ModelUnavailable:
    counted = Counter(_code_of(fault) for _, fault in failed)
    lacking, busy = counted[ReasonCode.MODEL_NOT_SERVED], counted[ReasonCode.AT_CAPACITY]
    return ModelUnavailable(
        request.model.record.name,
        {code.value: count for code, count in counted.items()},
        Shortage.NODES_BUSY if busy else Shortage.NO_NODE if lacking else Shortage.NO_HEALTHY_NODE,
        lacking=lacking,
        endpoint=request.criteria.endpoint,
        retry_after_seconds=soonest_seconds(failed),
    )


def _code_of(fault: EgressFault) -> ReasonCode:
    if isinstance(fault, NodeBusy):
        return ReasonCode.AT_CAPACITY
    if isinstance(fault, ContextTooShort):
        return ReasonCode.CONTEXT_TOO_SHORT
    return ReasonCode.MODEL_NOT_SERVED if isinstance(fault, NotOffered) else ReasonCode.DRAINING


def _is_loop(fault: EgressFault) -> bool:
    came_back = isinstance(fault, BadStatus) and fault.status == RoutingLoop.status
    return came_back or fault.kind is FaultKind.ROUTING_LOOP


def _is_requests_own(request: GatewayRequest, faults: list[EgressFault]) -> bool:
    """Return whether the request probably made the nodes fail: one said so, or two failed alike."""
    return any(isinstance(fault, BadStatus) and fault.is_requests_own for fault in faults) or any(
        fault.blame is Blame.PERHAPS_THE_REQUEST and request.failed_alike(fault) for fault in faults
    )
