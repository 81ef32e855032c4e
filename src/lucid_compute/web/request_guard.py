"""ASGI middleware before FastAPI: gives each request an id, judges it, and reads and checks its body."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lucid_compute.errors import LucidError
from lucid_compute.web.bodies import BODY_SECONDS, Body, BodyRoom, ClientLeft
from lucid_compute.web.errors import answer, stopping
from lucid_compute.web.strict_json import read_strictly

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
LONG_BODY_BYTES = 16 * 1024  # from here on other requests are served between the check of a body and its route
_JSON_HEADER = (b"content-type", b"application/json")
_BODY_HEADERS = frozenset({b"content-type", b"content-encoding", b"content-length"})

Judge = Callable[[Scope], Awaitable[bool]]
"""Returns whether a route takes a request that has a body. It raises a LucidError if the request is refused anyway."""


async def _accept(_: Scope) -> bool:
    return True


class RequestGuard:
    """ASGI middleware. It reads any body as JSON, whatever its Content-Type: no route accepts anything else."""

    def __init__(
        self, app: ASGIApp, *, room: BodyRoom | None = None, judge: Judge = _accept, body_seconds: float = BODY_SECONDS
    ) -> None:
        """`judge` looks at a request before its body is read."""
        self._app = app
        self._room = room or BodyRoom()
        self._judge = judge
        self._body_seconds = body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a valid request on; refuse an invalid one."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        request_id = request_id_of(headers)
        scope["state"] = {**scope.get("state", {}), "request_id": request_id}
        reply = _Reply(send, request_id)
        body = Body(self._room, headers)
        try:
            await self._serve(body, scope, receive, reply)
        except LucidError as error:
            await answer(error, path=scope["path"])(scope, receive, reply)
        except ClientLeft:
            return
        except asyncio.CancelledError:
            if reply.has_begun or (task := asyncio.current_task()) is None:
                raise
            task.uncancel()  # the server cancels what still runs when its grace is over
            await answer(stopping(), path=scope["path"])(scope, receive, reply)
        finally:
            body.release()

    async def _serve(self, body: Body, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, with its body if a route takes it.

        Raises:
            LucidError: the request is refused.
            ClientLeft: the client closed the connection.
        """
        if has_body(scope["headers"]) and not await self._judge(scope):
            await self._app(scope, receive, send)
            return
        content = await body.read(receive, self._body_seconds)
        if content:
            read_strictly(content)
            scope["headers"] = [*(pair for pair in scope["headers"] if pair[0] not in _BODY_HEADERS), _JSON_HEADER]
        if len(content) > LONG_BODY_BYTES:
            await asyncio.sleep(0)
        await self._app(scope, _Replay(content, receive), send)


def has_body(headers: list[tuple[bytes, bytes]]) -> bool:
    """Return whether the headers announce a body."""
    return any(name == b"transfer-encoding" or (name == b"content-length" and value != b"0") for name, value in headers)


class _Reply:
    """Sends a response, with its request's id, and remembers that it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self.has_begun = False

    async def __call__(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
        await self._send(message)


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
