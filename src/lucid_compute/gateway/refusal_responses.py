"""How a request below /v1 is refused: the complete response."""

from __future__ import annotations

from lucid_compute.errors import LucidError, Overloaded, Unauthorized
from lucid_compute.gateway.request import GatewayRequest
from lucid_compute.web.errors import headers_of, openai_bytes
from lucid_compute.web.lanes import Headers, Response


def refusal(error: LucidError, headers: Headers) -> Response:
    """Return the response that refuses a request; `headers` are added to the error's own."""
    body = openai_bytes(error)
    ours = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
    basic = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return error.http_status, [*basic, *ours, *headers], body


def refusal_of(request: GatewayRequest, error: LucidError) -> Response:
    """Return the response to a request that no node served."""
    job = request.running.job  # of the last attempt
    attempts = (b"x-lucid-attempts", b"%d" % (job.attempt if job else 0))
    return refusal(error, [*request.headers, (b"x-lucid-job", request.job_id.encode()), attempts])


def overloaded() -> Overloaded:
    """Return the error of a request that is one too many."""
    message = "As many requests as this service takes are running. Send it again after Retry-After seconds."
    return Overloaded(message, retry_after_seconds=1)


def key_revoked() -> Unauthorized:
    """Return the error of a request whose key ended while it ran."""
    return Unauthorized("The key was revoked while the request ran.")
