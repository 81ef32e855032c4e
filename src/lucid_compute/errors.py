"""The error tree: every refusal a client can meet, with its code, its status and a sentence that says what to do.

LucidError
├── InvalidRequest            422, 400 (not JSON)
├── Unauthorized              401
├── Forbidden                 403
├── NotFound                  404 PassportNotFound, NodeNotFound, ModelNotFound, KeyNotFound,
│                                 WebhookNotFound, RouteNotFound
├── MethodNotAllowed          405
├── Conflict                  409 PassportExists, ModelNameTaken, IdempotencyConflict, RequestsInFlight
├── NodeDeregistered          410
├── PayloadTooLarge           413
├── RateLimited               429
└── Unavailable               503 Overloaded, DatabaseUnavailable
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from enum import StrEnum
from typing import Any, ClassVar

from lucid_compute.wire import FieldFault


class Shortage(StrEnum):
    """Why a model could not be had, in one word: how near the nearest node came, the nearest first."""

    NODES_BUSY = "nodes_busy"
    NODES_FAILING = "nodes_failing"  # their breakers are open
    NO_HEALTHY_NODE = "no_healthy_node"
    NO_NODE_SUITS = "no_node_suits"  # the request's own policy
    NO_NODE = "no_node"  # names the model, and fits it
    NO_UPSTREAM = "no_upstream"


class LucidError(Exception):
    """A refusal in the contract's shape; subclasses fix its code and status."""

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
        """The status to answer with."""
        return self.status

    @property
    def cause(self) -> str:
        """What the loss ledger calls it, when a request is refused by it."""
        return self.code.lower()

    def body(self) -> dict[str, Any]:
        """The JSON body of the contract."""
        return {
            "error": {"code": self.code, "message": self.message, "status": self.http_status, "details": self.details}
        }


class InvalidRequest(LucidError):
    """The request can't be understood; `details.fields` names each fault."""

    code = "INVALID_REQUEST"
    status = 422

    def __init__(self, faults: Sequence[FieldFault], *, status: int = 422) -> None:
        """Name every fault, the first one in the message too."""
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
        """One fault at one place."""
        return cls([FieldFault(path, message)])


class Unauthorized(LucidError):
    """No valid key came with the request."""

    code = "UNAUTHORIZED"
    status = 401


class Forbidden(LucidError):
    """The key is valid and may not do this."""

    code = "FORBIDDEN"
    status = 403


class NotFound(LucidError):
    """Nothing the caller may see is there."""

    code = "ROUTE_NOT_FOUND"
    status = 404


class PassportNotFound(NotFound):
    """No passport of that id is the caller's."""

    code = "PASSPORT_NOT_FOUND"

    def __init__(self, passport_id: str) -> None:
        super().__init__(
            f"No passport {passport_id!r} is yours. GET /passports lists the ones this key can see.",
            details={"passportId": passport_id},
        )


class NodeNotFound(NotFound):
    """No compute passport of that id is the caller's."""

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
    """No webhook of that id is the caller's."""

    code = "WEBHOOK_NOT_FOUND"

    def __init__(self, webhook_id: str) -> None:
        super().__init__(
            f"No webhook {webhook_id!r} is yours. GET /webhooks lists them.", details={"webhookId": webhook_id}
        )


class RouteNotFound(NotFound):
    """No route has that path."""


class MethodNotAllowed(LucidError):
    """The path exists, the method does not."""

    code = "METHOD_NOT_ALLOWED"
    status = 405

    def __init__(self, method: str, allowed: Iterable[str]) -> None:
        """Name the method, and those that the path takes."""
        self.allowed = ", ".join(sorted(allowed))
        super().__init__(f"{method} is not a method of this path; it takes {self.allowed}.")


class Conflict(LucidError):
    """The request is well formed and does not fit what is there."""

    status = 409


class PassportExists(Conflict):
    """The owner has a passport of that type and name already."""

    code = "PASSPORT_EXISTS"

    def __init__(self, passport_id: str, type_: str, name: str) -> None:
        super().__init__(
            f"You have a {type_} passport named {name!r} already ({passport_id}). Change it with PATCH "
            f"/passports/{passport_id}, or choose another name.",
            details={"passportId": passport_id},
        )


class ModelNameTaken(Conflict):
    """An active model has that name or alias already."""

    code = "MODEL_NAME_TAKEN"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"An active model is called {name!r} already, by name or alias; names are shared by all owners. "
            "Choose another one, for example with your organisation before a slash.",
            details={"name": name},
        )


class IdempotencyConflict(Conflict):
    """An `Idempotency-Key` came again with another body."""

    code = "IDEMPOTENCY_CONFLICT"

    def __init__(self, key: str) -> None:
        super().__init__(
            f"The Idempotency-Key {key!r} was used with another body. Send the same body again, or a new key.",
            details={"idempotencyKey": key},
        )


class RequestsInFlight(Conflict):
    """The node still serves requests."""

    code = "REQUESTS_IN_FLIGHT"

    def __init__(self, in_flight: int) -> None:
        fact = f"{in_flight} requests still run on this node."
        if not in_flight:
            fact = "The node's drain was ended meanwhile, or not every replica has applied it yet."
        super().__init__(
            f"{fact} Drain it and wait for drained, pass waitSeconds, or pass force=true to cut requests off.",
            details={"inFlight": in_flight},
        )


class NodeDeregistered(LucidError):
    """The node was deregistered or revoked, for good."""

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


class RateLimited(LucidError):
    """Too many requests; `Retry-After` says when to come again."""

    code = "RATE_LIMITED"
    status = 429


class Unavailable(LucidError):
    """The service can't do this right now; `Retry-After` says when to try again."""

    code = "OVERLOADED"
    status = 503


class Overloaded(Unavailable):
    """More work is waiting than can be done in time."""


class DatabaseUnavailable(Unavailable):
    """Postgres does not answer."""

    code = "DATABASE_UNAVAILABLE"

    def __init__(self, retry_after_seconds: int = 1) -> None:
        super().__init__(
            "The database does not answer right now, so nothing was changed for certain. Send the request again "
            "after Retry-After seconds.",
            retry_after_seconds=retry_after_seconds,
        )


class PeriodNotFound(NotFound):
    """No closed period has that id."""

    code = "PERIOD_NOT_FOUND"

    def __init__(self, period_id: str) -> None:
        super().__init__(
            f"No closed period has the id {period_id!r}. GET /payouts/periods lists them.",
            details={"periodId": period_id},
        )


class PeriodConflict(Conflict):
    """The period to be closed leaves days out, or holds some that are closed already."""

    code = "PERIOD_CONFLICT"

    def __init__(self, message: str, starts_on: date) -> None:
        super().__init__(message, details={"from": starts_on.isoformat()})


class NodeFailed(LucidError):
    """Every attempt failed; `details.attempts` says how."""

    code = "NODE_FAILED"
    status = 502

    def __init__(self, attempts: list[dict[str, Any]], *, why: str = "") -> None:
        """Tell of the attempts; `why` there was none more."""
        count = f"{len(attempts)} attempts" if len(attempts) > 1 else "The only attempt"
        last = attempts[-1]["reason"] if attempts else "unknown"
        super().__init__(
            f"{count} failed ({'the last with ' if len(attempts) > 1 else ''}{last}){why}. Nothing was delivered as a "
            "whole; send the request again.",
            details={"attempts": attempts},
        )


class NodeTimeout(LucidError):
    """The nodes that were tried did not answer in time; `details.attempts` says which."""

    code = "NODE_TIMEOUT"
    status = 504

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        super().__init__(
            "No node began to answer in time. Nothing was delivered; send the request again, or a shorter one.",
            details={"attempts": attempts},
        )


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


class ModelUnavailable(Unavailable):
    """The model is known, and no node may be sent the request; `details.rejections` counts the reasons."""

    code = "MODEL_UNAVAILABLE"

    def __init__(
        self,
        model: str,
        rejections: Mapping[str, int],
        shortage: Shortage,
        *,
        lacking: int = 0,
        endpoint: str = "",
    ) -> None:
        """Count why not, a node once for each reason; `lacking` of them said not to offer the model at `endpoint`."""
        self._shortage = shortage
        counted = ", ".join(f"{code} {count}" for code, count in rejections.items()) or "no node names it"
        if lacking:
            counted += f"; not offered at /v1/{endpoint} by {lacking} of them"
        super().__init__(
            f"No node can serve {model!r} right now ({counted}). GET /models/{{idOrName}}/availability and POST "
            "/match say more; send the request again after Retry-After seconds.",
            details={"model": model, "rejections": dict(rejections)},
            retry_after_seconds=5,
        )

    @property
    def cause(self) -> str:
        """What the loss ledger calls it: how near the nearest node came."""
        return self._shortage
