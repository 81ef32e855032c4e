"""Error responses: one shape for all, declared in the OpenAPI document, without internal texts."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Scope

from lucid_compute.errors import (
    DatabaseUnavailable,
    Forbidden,
    InvalidRequest,
    LucidError,
    MethodNotAllowed,
    Overloaded,
    PayloadTooLarge,
    RateLimited,
    RouteNotFound,
    Unauthorized,
    UnsupportedMediaType,
)
from lucid_compute.wire import ResponseShape, faults_from

PREFIX = "/v1/"
ANTHROPIC_PREFIX = "/v1/messages"
REFERENCE = "#/components/schemas/{model}"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


_ANTHROPIC_TYPES = _TYPES | {413: "request_too_large", 503: "overloaded_error", 504: "timeout_error"}


def openai_body(error: LucidError) -> dict[str, Any]:
    """Return the body of an error in OpenAI's shape, with our `details` added."""
    status = error.http_status
    fallback = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - from here on it is the server's fault
    fields = error.details.get("fields") or [{}]
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status, fallback),
            "param": fields[0].get("path") or None,
            "code": error.code,
            "status": status,
            "details": error.details,
        }
    }


def anthropic_body(error: LucidError) -> dict[str, Any]:
    """Return the body of an error in Anthropic's shape, with our code, status and `details` added."""
    status = error.http_status
    fallback = "invalid_request_error" if status < 500 else "api_error"  # noqa: PLR2004 - as in `openai_body`
    return {
        "type": "error",
        "error": {
            "type": _ANTHROPIC_TYPES.get(status, fallback),
            "message": error.message,
            "code": error.code,
            "status": status,
            "details": error.details,
        },
    }


def inference_body(error: LucidError, path: str) -> dict[str, Any]:
    """Return the body of an error in the shape that the clients of an inference endpoint read."""
    return anthropic_body(error) if path.startswith(ANTHROPIC_PREFIX) else openai_body(error)


def inference_bytes(error: LucidError, path: str) -> bytes:
    """Return `inference_body` as JSON."""
    return json.dumps(inference_body(error, path)).encode()


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_log = logging.getLogger(__name__)


class ErrorDescription(ResponseShape):
    """What went wrong and what to do about it."""

    code: str
    message: str
    status: int
    details: dict[str, Any]


class ErrorAnswer(ResponseShape):
    """The body of every error response."""

    error: ErrorDescription


def declare(*errors: type[LucidError], body: bool = False, key: bool = True) -> dict[int | str, dict[str, Any]]:
    """Return `responses=` for a route: the given errors, and those that every route of its kind can raise."""
    every: list[type[LucidError]] = [*errors, InvalidRequest, RateLimited, DatabaseUnavailable]
    if key:
        every += [Unauthorized, Forbidden]
    if body:
        every += [PayloadTooLarge, UnsupportedMediaType]
    declared: dict[int | str, dict[str, Any]] = {}
    for error in every:
        codes = declared.setdefault(error.status, respond("", ErrorAnswer.__name__))
        if error.code not in codes["description"]:
            codes["description"] = " · ".join(filter(None, [codes["description"], f"`{error.code}`"]))
    if body:
        declared[400] = respond(f"`{InvalidRequest.code}`: the body is not JSON", ErrorAnswer.__name__)
    return declared


def respond(description: str, model: str) -> dict[str, Any]:
    """Return the description of a response whose body is the schema `model`.

    FastAPI would build a validator of its own for each response that names a class: 300 of them at each start.
    """
    return {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": REFERENCE.format(model=model)}}},
    }


def headers_of(error: LucidError) -> dict[str, str]:
    """Return the headers of an error response."""
    headers = {}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = 'Bearer realm="lucid"'
    if isinstance(error, MethodNotAllowed):
        headers["Allow"] = error.allowed
    if isinstance(error, UnsupportedMediaType) and (encodings := error.details.get("encodings")):
        headers["Accept-Encoding"] = ", ".join(encodings)  # RFC 9110, 12.5.3
    return headers


def install(app: FastAPI) -> None:
    """Make `app` respond to every exception in the contract's shape."""
    app.add_exception_handler(LucidError, _answer_lucid_error)
    app.add_exception_handler(RequestValidationError, _answer_validation_error)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    app.add_exception_handler(Exception, _answer_unexpected)


def answer(error: LucidError, *, path: str = "") -> JSONResponse:
    """Return the response to an error; for a `path` below `/v1` in OpenAI's or Anthropic's shape."""
    body = inference_body(error, path) if path.startswith(PREFIX) else error.body()
    return JSONResponse(body, status_code=error.http_status, headers=headers_of(error))


def stopping() -> Overloaded:
    """Return the error of a request that still runs when the service stops."""
    message = "The service stops, and the request was not complete in time. Send it again in 1 s."
    return Overloaded(message, retry_after_seconds=1)


def log_unexpected(method: str, path: str, error: Exception, request_id: str | None) -> LucidError:
    """Log an unexpected error; return one without its text for the client."""
    _log.error("%s %s failed", method, path, exc_info=error, extra={"request_id": request_id})
    return LucidError("Something went wrong here, not in your request. It is logged under the request id.")


async def _answer_lucid_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, LucidError):
        return answer(error, path=request.url.path)
    return await _answer_unexpected(request, error)


async def _answer_validation_error(request: Request, error: Exception) -> JSONResponse:
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    faults = faults_from([{**fault, "loc": _strip_body(fault["loc"])} for fault in errors])
    return answer(InvalidRequest(faults), path=request.url.path)


async def _answer_http_exception(request: Request, error: Exception) -> JSONResponse:
    status = error.status_code if isinstance(error, HTTPException) else 500
    if status == MethodNotAllowed.status:
        refusal = MethodNotAllowed(request.method, _methods_of(request))
        return answer(refusal, path=request.url.path)
    error = RouteNotFound(f"There is no {request.method} {request.url.path}. GET /docs lists every path.")
    return answer(error, path=request.url.path)


async def _answer_unexpected(request: Request, error: Exception) -> JSONResponse:
    request_id = getattr(request.state, "request_id", None)
    refusal = log_unexpected(request.method, request.url.path, error, request_id)
    return answer(refusal, path=request.url.path)


def _methods_of(request: Request) -> set[str]:
    """Return every method of the path; Starlette names only those of the first route. HEAD is served as GET."""
    scopes = [{**request.scope, "method": method} for method in METHODS]
    methods = {scope["method"] for scope in scopes if has_route(scope)}
    return methods | {"HEAD"} if "GET" in methods else methods


def has_route(scope: Scope) -> bool:
    """Return whether a route of the application takes the request's path and method."""
    return any(route.matches(scope)[0] is Match.FULL for route in scope["app"].routes)


def _strip_body(loc: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the location of a fault without the word `body`; those of queries and headers keep theirs."""
    return loc[1:] if loc and loc[0] == "body" else loc
