"""The head of a request: what is refused in it, and the bytes of such a refusal."""

from __future__ import annotations

import json
from http import HTTPStatus
from typing import NamedTuple

from lucid_compute.errors import InvalidRequest, MethodNotAllowed
from lucid_compute.web.errors import METHODS

MAX_HEAD_BYTES = 64 * 1024
MAX_URL_BYTES = 16 * 1024  # the router looks at it for each route
MAX_HEADERS = 200  # a look for one header visits all of them

Headers = list[tuple[bytes, bytes]]


class HeadFault(NamedTuple):
    """Why a request is refused before it is a request; `headers` belong to the response."""

    status: HTTPStatus
    message: str
    code: str = InvalidRequest.code
    headers: tuple[tuple[bytes, bytes], ...] = ()


NOT_HTTP = HeadFault(
    HTTPStatus.BAD_REQUEST, "This is not HTTP/1.1: correct the first line, the headers or the framing of the body."
)
NOT_ONE_HOST = HeadFault(HTTPStatus.BAD_REQUEST, "A request has one Host header: send exactly one.")
TUNNEL = HeadFault(
    HTTPStatus.METHOD_NOT_ALLOWED,
    "This service is not a proxy: send the request without CONNECT.",
    MethodNotAllowed.code,
    ((b"allow", ", ".join(METHODS).encode()),),
)
LONG_URL = HeadFault(
    HTTPStatus.REQUEST_URI_TOO_LONG, f"The path and the query are over {MAX_URL_BYTES} bytes: send shorter ones."
)
LONG_HEAD = HeadFault(
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
    f"The headers are over {MAX_HEAD_BYTES} bytes, or more than {MAX_HEADERS}: send fewer or shorter.",
)
OTHER_CODING = HeadFault(
    HTTPStatus.NOT_IMPLEMENTED, "The only transfer coding taken is chunked: send the body in chunks or with its length."
)
OTHER_VERSION = HeadFault(
    HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "The versions taken are HTTP/1.1 and HTTP/1.0: send one of them."
)


def too_slow(seconds: float) -> HeadFault:
    """Return the fault of headers that were not complete within `seconds`."""
    return HeadFault(HTTPStatus.REQUEST_TIMEOUT, f"The headers did not come within {seconds:.0f} s: send them at once.")


class Refused(Exception):
    """The parser has to stop: the head it has read is refused."""


def fault_of(method: bytes, version: str, url: bytes, headers: Headers) -> HeadFault | None:
    """Return why a request's head is refused; None if it is not. Names of headers are in lower case."""
    if method == b"CONNECT":
        return TUNNEL
    if version not in {"1.1", "1.0"}:
        return OTHER_VERSION
    if len(url) > MAX_URL_BYTES:
        return LONG_URL
    if len(headers) > MAX_HEADERS:
        return LONG_HEAD
    names = [name for name, _ in headers]
    hosts = names.count(b"host")
    if hosts > 1 or (not hosts and version == "1.1"):
        return NOT_ONE_HOST
    return _fault_of_coding(version, headers) if b"transfer-encoding" in names else None


def _fault_of_coding(version: str, headers: Headers) -> HeadFault | None:
    """Return why a body in a transfer coding is refused. The parser decodes chunks only."""
    codings = [value.strip().lower() for name, value in headers if name == b"transfer-encoding"]
    if version == "1.0" or len(codings) > 1:
        return NOT_HTTP
    return None if codings[0] == b"chunked" else OTHER_CODING


def asks_for_websocket(headers: Headers) -> bool:
    """Return whether a request asks for the WebSocket protocol."""
    return any(name == b"upgrade" and value.strip().lower() == b"websocket" for name, value in headers)


def head_bytes(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return the head of a request."""
    lines = [method + b" " + url + b" HTTP/" + version.encode(), *(b"%b: %b" % pair for pair in headers)]
    return b"\r\n".join([*lines, b"", b""])


def without_upgrade(method: bytes, url: bytes, version: str, headers: Headers) -> bytes:
    """Return the head of a request without what asks for another protocol."""
    kept = [(name, value) for name, value in headers if name not in {b"upgrade", b"connection"}]
    if any(name == b"connection" and b"close" in value.lower() for name, value in headers):
        kept.append((b"connection", b"close"))
    return head_bytes(method, url, version, kept)


def refusal_bytes(fault: HeadFault, default_headers: Headers) -> bytes:
    """Return the bytes of the response that refuses a head and ends the connection."""
    error: dict[str, object] = {"code": fault.code, "message": fault.message, "status": fault.status.value}
    body = json.dumps({"error": {**error, "details": {}}}, separators=(",", ":")).encode()
    headers = [
        *default_headers,
        *fault.headers,
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
    ]
    first = f"HTTP/1.1 {fault.status.value} {fault.status.phrase}".encode()
    return b"\r\n".join([first, *(b"%b: %b" % pair for pair in headers), b"", body])
