"""Browsers of other origins: which may read responses, as LUCID_CORS_ORIGINS says."""

from __future__ import annotations

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from lucid_compute.web.errors import METHODS

ANY_ORIGIN = "*"
_MAX_AGE_SECONDS = 7200  # the longest that browsers keep a permission
_EXPOSED = b"*"  # all headers; a page sends its key in a header of its own, not as a cookie


class Cors:
    """ASGI middleware that lets pages of some origins use the service, with keys that they send themselves."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        self._app = app
        self._any = ANY_ORIGIN in origins
        self._origins = frozenset(origin.encode() for origin in origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Permit what a preflight request asks for; add to other responses that the page may read them."""
        headers = dict(scope.get("headers", ()))
        origin = headers.get(b"origin")
        if scope["type"] != "http" or origin is None or not (self._any or origin in self._origins):
            await self._app(scope, receive, send)
            return
        allowed = [(b"access-control-allow-origin", b"*" if self._any else origin)]
        if not self._any:
            allowed.append((b"vary", b"Origin"))
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            allowed += _permission(headers)
            await send({"type": "http.response.start", "status": 204, "headers": allowed})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_readable(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    *allowed,
                    (b"access-control-expose-headers", _EXPOSED),
                ]
            await send(message)

        await self._app(scope, receive, send_readable)


def _permission(headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """Return what a preflight request asks for: `*` would not include Authorization."""
    return [
        (b"access-control-allow-methods", ", ".join(METHODS).encode()),
        (b"access-control-allow-headers", headers.get(b"access-control-request-headers", b"authorization")),
        (b"access-control-max-age", b"%d" % _MAX_AGE_SECONDS),
    ]
