"""What every request passes before FastAPI sees it: an id, a bounded and whole body, and JSON that can be kept."""

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
BODY_DEADLINE_SECONDS = 30.0
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_JSON_HEADER = (b"content-type", b"application/json")


class ClientLeft(Exception):
    """The client closed the connection before its request was whole."""


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit_bytes: int = MAX_BODY_BYTES) -> bytes:
    """Return the whole body.

    Raises:
        PayloadTooLarge: it is over `limit_bytes`, or says that it will be.
        InvalidRequest: it did not come within 30 s.
        ClientLeft: the client went away.
    """
    try:
        async with asyncio.timeout(BODY_DEADLINE_SECONDS):
            return await read_body_undisturbed(receive, headers, limit_bytes)
    except TimeoutError:
        raise body_too_slow() from None


def body_too_slow() -> InvalidRequest:
    """Return what is said of a body that does not come."""
    fault = FieldFault("", f"The body did not come within {BODY_DEADLINE_SECONDS:.0f} s. Send it again, faster.")
    return InvalidRequest([fault], status=400)


async def read_body_undisturbed(receive: Receive, headers: dict[bytes, bytes], limit_bytes: int) -> bytes:
    """Return the whole body, for a caller that keeps its deadline itself; raises as `read_body` does, but for that."""
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
    """ASGI middleware. Any body is read as JSON, whatever its Content-Type says: no route takes anything else."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a sound request through; return an unsound one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        send = _with_request_id(send, request_id)
        try:
            body = await read_body(receive, headers)
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
    """Gives a body that was read already, then whatever else the server says."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._message: Message | None = {"type": "http.request", "body": body, "more_body": False}
        self._receive = receive

    async def __call__(self) -> Message:
        message, self._message = self._message, None
        return message if message is not None else await self._receive()


def request_id_of(headers: dict[bytes, bytes]) -> str:
    """Return the caller's X-Request-Id when it is fit to be logged, else a new one."""
    sent = headers.get(b"x-request-id", b"")
    return sent.decode() if REQUEST_ID.fullmatch(sent) else uuid4().hex


def _with_request_id(send: Send, request_id: str) -> Send:
    async def send_with_id(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
        await send(message)

    return send_with_id
