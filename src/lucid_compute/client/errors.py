"""What a call can end in but its answer: each says in a sentence what to do.

LucidClientError
├── ConfigurationFault          the address or the key can't be used as they are written; nothing was sent
├── ConnectionFailed            nobody listens, the name is unknown, the connection broke
│   └── TlsFailed               a certificate that is not trusted, TLS where there is none
├── TimedOut                    no whole answer in time
├── UnexpectedAnswer            not of this service: no JSON, a proxy's page, another service
│   └── Redirected              3xx: the key is not sent on
└── LucidApiError               the service refused, with its own code and sentence
    ├── InvalidRequest          422, 400; also refused here, before it was sent, with `status` None
    ├── Unauthorized            401
    ├── Forbidden               403
    ├── NotFound                404 PassportNotFound, NodeNotFound, ModelNotFound, KeyNotFound,
│   │                               WebhookNotFound
    ├── Conflict                409 PassportExists, ModelNameTaken, IdempotencyConflict, RequestsInFlight
    ├── NodeDeregistered        410
    ├── PayloadTooLarge         413
    ├── RateLimited             429
    └── ServiceFailed           5xx
        └── Unavailable         502, 503, 504, also a proxy's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class LucidClientError(Exception):
    """A call that did not succeed.

    `code` is the contract's, or one of ours where the service did not answer. `status` is the HTTP status, None when
    there was no answer. `request_id` finds the call in the service's log. `retry_after_seconds` is what the service
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
        """Say `message`; `is_certainly_undone`: the service did nothing of what was asked."""
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.status = status
        self.details = dict(details or {})
        self.request_id = request_id
        self.retry_after_seconds = retry_after_seconds
        self.is_certainly_undone = is_certainly_undone

    def __str__(self) -> str:
        """Answer the sentence, and in brackets what to look for."""
        named = [self.code, str(self.status) if self.status else "", f"request {self.request_id}"]
        return f"{self.message} ({', '.join(filter(None, named if self.request_id else named[:2]))})"


class ConfigurationFault(LucidClientError):
    """The address, the key or a bound of the client can't be used."""

    default_code = "CONFIGURATION"


class ConnectionFailed(LucidClientError):
    """The service can't be reached, or the connection broke before the whole answer was there."""

    default_code = "CONNECTION_FAILED"
    is_transient = True


class TlsFailed(ConnectionFailed):
    """No trusted TLS connection comes about; trying again does not mend it."""

    default_code = "TLS_FAILED"
    is_transient = False


class TimedOut(LucidClientError):
    """The whole answer did not come in time."""

    default_code = "TIMED_OUT"
    is_transient = True


class UnexpectedAnswer(LucidClientError):
    """An answer that is not of this service, or not of a version that this client understands."""

    default_code = "UNEXPECTED_ANSWER"


class Redirected(UnexpectedAnswer):
    """The address leads elsewhere; redirects are not followed, so that the key goes nowhere else."""

    default_code = "REDIRECTED"


class LucidApiError(LucidClientError):
    """The service refused, in the contract's words."""

    default_code = "REFUSED"


class InvalidRequest(LucidApiError):
    """The request can't be understood; `details["fields"]` lists each fault as `{"path", "message"}`."""

    default_code = "INVALID_REQUEST"


class Unauthorized(LucidApiError):
    """No key came along, or one that is mistyped, expired or revoked."""

    default_code = "UNAUTHORIZED"


class Forbidden(LucidApiError):
    """The key is valid and may not do this."""

    default_code = "FORBIDDEN"


class NotFound(LucidApiError):
    """Nothing that this key may see is there."""

    default_code = "ROUTE_NOT_FOUND"


class PassportNotFound(NotFound):
    """No passport of that id is the caller's."""

    default_code = "PASSPORT_NOT_FOUND"


class NodeNotFound(NotFound):
    """No node of that id is the caller's."""

    default_code = "NODE_NOT_FOUND"


class ModelNotFound(NotFound):
    """No model has that id, name or alias."""

    default_code = "MODEL_NOT_FOUND"


class KeyNotFound(NotFound):
    """No key has that id, or it is revoked."""

    default_code = "KEY_NOT_FOUND"


class WebhookNotFound(NotFound):
    """No webhook of that id is the caller's."""

    default_code = "WEBHOOK_NOT_FOUND"


class Conflict(LucidApiError):
    """It contradicts what is there."""

    default_code = "CONFLICT"


class PassportExists(Conflict):
    """The owner has an active passport of that type and name."""

    default_code = "PASSPORT_EXISTS"

    @property
    def passport_id(self) -> str | None:
        """The id of the passport that is there."""
        found = self.details.get("passportId")
        return found if isinstance(found, str) else None


class ModelNameTaken(Conflict):
    """An active model has that name or alias."""

    default_code = "MODEL_NAME_TAKEN"


class IdempotencyConflict(Conflict):
    """The idempotency key was used with another request."""

    default_code = "IDEMPOTENCY_CONFLICT"


class RequestsInFlight(Conflict):
    """The node still serves requests."""

    default_code = "REQUESTS_IN_FLIGHT"

    @property
    def in_flight(self) -> int | None:
        """How many."""
        found = self.details.get("inFlight")
        return found if isinstance(found, int) else None


class NodeDeregistered(LucidApiError):
    """The node was deregistered or revoked, for good: register it again."""

    default_code = "NODE_DEREGISTERED"


class PayloadTooLarge(LucidApiError):
    """The request is over the service's limit."""

    default_code = "PAYLOAD_TOO_LARGE"


class RateLimited(LucidApiError):
    """Too many requests; nothing was done."""

    default_code = "RATE_LIMITED"
    is_transient = True


class ServiceFailed(LucidApiError):
    """A fault of the service's; `request_id` finds it in its log."""

    default_code = "INTERNAL"


class Unavailable(ServiceFailed):
    """The service, or a proxy before it, can't do this right now."""

    default_code = "UNAVAILABLE"
    is_transient = True
