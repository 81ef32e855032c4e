"""The exceptions of the client. Each message says what happened and what to do.

LucidClientError
├── ConfigurationFault          the address or the key can't be used as written; nothing was sent
├── ConnectionFailed            nothing listens, the name is unknown, or the connection broke
│   └── TlsFailed               the certificate is not trusted, or the peer speaks no TLS
├── TimedOut                    no complete response in time
├── UnexpectedAnswer            not the service's response: no JSON, a proxy's page, another service
│   └── Redirected              3xx: the key is not sent on
└── LucidApiError               the service refused, with its own code and message
    ├── InvalidRequest          422, 400; also raised before sending, with `status` None
    ├── Unauthorized            401
    ├── Forbidden               403 ModelNotAllowed
    ├── NotFound                404 PassportNotFound, NodeNotFound, ModelNotFound, KeyNotFound,
    │   │                           WebhookNotFound
    ├── Conflict                409 PassportExists, ModelNameTaken, IdempotencyConflict, RequestsInFlight
    ├── NodeDeregistered        410
    ├── PayloadTooLarge         413
    ├── UnsupportedMediaType    415
    ├── RateLimited             429 BudgetExceeded
    └── ServiceFailed           5xx
        └── Unavailable         502, 503, 504, also a proxy's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class LucidClientError(Exception):
    """A call that did not succeed.

    `code` is the contract's, or the client's own when the service did not respond. `status` is the HTTP status, None
    without a response. `request_id` finds the call in the service's log. `retry_after_seconds` is how long the service
    asks to wait, None when it does not say.
    """

    default_code: ClassVar[str] = "CLIENT_ERROR"
    is_transient: ClassVar[bool] = False  # the same call may succeed later

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        retry_after_seconds: float | None = None,
        is_certainly_undone: bool = False,
    ) -> None:
        """Keep the details. `is_certainly_undone`: the service did nothing of what was asked."""
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.status = status
        self.details = dict(details or {})
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        self.is_certainly_undone = is_certainly_undone

    def __str__(self) -> str:
        """Return the message, followed by code, status and request id in brackets."""
        named = [self.code, str(self.status) if self.status else "", f"request {self.request_id}"]
        return f"{self.message} ({', '.join(filter(None, named if self.request_id else named[:2]))})"


class ConfigurationFault(LucidClientError):
    """The address, the key or a limit of the client can't be used."""

    default_code = "CONFIGURATION"


class ConnectionFailed(LucidClientError):
    """The service can't be reached, or the connection broke before the response was complete."""

    default_code = "CONNECTION_FAILED"
    is_transient = True


class TlsFailed(ConnectionFailed):
    """No trusted TLS connection is possible. Trying again does not help."""

    default_code = "TLS_FAILED"
    is_transient = False


class TimedOut(LucidClientError):
    """The response was not complete in time."""

    default_code = "TIMED_OUT"
    is_transient = True


class UnexpectedAnswer(LucidClientError):
    """The response is not the service's, or is of a version that this client can't read."""

    default_code = "UNEXPECTED_ANSWER"


class Redirected(UnexpectedAnswer):
    """The address redirects. Redirects are not followed, so that the key is sent to no other host."""

    default_code = "REDIRECTED"


class LucidApiError(LucidClientError):
    """The service refused, with a code of the contract."""

    default_code = "REFUSED"


class InvalidRequest(LucidApiError):
    """The request is invalid. `details["fields"]` lists each fault as `{"path", "message"}`."""

    default_code = "INVALID_REQUEST"


class Unauthorized(LucidApiError):
    """There was no key, or the key is unknown, expired or revoked."""

    default_code = "UNAUTHORIZED"


class Forbidden(LucidApiError):
    """The key is valid but may not do this."""

    default_code = "FORBIDDEN"


class ModelNotAllowed(Forbidden):
    """The key may use other models only; `details["allowed"]` lists them."""

    default_code = "MODEL_NOT_ALLOWED"


class NotFound(LucidApiError):
    """Nothing is there that this key may see."""

    default_code = "ROUTE_NOT_FOUND"


class PassportNotFound(NotFound):
    """The caller has no passport with that id."""

    default_code = "PASSPORT_NOT_FOUND"


class NodeNotFound(NotFound):
    """The caller has no node with that id."""

    default_code = "NODE_NOT_FOUND"


class ModelNotFound(NotFound):
    """No model has that id, name or alias."""

    default_code = "MODEL_NOT_FOUND"


class KeyNotFound(NotFound):
    """No key has that id, or the key is revoked."""

    default_code = "KEY_NOT_FOUND"


class WebhookNotFound(NotFound):
    """The caller has no webhook with that id."""

    default_code = "WEBHOOK_NOT_FOUND"


class Conflict(LucidApiError):
    """The request contradicts the current state."""

    default_code = "CONFLICT"


class PassportExists(Conflict):
    """The owner already has an active passport with that type and name."""

    default_code = "PASSPORT_EXISTS"

    @property
    def passport_id(self) -> str | None:
        """The id of the existing passport."""
        found = self.details.get("passportId")
        return found if isinstance(found, str) else None


class ModelNameTaken(Conflict):
    """An active model already has that name or alias."""

    default_code = "MODEL_NAME_TAKEN"


class IdempotencyConflict(Conflict):
    """The idempotency key was used for another request."""

    default_code = "IDEMPOTENCY_CONFLICT"


class RequestsInFlight(Conflict):
    """The node still runs requests."""

    default_code = "REQUESTS_IN_FLIGHT"

    @property
    def in_flight(self) -> int | None:
        """The number of requests."""
        found = self.details.get("inFlight")
        return found if isinstance(found, int) else None


class NodeDeregistered(LucidApiError):
    """The node was deregistered or revoked, which is final. Register it again."""

    default_code = "NODE_DEREGISTERED"


class PayloadTooLarge(LucidApiError):
    """The request is larger than the service's limit."""

    default_code = "PAYLOAD_TOO_LARGE"


class UnsupportedMediaType(LucidApiError):
    """The body is in a form or an encoding that the service does not accept. A proxy may have changed it."""

    default_code = "UNSUPPORTED_MEDIA_TYPE"


class RateLimited(LucidApiError):
    """Too many requests; nothing was done."""

    default_code = "RATE_LIMITED"
    is_transient = True


class BudgetExceeded(RateLimited):
    """The key's budget is spent until `details["resetsAt"]`."""

    default_code = "BUDGET_EXCEEDED"
    is_transient = False


class ServiceFailed(LucidApiError):
    """The service failed; `request_id` finds the failure in its log."""

    default_code = "INTERNAL"


class Unavailable(ServiceFailed):
    """The service, or a proxy in front of it, can't do this now."""

    default_code = "UNAVAILABLE"
    is_transient = True
