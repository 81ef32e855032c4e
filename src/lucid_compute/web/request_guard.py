"""ASGI middleware before FastAPI: gives each request an id, reads its body within limits, and checks its JSON."""

from __future__ import annotations

import asyncio
import re
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lucid_compute.errors import InvalidRequest, LucidError, PayloadTooLarge
from lucid_compute.web.errors import answer
from lucid_compute.web.strict_json import read_strictly
from lucid_compute.wire import FieldFault

MAX_BODY_BYTES = 1024 * 1024
BODY_SECONDS = 30.0
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_JSON_HEADER = (b"content-type", b"application/json")


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


async def read_body(
    receive: Receive,
    headers: dict[bytes, bytes],
    limit_bytes: int = MAX_BODY_BYTES,
    deadline_seconds: float = BODY_SECONDS,
) -> bytes:
    """Return the complete body.

    Raises:
        PayloadTooLarge: it is over `limit_bytes`, or its Content-Length is.
        InvalidRequest: it did not come within `deadline_seconds`.
        ClientLeft: the client closed the connection.
    """
    try:
        async with asyncio.timeout(deadline_seconds):
            return await read_body_undisturbed(receive, headers, limit_bytes)
    except TimeoutError:
        raise body_too_slow(deadline_seconds) from None


def body_too_slow(deadline_seconds: float = BODY_SECONDS) -> InvalidRequest:
    """Return the refusal of a request whose body does not come."""
    fault = FieldFault("", f"The body did not come within {deadline_seconds:.0f} s. Send it again, faster.")
    return InvalidRequest([fault], status=400)


async def read_body_undisturbed(receive: Receive, headers: dict[bytes, bytes], limit_bytes: int) -> bytes:
    """Return the complete body, without a deadline.

    Raises:
        PayloadTooLarge: it is over `limit_bytes`, or its Content-Length is.
        ClientLeft: the client closed the connection.
    """
    declared = headers.get(b"content-length", b"0")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise PayloadTooLarge(limit_bytes)
    parts: list[bytes] = []
    length = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        parts.append(message.get("body", b""))
        length += len(parts[-1])
        if length > limit_bytes:
            raise PayloadTooLarge(limit_bytes)
        if not message.get("more_body"):
            return b"".join(parts)


class RequestGuard:
    """ASGI middleware. It reads any body as JSON, whatever its Content-Type: no route accepts anything else."""

    def __init__(self, app: ASGIApp, body_seconds: float = BODY_SECONDS) -> None:
        self._app = app
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a valid request on; refuse an invalid one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        send = _with_request_id(send, request_id)
        try:
            body = await read_body(receive, headers, deadline_seconds=self._body_seconds)
            if body:
                read_strictly(body)
                scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] != b"content-type"), _JSON_HEADER]
        except LucidError as error:
            await answer(error, path=scope["path"])(scope, receive, send)
            return
        except ClientLeft:
            return
        await self._app(scope, _Replay(body, receive), send)


class _Replay:
    """Receives the body that was read already, then the server's further messages."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """Return the caller's X-Request-Id if it is safe to log, else a new one."""
    sent = headers.get(b"x-request-id", b"")
    return sent.decode() if REQUEST_ID.fullmatch(sent) else uuid4().hex


def _with_request_id(send: Send, request_id: str) -> Send:
    async def send_with_id(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
        await send(message)

    return send_with_id
