"""One request of a client as the gateway serves it, and what is answered to it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from random import getrandbits
from typing import Any

from lucid_compute.accounting.jobs import Job
from lucid_compute.errors import LucidError
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.gateway.tracing import Span
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.web.lanes import CutReason, Headers, Send


class RunningRequest:
    """One request under way. `cut` says why it was ended, None while it was not.

    `key_id` is empty until it is known who asks. `has_body` once the request is whole, `has_begun` once its answer has;
    `sending_since` is when the client was last sent something that it has not taken, 0 when it has; `job` is the
    attempt that runs or ran last.
    """

    __slots__ = ("cut", "has_begun", "has_body", "job", "key_id", "sending_since", "started_at")

    def __init__(self) -> None:
        self.key_id = ""
        self.job: Job | None = None
        self.cut: CutReason | None = None
        self.started_at = time.monotonic()
        self.sending_since = 0.0
        self.has_body = self.has_begun = False

    def end(self, reason: CutReason) -> None:
        """End it from our side."""
        raise NotImplementedError

    def watch(self) -> None:
        """Notice from now on when the client leaves."""

    def settle(self) -> None:
        """Note that the client has its whole answer: to leave is its right, and nothing is ended by it."""


class TaskRequest(RunningRequest):
    """A request that a task serves. `give_up` ends the answer with an error, None before anything can be answered."""

    __slots__ = ("_task", "_watcher", "give_up", "receive")

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Begin in the task that serves it; `receive` answers ASGI's messages of the client."""
        super().__init__()
        self.receive = receive
        self.give_up: Callable[[LucidError], Awaitable[None]] | None = None
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None

    def end(self, reason: CutReason) -> None:
        """End it: whatever it waits for is cancelled."""
        if self.cut is None and self._task is not None:
            self.cut = reason
            self._task.cancel()

    def settle(self) -> None:
        """Note that the client has its whole answer: to leave is its right, and nothing is ended by it."""
        self._task = None

    def watch(self) -> None:
        """Notice from now on when the client leaves."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._await_leaving())

    def close(self) -> None:
        """Watch no longer, and let go of what would hold the request in a circle until garbage is collected."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self.give_up = self._task = None

    async def _await_leaving(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.end(CutReason.CLIENT_LEFT)


class Criteria:
    """A model at an endpoint, the request's policy, its session's name, and the nodes that were tried already."""

    __slots__ = ("endpoint", "explores", "is_stream", "kind", "model", "policy", "session", "tried")

    def __init__(
        self,
        model: ModelPassport,
        policy: RoutingPolicy = NO_POLICY,
        *,
        endpoint: str = "chat/completions",
        session: str | None = None,
        is_stream: bool = False,
    ) -> None:
        self.model = model
        self.policy = policy
        self.endpoint = endpoint
        self.session = session
        self.is_stream = is_stream
        self.kind = (model.id, is_stream)  # of requests that take alike long
        self.tried: Collection[str] = ()
        self.explores = False  # whether the node was chosen to see how it does by now


_VARIANT = 0b10 << 62  # RFC 9562's, in the upper bits of the id's second half


def new_job_id() -> str:
    """Return a new id, a UUID of version 7: those made one after another stand together in the ledger's index."""
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
        self, principal: Principal, request: InferenceRequest, model: ModelPassport, exchange: RunningRequest
    ) -> None:
        self.principal = principal
        self.request = request
        self.model = model
        self.exchange = exchange
        self.job_id = ""
        self.headers: Headers = []
        self.span: Span | None = None
        self.tokens = 0
        self.mistrusts_idle = False
        self.wanted = Criteria(model, request.policy, endpoint=request.endpoint, is_stream=request.is_stream)

    def identify(self, job_id: str, session: str | None, headers: Headers) -> None:
        """Give it its id in the ledger, the session that ties it to a node, and the headers of every answer."""
        self.job_id = job_id
        self.wanted.session = session
        self.headers = headers

    def attach(self, exchange: RunningRequest, send: Send) -> None:
        """Have it answered by `send`, which takes ASGI's messages, and `exchange` stand for it from now on."""
        exchange.job = self.exchange.job
        self.exchange = exchange
        self.send = send

    @property
    def has_begun(self) -> bool:
        """Return whether the client has a part of its answer."""
        return self.exchange.has_begun

    def answer_headers(self, content_type: bytes, node_id: str | None, attempt: int, length: int) -> Headers:
        """Return the headers of an answer by a node; a `length` below 0 is not known."""
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
