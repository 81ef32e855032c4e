"""Errors below `/v1` wear OpenAI's shape, so that its clients raise the exceptions that their users expect."""

from __future__ import annotations

import json
import math
from typing import Any

from lucid_compute.api.rate_limits import Allowance
from lucid_compute.errors import LucidError

PREFIX = "/v1/"
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


def openai_body(error: LucidError) -> dict[str, Any]:
    """Answer the body of an error in OpenAI's shape; `details` is ours beside it."""
    status = error.http_status
    fallback = "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004 - where servers' faults begin
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


def openai_bytes(error: LucidError) -> bytes:
    """Answer `openai_body` as JSON."""
    return json.dumps(openai_body(error)).encode()


def rate_limit_headers(allowances: list[Allowance]) -> list[tuple[bytes, bytes]]:
    """Answer what a key has left, as OpenAI's clients and as the IETF's draft read it.

    `remaining` is what may be used at once: a twentieth of a minute's share at most, and more comes all the time.
    """
    headers = []
    for unit, limit, remaining, reset_seconds in allowances:
        values = (("limit", str(limit)), ("remaining", str(remaining)), ("reset", f"{reset_seconds:.3f}s"))
        headers += [(f"x-ratelimit-{name}-{unit}", value) for name, value in values]
        headers.append(("ratelimit-policy", f'"{unit}";q={limit};w=60'))
        headers.append(("ratelimit", f'"{unit}";r={remaining};t={math.ceil(reset_seconds)}'))
    return [(name.encode(), value.encode()) for name, value in headers]
