"""One request of a client as the gateway serves it, and what is answered to it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, MutableMapping
from random import getrandbits
from typing import Any

from lucid_compute.fleet.key_ring import Principal
from lucid_compute.inference.exchange import Exchange
from lucid_compute.inference.request_body import InferenceRequest
from lucid_compute.inference.tracing import Span
from lucid_compute.inference.wanted import Wanted
from lucid_compute.passports import ModelPassport

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
_VARIANT = 0b10 << 62  # RFC 9562's, in the upper bits of the id's second half


def new_job_id() -> str:
    """Answer a new id, a UUID of version 7: those made one after another stand together in the ledger's index."""
    ms, rest = time.time_ns() // 1_000_000, getrandbits(74)
    low = rest >> 12 | _VARIANT
    return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{rest & 0xFFF:03x}-{low >> 48:04x}-{low & 0xFFFFFFFFFFFF:012x}"


class Call:
    """A request, who makes it, and how to answer. `tokens` is what it has cost so far.

    `headers` are added to every answer. `span` is None of a request that is not traced. `mistrusts_idle` once it was
    sent on an idle connection that was found closed: from then on new ones are made, so no node gets it a third time.
    """

    __slots__ = (
        "exchange",
        "headers",
        "job_id",
        "mistrusts_idle",
        "model",
        "principal",
        "request",
        "send",
        "span",
        "tokens",
        "wanted",
    )

    send: Send

    def __init__(
        self, principal: Principal, request: InferenceRequest, model: ModelPassport, exchange: Exchange
    ) -> None:
        """Begin."""
        self.principal = principal
        self.request = request
        self.model = model
        self.exchange = exchange
        self.job_id = ""
        self.headers: Headers = []
        self.span: Span | None = None
        self.tokens = 0
        self.mistrusts_idle = False
        self.wanted = Wanted(model, request.policy, endpoint=request.endpoint, is_stream=request.is_stream)

    def identify(self, job_id: str, session: str | None, headers: Headers) -> None:
        """Give it its id in the ledger, the session that ties it to a node, and the headers of every answer."""
        self.job_id = job_id
        self.wanted.session = session
        self.headers = headers

    def attach(self, exchange: Exchange, send: Send) -> None:
        """Have it answered by `send`, which takes ASGI's messages, and `exchange` stand for it from now on."""
        exchange.job = self.exchange.job
        self.exchange = exchange
        self.send = send

    @property
    def has_begun(self) -> bool:
        """Whether the client has a part of its answer."""
        return self.exchange.has_begun

    def answer_headers(self, content_type: bytes, node_id: str | None, attempt: int, length: int) -> Headers:
        """Answer the headers of an answer by a node; a `length` below 0 is not known."""
        headers = [
            (b"content-type", content_type),
            (b"x-lucid-job", self.job_id.encode()),
            (b"x-lucid-attempts", b"%d" % attempt),
            *self.headers,
        ]
        if node_id is not None:
            headers.append((b"x-lucid-node", node_id.encode()))
        headers.append((b"content-length", b"%d" % length) if length >= 0 else (b"cache-control", b"no-cache"))
        return headers

    async def start(
        self, status: int, content_type: bytes, node_id: str | None, attempt: int, length: int = -1
    ) -> None:
        """Begin the answer; `length` below 0 is not known."""
        self.exchange.has_begun = True
        headers = self.answer_headers(content_type, node_id, attempt, length)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the answer; waits while the client does not read."""
        exchange = self.exchange
        exchange.sending_since = time.monotonic()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})
        exchange.sending_since = 0.0
        if not more:
            exchange.settle()
