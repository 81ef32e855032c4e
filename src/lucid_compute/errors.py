"""The error tree: every refusal that a client can receive, with its code, status and a sentence that says what to do.

LucidError
├── InvalidRequest            422, 400 (not JSON) RefusedByNode
├── Unauthorized              401
├── Forbidden                 403 ModelNotAllowed
├── NotFound                  404 PassportNotFound, NodeNotFound, ModelNotFound, KeyNotFound,
│                                 WebhookNotFound, PeriodNotFound, RouteNotFound
├── MethodNotAllowed          405
├── Conflict                  409 PassportExists, ModelNameTaken, IdempotencyConflict, RequestsInFlight,
│                                 PeriodConflict
├── NodeDeregistered          410
├── PayloadTooLarge           413
├── UnsupportedMediaType      415
├── RateLimited               429 BudgetExceeded
├── NodeFailed                502
├── Unavailable               503 Overloaded, DatabaseUnavailable, ModelUnavailable
├── NodeTimeout               504
└── RoutingLoop               508
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from enum import StrEnum
from math import ceil
from typing import Any, ClassVar
from urllib.parse import quote

from lucid_compute.wire import MAX_FAULTS, FieldFault

_MODELS_NAMED = 5  # in a message


class Shortage(StrEnum):
    """Why no node could serve a request, as one word: how far the best node came, the furthest first."""

    NODES_BUSY = "nodes_busy"
    NODES_FAILING = "nodes_failing"  # their breakers are open
    NO_HEALTHY_NODE = "no_healthy_node"
    NO_NODE_SUITS = "no_node_suits"  # the request's own policy
    NO_NODE = "no_node"  # names the model, and fits it
    NO_UPSTREAM = "no_upstream"


class LucidError(Exception):
    """A refusal in the contract's shape; subclasses set its code and status."""

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500

    def __init__(
        self, message: str, *, details: dict[str, Any] | None = None, retry_after_seconds: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details or {}
        self.retry_after_seconds = retry_after_seconds

    @property
    def http_status(self) -> int:
        """The status of the response."""
        return self.status

    @property
    def cause(self) -> str:
        """The cause under which the loss report counts a refused request."""
        return self.code.lower()

    def body(self) -> dict[str, Any]:
        """Return the response's JSON body, as in the contract."""
        return {
            "error": {"code": self.code, "message": self.message, "status": self.http_status, "details": self.details}
        }


class InvalidRequest(LucidError):
    """The request can't be understood; `details.fields` names each fault."""

    code = "INVALID_REQUEST"
    status = 422

    def __init__(self, faults: Sequence[FieldFault], *, status: int = 422) -> None:
        """`details` lists the faults, at most MAX_FAULTS, and the message has the first one."""
        faults = faults[:MAX_FAULTS]
        first = faults[0]
        more = f" ({len(faults) - 1} more in details.fields)" if len(faults) > 1 else ""
        where = f"{first.path}: " if first.path else ""
        super().__init__(
            f"{where}{first.message}{more}",
            details={"fields": [{"path": fault.path, "message": fault.message} for fault in faults]},
        )
        self._status = status

    @property
    def http_status(self) -> int:
        """422, or 400 for a body that is not JSON at all."""
        return self._status

    @classmethod
    def at(cls, path: str, message: str) -> InvalidRequest:
        """Return an error with a single fault."""
        return cls([FieldFault(path, message)])


class RefusedByNode(InvalidRequest):
    """Every node that could be asked refused the request; `response` is the last one's, passed on as it is."""

    def __init__(self, status: int, response: bytes) -> None:
        super().__init__([FieldFault("", "The node refused the request.")], status=status)
        self.response = response


class Unauthorized(LucidError):
    """No valid key came with the request."""

    code = "UNAUTHORIZED"
    status = 401


class Forbidden(LucidError):
    """The key is valid but may not do this."""

    code = "FORBIDDEN"
    status = 403


class ModelNotAllowed(Forbidden):
    """The key may use other models only; `details.allowed` lists them."""

    code = "MODEL_NOT_ALLOWED"

    def __init__(self, model: str, allowed: Sequence[str]) -> None:
        named = ", ".join([*allowed[:_MODELS_NAMED], *(["…"] if len(allowed) > _MODELS_NAMED else [])])
        super().__init__(
            f"This key may not use the model {model!r}. Use one of {named}, or ask an admin for another key.",
            details={"model": model, "allowed": list(allowed)},
        )


class NotFound(LucidError):
    """The resource does not exist, or the caller may not see it."""

    code = "ROUTE_NOT_FOUND"
    status = 404


class PassportNotFound(NotFound):
    """The caller has no passport with that id."""

    code = "PASSPORT_NOT_FOUND"

    def __init__(self, passport_id: str) -> None:
        super().__init__(
            f"No passport {passport_id!r} is yours. GET /passports lists the ones this key can see.",
            details={"passportId": passport_id},
        )


class NodeNotFound(NotFound):
    """The caller has no compute passport with that id."""

    code = "NODE_NOT_FOUND"

    def __init__(self, passport_id: str) -> None:
        super().__init__(
            f"No node {passport_id!r} is yours. Register it with POST /passports, or list yours with GET /compute.",
            details={"passportId": passport_id},
        )


class ModelNotFound(NotFound):
    """No model has that id, name or alias."""

    code = "MODEL_NOT_FOUND"

    def __init__(self, id_or_name: str) -> None:
        super().__init__(
            f"No model has the id, name or alias {id_or_name!r}. Names are case-sensitive; GET /models lists them.",
            details={"model": id_or_name},
        )


class KeyNotFound(NotFound):
    """No key has that id."""

    code = "KEY_NOT_FOUND"

    def __init__(self, key_id: str) -> None:
        super().__init__(f"No key has the id {key_id!r}. GET /keys lists them.", details={"keyId": key_id})


class WebhookNotFound(NotFound):
    """The caller has no webhook with that id."""

    code = "WEBHOOK_NOT_FOUND"

    def __init__(self, webhook_id: str) -> None:
        super().__init__(
            f"No webhook {webhook_id!r} is yours. GET /webhooks lists them.", details={"webhookId": webhook_id}
        )


class PeriodNotFound(NotFound):
    """No closed period has that id."""

    code = "PERIOD_NOT_FOUND"

    def __init__(self, period_id: str) -> None:
        super().__init__(
            f"No closed period has the id {period_id!r}. GET /payouts/periods lists them.",
            details={"periodId": period_id},
        )


class RouteNotFound(NotFound):
    """No route has that path."""


class MethodNotAllowed(LucidError):
    """The path exists, but not with this method."""

    code = "METHOD_NOT_ALLOWED"
    status = 405

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        """Name `method` and the methods of the path in the message."""
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{method} is not a method of this path; it takes {self.allowed}.")


class Conflict(LucidError):
    """The request is well formed, but conflicts with the current state."""

    status = 409


class PassportExists(Conflict):
    """The owner already has a passport with that type and name."""

    code = "PASSPORT_EXISTS"

    def __init__(self, passport_id: str, type_: str, name: str) -> None:
        super().__init__(
            f"You have a {type_} passport named {name!r} already ({passport_id}). Change it with PATCH "
            f"/passports/{passport_id}, or choose another name.",
            details={"passportId": passport_id},
        )


class ModelNameTaken(Conflict):
    """An active model already has that name or alias."""

    code = "MODEL_NAME_TAKEN"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"An active model is called {name!r} already, by name or alias; names are shared by all owners. "
            "Choose another one, for example with your organisation before a slash.",
            details={"name": name},
        )


class IdempotencyConflict(Conflict):
    """An `Idempotency-Key` was sent again with another body."""

    code = "IDEMPOTENCY_CONFLICT"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The Idempotency-Key {key!r} was used with another body. Send the same body again, or a new key.",
            details={"idempotencyKey": key},
        )


class RequestsInFlight(Conflict):
    """Requests are still in flight on the node."""

    code = "REQUESTS_IN_FLIGHT"

    def __init__(self, in_flight: int) -> None:
        fact = f"{in_flight} requests still run on this node."
        if not in_flight:
            fact = "The node's drain was ended meanwhile, or not every replica has applied it yet."
        super().__init__(
            f"{fact} Drain it and wait for drained, pass waitSeconds, or pass force=true to cut requests off.",
            details={"inFlight": in_flight},
        )


class PeriodConflict(Conflict):
    """The period to close leaves out days, or contains days that are already closed."""

    code = "PERIOD_CONFLICT"

    def __init__(self, message: str, starts_on: date) -> None:
        super().__init__(message, details={"from": starts_on.isoformat()})


class NodeDeregistered(LucidError):
    """The node was deregistered or revoked, which is final."""

    code = "NODE_DEREGISTERED"
    status = 410

    def __init__(self, passport_id: str) -> None:
        super().__init__(
            f"Node {passport_id} was deregistered, for good. Register it again with POST /passports: it may keep "
            "its name and gets a new id.",
            details={"passportId": passport_id},
        )


class PayloadTooLarge(LucidError):
    """The body is over the limit."""

    code = "PAYLOAD_TOO_LARGE"
    status = 413

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The body is over {limit_bytes} bytes. Send less.", details={"limitBytes": limit_bytes})


class UnsupportedMediaType(LucidError):
    """The body is in a form or an encoding that is not accepted; `details` lists those that are."""

    code = "UNSUPPORTED_MEDIA_TYPE"
    status = 415


class RateLimited(LucidError):
    """Too many requests; `Retry-After` says when to try again."""

    code = "RATE_LIMITED"
    status = 429


class BudgetExceeded(RateLimited):
    """The key's budget is spent until `details.resetsAt`."""

    code = "BUDGET_EXCEEDED"


class NodeFailed(LucidError):
    """Every attempt on a node failed; `details.attempts` says how."""

    code = "NODE_FAILED"
    status = 502

    def __init__(
        self, attempts: list[dict[str, Any]], *, why: str = "", said: str = "", is_requests_own: bool = False
    ) -> None:
        """`why` says why there was no further attempt, as a part of the message; `said` is the node's own message.

        `is_requests_own`: the request is the probable cause, so sending it again would not help.
        """
        count = f"{len(attempts)} attempts" if len(attempts) > 1 else "The only attempt"
        last = attempts[-1]["reason"] if attempts else "unknown"
        quoted = f' The node said: "{said}".' if said else ""
        advice = "Nothing was delivered as a whole; send the request again."
        if is_requests_own:
            advice = "The request is the probable cause: change it, or use a model that supports what it asks for."
        super().__init__(
            f"{count} failed ({'the last with ' if len(attempts) > 1 else ''}{last}){why}.{quoted} {advice}",
            details={"attempts": attempts, **({"nodeMessage": said} if said else {})},
        )


class Unavailable(LucidError):
    """The service can't do this right now; `Retry-After` says when to try again."""

    code = "OVERLOADED"
    status = 503


class Overloaded(Unavailable):
    """More work is waiting than can be completed in time."""


class DatabaseUnavailable(Unavailable):
    """Postgres does not respond."""

    code = "DATABASE_UNAVAILABLE"

    def __init__(self, retry_after_seconds: int = 1) -> None:
        super().__init__(
            "The database does not answer right now, so nothing was changed for certain. Send the request again "
            f"in {retry_after_seconds} s.",
            retry_after_seconds=retry_after_seconds,
        )


class NotReady(Unavailable):
    """This replica can't serve as it should; the message says why."""

    code = "DATABASE_UNAVAILABLE"

    def __init__(self, reason: str) -> None:
        super().__init__(f"This replica is not ready. {reason}", retry_after_seconds=1)


def endpoint_path(name: str) -> str:
    """Return the path of an inference endpoint: below `/v1`, unless its name begins at the top."""
    return name if name.startswith("/") else f"/v1/{name}"


class ModelUnavailable(Unavailable):
    """The model is known, but no node can get the request; `details.rejections` counts the reasons."""

    code = "MODEL_UNAVAILABLE"

    def __init__(
        self,
        model: str,
        rejections: Mapping[str, int],
        shortage: Shortage,
        *,
        lacking: int = 0,
        endpoint: str = "",
        retry_after_seconds: float | None = None,
    ) -> None:
        """`rejections` counts nodes by reason; `lacking` nodes do not offer the model at `endpoint`.

        `retry_after_seconds`: when the first busy node said that it is free; None if none said so.
        """
        self._shortage = shortage
        counted = ", ".join(f"{code} {count}" for code, count in rejections.items()) or "no node names it"
        if lacking:
            counted += f"; not offered at {endpoint_path(endpoint)} by {lacking} of them"
        seconds = 5 if retry_after_seconds is None else max(1, ceil(retry_after_seconds))
        super().__init__(
            f"No node can serve {model!r} right now ({counted}). GET /models/{quote(model, safe='')}/availability and "
            f"POST /match say more; send the request again in {seconds} s.",
            details={"model": model, "rejections": dict(rejections)},
            retry_after_seconds=seconds,
        )

    @property
    def cause(self) -> str:
        """The cause in the loss report: how far the best node came."""
        return self._shortage


class NodeTimeout(LucidError):
    """The nodes that were tried did not respond in time, or one fell silent; `details.attempts` names them."""

    code = "NODE_TIMEOUT"
    status = 504

    def __init__(self, attempts: list[dict[str, Any]], *, has_begun: bool = False) -> None:
        """`has_begun`: a part of the response was delivered."""
        sentence = "No node began to answer in time. Nothing was delivered; send the request again, or a shorter one."
        if has_begun:
            sentence = (
                "The node began its answer and then took too long. What was delivered is only a part; send the request "
                "again, or a shorter one."
            )
        super().__init__(sentence, details={"attempts": attempts})


class RoutingLoop(LucidError):
    """A node's URL leads back to this service."""

    code = "ROUTING_LOOP"
    status = 508

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        super().__init__(
            "A node's inferenceUrl leads back to this service. Its owner has to send the address of the inference "
            "server itself: PATCH /passports/{id}.",
            details={"attempts": attempts},
        )
