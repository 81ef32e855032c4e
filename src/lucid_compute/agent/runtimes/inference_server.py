"""The inference server on this machine, over HTTP: every request has a deadline, every response a size limit."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

from lucid_compute.egress.base_path import base_path_of, root_path_of

DEADLINE_SECONDS = 2.0
HEALTH_DEADLINE_SECONDS = 5.0
MAX_BODY_BYTES = 8 * 1024 * 1024
_OK = 200


class ServerResponse(NamedTuple):
    """A response. Without one `status` is 0 and `fault` says why; `is_refused`: nothing listens there."""

    status: int
    body: bytes = b""
    fault: str | None = None
    is_refused: bool = False

    @property
    def is_ok(self) -> bool:
        """Return whether the status is 200."""
        return self.status == _OK

    @property
    def text(self) -> str:
        """The body of a successful response, else an empty text."""
        return self.body.decode(errors="replace") if self.is_ok else ""

    @property
    def json(self) -> Any:
        """The JSON of a successful response; None when there is none."""
        if not self.is_ok:
            return None
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None

    @property
    def fields(self) -> dict[str, Any]:
        """The JSON object of a successful response; empty when there is none."""
        value = self.json
        return value if isinstance(value, dict) else {}


class InferenceServer:
    """Queries one server. Never raises: a failure is in the response."""

    def __init__(self, url: str, key: str | None = None) -> None:
        """Query the server at `url`, with or without a version at its end, with `key` as its bearer key."""
        parts = urlsplit(url.rstrip("/"))
        root = root_path_of(parts.path).rstrip("/")
        self._version = base_path_of(parts.path).removeprefix(root)
        self.url = f"{parts.scheme}://{parts.netloc}{root}"
        self.models_path = f"{self._version}/models"
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {key}"} if key else {})
        limits = httpx.Limits(max_connections=8, max_keepalive_connections=4, keepalive_expiry=60)
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=HEALTH_DEADLINE_SECONDS,  # for each read; the deadline in `get` holds for the complete exchange
            limits=limits,
            trust_env=False,
            follow_redirects=False,
        )

    async def close(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    async def get(self, path: str, deadline_seconds: float = DEADLINE_SECONDS) -> ServerResponse:
        """Return the response to a GET; `/v1` in front of `path` is the server's own version.

        The deadline holds for the complete body.
        """
        try:
            async with asyncio.timeout(deadline_seconds):
                return await self._get(path)
        except TimeoutError:
            return ServerResponse(0, fault=f"does not answer within {deadline_seconds:g} s")
        except httpx.ConnectError:
            return ServerResponse(0, fault="can't be connected to", is_refused=True)
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError):
            return ServerResponse(0, fault="responds with something that is not HTTP, or closes the connection")

    async def _get(self, path: str) -> ServerResponse:
        url = self._version + path.removeprefix("/v1") if path.startswith("/v1/") else path
        async with self._http.stream("GET", url) as response:
            body = bytearray()
            async for piece in response.aiter_raw():
                body += piece
                if len(body) > MAX_BODY_BYTES:
                    return ServerResponse(0, fault=f"answers more than {MAX_BODY_BYTES} bytes to {path}")
            return ServerResponse(response.status_code, bytes(body))
