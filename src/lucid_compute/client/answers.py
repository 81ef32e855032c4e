"""Read a response: a success as its type, a refusal as its exception, a foreign response as what it is."""

from __future__ import annotations

import email.utils
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from types import NoneType
from typing import Any, NamedTuple, TypeVar, cast

from pydantic import BaseModel, ValidationError

from lucid_compute.client import errors
from lucid_compute.client.call import ApiCall
from lucid_compute.client.lenient import read_leniently

T = TypeVar("T")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")
_LONGEST_SENTENCE = 2000
_UNAUTHORIZED = 401
_TOO_MANY = 429
_BY_CODE: dict[str, type[errors.LucidApiError]] = {
    error.default_code: error
    for error in (
        errors.InvalidRequest,
        errors.Unauthorized,
        errors.Forbidden,
        errors.PassportNotFound,
        errors.NodeNotFound,
        errors.ModelNotFound,
        errors.KeyNotFound,
        errors.WebhookNotFound,
        errors.PassportExists,
        errors.ModelNameTaken,
        errors.IdempotencyConflict,
        errors.RequestsInFlight,
        errors.NodeDeregistered,
        errors.PayloadTooLarge,
        errors.UnsupportedMediaType,
        errors.RateLimited,
        errors.ModelNotAllowed,
        errors.BudgetExceeded,
    )
}
_BY_STATUS: dict[int, type[errors.LucidApiError]] = {
    400: errors.InvalidRequest,
    401: errors.Unauthorized,
    403: errors.Forbidden,
    404: errors.NotFound,
    409: errors.Conflict,
    410: errors.NodeDeregistered,
    413: errors.PayloadTooLarge,
    415: errors.UnsupportedMediaType,
    422: errors.InvalidRequest,
    429: errors.RateLimited,
    502: errors.Unavailable,
    503: errors.Unavailable,
    504: errors.Unavailable,
}
_UNDONE_CODES = frozenset({"RATE_LIMITED", "OVERLOADED"})


class Received(NamedTuple):
    """A complete response. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    content: bytes


def read_answer(call: ApiCall[T], received: Received, *, base_url: str, has_key: bool) -> T:
    """Return the content of a successful response, as the type that the call expects.

    Raises:
        LucidClientError: the service refused, or the response is not the service's.
    """
    if 200 <= received.status < 300:  # noqa: PLR2004 - the range of successes
        return _read_success(call, received, base_url)
    raise _refusal(received, base_url=base_url, has_key=has_key)


def _read_success(call: ApiCall[T], received: Received, base_url: str) -> T:
    if call.answer is NoneType:
        return cast("T", None)
    if call.answer is str:
        return cast("T", received.content.decode(errors="replace"))
    if not issubclass(call.answer, BaseModel):
        raise TypeError(call.answer)
    try:
        return cast("T", call.answer.model_validate_json(received.content, extra="ignore"))
    except ValidationError as error:
        found = _find_json(received)
        lenient = read_leniently(call.answer, found, error)
        if lenient is not None:
            return cast("T", lenient)
        raise _not_ours(received, base_url, _shape_sentence(call, error, found)) from None


def _shape_sentence(call: ApiCall[Any], error: ValidationError, found: Any) -> str:
    if found is None:
        return ""
    first = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(map(str, first["loc"])) or "the top level"
    return (
        f"The answer to {call.method} {call.path} does not fit this client at {where}: {first['msg']}. "
        "Is this the address of lucid serve, and do client and service have similar versions?"
    )


def _refusal(received: Received, *, base_url: str, has_key: bool) -> errors.LucidClientError:
    found = _find_json(received)
    described = found.get("error") if isinstance(found, dict) else None
    if not isinstance(described, dict) or not isinstance(described.get("code"), str):
        return _foreign_refusal(received, base_url)
    code = _CONTROL.sub(" ", described["code"])[:100]
    message = _CONTROL.sub(" ", str(described.get("message") or "The service refused."))[:_LONGEST_SENTENCE]
    if received.status == _UNAUTHORIZED and not has_key:
        message += " No key was sent: set LUCID_API_KEY, or pass one (api_key in Python, --key on the command line)."
    kind = _BY_CODE.get(code) or _kind_of(received.status)
    details = described.get("details")
    return kind(
        message,
        code=code,
        status=received.status,
        details=details if isinstance(details, dict) else {},
        request_id=_request_id(received),
        retry_after_seconds=read_retry_after(received.headers.get("retry-after"), datetime.now(UTC)),
        is_certainly_undone=code in _UNDONE_CODES,
    )


def _kind_of(status: int) -> type[errors.LucidApiError]:
    return _BY_STATUS.get(status) or (errors.ServiceFailed if status >= 500 else errors.LucidApiError)  # noqa: PLR2004 - faults of servers


def _foreign_refusal(received: Received, base_url: str) -> errors.LucidClientError:
    """Return the error for a refusal in the words of a proxy, or of another service."""
    status = received.status
    if 300 <= status < 400:  # noqa: PLR2004 - redirects
        location = _CONTROL.sub(" ", received.headers.get("location", "elsewhere"))[:200]
        message = (
            f"{base_url} redirects to {location}. If that is the service, use its address: the key is not sent on."
        )
        return errors.Redirected(message, status=status, request_id=_request_id(received))
    if status in {_TOO_MANY, 502, 503, 504}:
        kind = errors.RateLimited if status == _TOO_MANY else errors.Unavailable
        message = (
            f"A proxy before {base_url} answers {status} with its own message ({_kind_of_content(received)}). Does it "
            "reach the service, and does lucid serve run there?"
        )
        return kind(
            message,
            status=status,
            request_id=_request_id(received),
            retry_after_seconds=read_retry_after(received.headers.get("retry-after"), datetime.now(UTC)),
            is_certainly_undone=status == _TOO_MANY,
        )
    return _not_ours(received, base_url, "")


def _not_ours(received: Received, base_url: str, sentence: str) -> errors.UnexpectedAnswer:
    usual = (
        f"{base_url} answers {received.status} with {_kind_of_content(received)}, which is not this service's. Is it "
        "the address of lucid serve, without a path of a dashboard or a login page before it?"
    )
    if b"HTTPS port" in received.content[:4096] and base_url.startswith("http://"):
        usual = f"{base_url} takes HTTPS alone. Write the address with https://."
    return errors.UnexpectedAnswer(sentence or usual, status=received.status, request_id=_request_id(received))


def _kind_of_content(received: Received) -> str:
    if not received.content:
        return "nothing"
    kind = received.headers.get("content-type", "").split(";")[0].strip()
    return {"text/html": "an HTML page", "application/json": "JSON of another kind"}.get(
        kind, _CONTROL.sub(" ", kind)[:80] or "no content type"
    )


def _find_json(received: Received) -> Any:
    try:
        return json.loads(received.content)
    except (ValueError, RecursionError):
        return None


def _request_id(received: Received) -> str | None:
    found = received.headers.get("x-request-id")
    return _CONTROL.sub(" ", found)[:128] if found else None


def read_retry_after(text: str | None, now: datetime) -> float | None:
    """Return the seconds of a `Retry-After`, a number or a date, at least 0; None when it is neither."""
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        try:
            at = email.utils.parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - now).total_seconds()
    return max(seconds, 0.0) if seconds < float("inf") else None
