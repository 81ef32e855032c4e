"""The head of a request that the service sends: what may pass to the inference server, and in which form. Pure.

The service is not trusted either: only the methods and paths of the endpoint table pass, with a few headers.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from lucid_compute.egress.base_path import base_path_of, root_path_of
from lucid_compute.gateway.endpoints import ENDPOINTS

MAX_HEAD_BYTES = 32 * 1024
MAX_BODY_BYTES = 1024 * 1024 * 1024
_BASE = base_path_of("")  # of the paths that the service sends
_PASSED = frozenset(
    {
        b"accept",
        b"accept-encoding",
        b"anthropic-version",
        b"content-type",
        b"traceparent",
        b"user-agent",
        b"x-lucid-replica",
        b"x-request-id",
    }
)
_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\x00]*)")
_LENGTH = re.compile(rb"[0-9]{1,12}")


class HeadRefused(Exception):
    """The service asks for something that it may not have. The message says what."""


class RequestHead(NamedTuple):
    """A request's head as the inference server gets it, and the length of the body that follows."""

    head: bytes
    body_bytes: int


class HeadReader:
    """Reads heads of requests for one inference server."""

    def __init__(self, url: str, key: str | None) -> None:
        """`url` is the server's; `key` is its own bearer key, which is added here and never leaves this machine."""
        parts = urlsplit(url.rstrip("/"))
        self._authority = parts.netloc
        self._key = key
        own = base_path_of(parts.path)
        self._paths = {(b"GET", f"{_BASE}/models".encode()): f"{own}/models".encode()}
        for name in ENDPOINTS:
            if name.startswith("/"):
                asked, wanted = name, f"{root_path_of(own)}{name}"
            else:
                asked, wanted = f"{_BASE}/{name}", f"{own}/{name}"
            self._paths[b"POST", asked.encode()] = wanted.encode()

    def read(self, head: bytes) -> RequestHead:
        """Return the head to send to the inference server; `head` ends with its empty line.

        Raises:
            HeadRefused: the method and path are none of an endpoint, or the head is not as the service writes it.
        """
        first, *lines = head[:-4].split(b"\r\n")
        method, _, rest = first.partition(b" ")
        path, _, version = rest.partition(b" ")
        wanted = self._paths.get((method, path))
        if wanted is None or version != b"HTTP/1.1":
            raise HeadRefused(f"{first[:100]!r} is no request to an endpoint of inference.")
        passed = [method + b" " + wanted + b" HTTP/1.1", b"Host: " + self._authority.encode(), b"Connection: close"]
        length: bytes | None = None
        for line in lines:
            if (match := _HEADER.fullmatch(line)) is None:
                raise HeadRefused("A header is not readable.")
            name, value = match[1].lower(), match[2]
            if name == b"content-length" and length is None and _LENGTH.fullmatch(value):
                length = value
            elif name in {b"content-length", b"transfer-encoding"}:
                raise HeadRefused("The length of the body is not clear.")
            elif name in _PASSED:
                passed.append(line)
        if length is None or int(length) > MAX_BODY_BYTES:
            raise HeadRefused("The length of the body is not said, or too large.")
        passed.append(b"Content-Length: " + length)
        if self._key is not None:
            passed.append(b"Authorization: Bearer " + self._key.encode())
            if path.startswith(f"{_BASE}/messages".encode()):
                passed.append(b"x-api-key: " + self._key.encode())
        return RequestHead(b"\r\n".join([*passed, b"", b""]), int(length))
