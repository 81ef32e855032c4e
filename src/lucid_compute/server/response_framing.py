"""Responses that uvicorn frames wrongly: to HTTP/1.0, and to a client that still waits for `100 Continue`."""

from __future__ import annotations

from typing import Any

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def framed(app: ASGI3Application, cycle: RequestResponseCycle) -> ASGI3Application:
    """Return the application with the right framing of its response to this request.

    - A client that was not told to continue may send its body or not, so the connection ends with the response.
    - A client of HTTP/1.0 knows no chunks, so a response of unknown length ends with the connection.
    """
    is_old = cycle.scope["http_version"] == "1.0"

    async def call(scope: Any, receive: Any, send: Any) -> None:
        ends_with_connection = False

        async def send_framed(message: Any) -> None:
            nonlocal ends_with_connection
            if message["type"] == "http.response.start":
                if cycle.waiting_for_100_continue:
                    cycle.keep_alive = False
                if is_old and not any(name.lower() == b"content-length" for name, _ in message.get("headers", ())):
                    ends_with_connection = True
                    cycle.chunked_encoding = False
            elif ends_with_connection:
                cycle.expected_content_length = len(message.get("body", b""))  # uvicorn subtracts it at once
            await send(message)

        await app(scope, receive, send_framed)

    return call
