"""One client request as the gateway serves it: its state while it runs, the criteria for its node, its response."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from random import getrandbits
from typing import Any

from lucid_compute.accounting.jobs import Job
from lucid_compute.egress.faults import Blame, EgressFault
from lucid_compute.errors import LucidError
from lucid_compute.gateway.request_body import InferenceRequest
from lucid_compute.gateway.tracing import Span
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.routing_rules import NO_POLICY, RoutingPolicy
from lucid_compute.web.lanes import CutReason, Headers, Send


class RunningRequest:
    """The state of a request that runs, as the watchdog inspects it.

    - `key_id`: empty until the request is authenticated.
    - `has_body`: the request has arrived completely. `has_begun`: its response has begun.
    - `sending_since`: when a write began that the client has not read yet; 0 when it has read everything.
    - `job`: the attempt that runs or ran last.
    - `cut`: why the service ended the request; None while it has not.
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
        """End the request before its response is complete."""
        raise NotImplementedError

    def watch(self) -> None:
        """End the request from now on when the client disconnects."""

    def settle(self) -> None:
        """Mark the response as complete: the client may disconnect without ending anything."""


class TaskRequest(RunningRequest):
    """A request that a task serves. `give_up` ends the response with an error; None until the request is admitted."""

    __slots__ = ("_task", "_watcher", "give_up", "receive")

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        """Create it in the task that serves it. `receive` returns the client's ASGI messages."""
        super().__init__()
        self.receive = receive
        self.give_up: Callable[[LucidError], Awaitable[None]] | None = None
        self._task = asyncio.current_task()
        self._watcher: asyncio.Task[None] | None = None

    def end(self, reason: CutReason) -> None:
        """End the request: cancel its task."""
        if self.cut is None and self._task is not None:
            self.cut = reason
            self._task.cancel()

    def settle(self) -> None:
        """Mark the response as complete: the client may disconnect without ending anything."""
        self._task = None

    def watch(self) -> None:
        """End the request from now on when the client disconnects."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._await_disconnect())

    def close(self) -> None:
        """Stop watching, and break the reference cycles that would keep the request until garbage collection."""
        if self._watcher is not None:
            self._watcher.cancel()
            self._watcher = None
        self.give_up = self._task = None

    async def _await_disconnect(self) -> None:
        while (await self.receive())["type"] != "http.disconnect":
            pass
        self.end(CutReason.CLIENT_LEFT)


class Criteria:
    """The criteria for choosing a node: model, endpoint, the request's policy, its session, and nodes already tried.

    `owner` is of the request's key: what nodes said that they lack counts for who met it, and then for all.
    """

    __slots__ = ("endpoint", "is_exploration", "is_stream", "kind", "model", "owner", "policy", "session", "tried")

    def __init__(
        self,
        model: ModelPassport,
        policy: RoutingPolicy = NO_POLICY,
        *,
        endpoint: str = "chat/completions",
        session: str | None = None,
        is_stream: bool = False,
        owner: str = "",
    ) -> None:
        self.model = model
        self.owner = owner
        self.policy = policy
        self.endpoint = endpoint
        self.session = session
        self.is_stream = is_stream
        self.kind = (model.id, is_stream)  # requests of one kind have similar latencies
        self.tried: Collection[str] = ()
        self.is_exploration = False  # whether the node was chosen to measure it


_OF_STREAMS = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]  # nginx would hold events back
_VARIANT = 0b10 << 62  # RFC 9562's, in the upper bits of the id's second half


def new_job_id() -> str:
    """Return a new UUID of version 7: ids made one after another are neighbours in the ledger's index."""
    ms, rest = time.time_ns() // 1_000_000, getrandbits(74)
    low = rest >> 12 | _VARIANT
    return f"{ms >> 16:08x}-{ms & 0xFFFF:04x}-7{rest & 0xFFF:03x}-{low >> 48:04x}-{low & 0xFFFFFFFFFFFF:012x}"


class GatewayRequest:
    """An admitted request: what it asks, who makes it, and its response.

    - `inference`: the OpenAI request. `running`: its state at the entrance that serves it.
    - `headers`: added to every response.
    - `span`: None if the request is not traced.
    - `tokens`: what it has cost so far.
    - `faults`: how its attempts failed so far.
    - `avoids_idle`: an idle connection turned out to be closed, so the next attempts open new ones. Otherwise a node
      could receive the request a third time.
    """

    __slots__ = (
        "avoids_idle",
        "criteria",
        "faults",
        "headers",
        "inference",
        "job_id",
        "model",
        "principal",
        "running",
        "send",
        "span",
        "tokens",
    )

    send: Send

    def __init__(
        self, principal: Principal, inference: InferenceRequest, model: ModelPassport, running: RunningRequest
    ) -> None:
        self.principal = principal
        self.inference = inference
        self.model = model
        self.running = running
        self.job_id = ""
        self.headers: Headers = []
        self.span: Span | None = None
        self.tokens = 0
        self.avoids_idle = False
        self.faults: list[EgressFault] = []
        self.criteria = Criteria(
            model,
            inference.policy,
            endpoint=inference.endpoint,
            is_stream=inference.is_stream,
            owner=principal.owner,
        )

    def identify(self, job_id: str, session: str | None, headers: Headers) -> None:
        """Set the job's id, the session that ties the request to a node, and the headers of every response."""
        self.job_id = job_id
        self.criteria.session = session
        self.headers = headers

    def attach(self, running: RunningRequest, send: Send) -> None:
        """Serve it from now on as `running`, and respond through `send`, which takes ASGI messages."""
        running.job = self.running.job
        self.running = running
        self.send = send

    def failed_alike(self, fault: EgressFault) -> bool:
        """Return whether another node failed in the same way, and may have failed because of the request."""
        return fault.blame is Blame.PERHAPS_THE_REQUEST and any(
            other is not fault and other.reason == fault.reason for other in self.faults
        )

    @property
    def has_begun(self) -> bool:
        """Return whether the client has received a part of its response."""
        return self.running.has_begun

    def response_headers(self, content_type: bytes, node_id: str | None, attempt: int, length: int) -> Headers:
        """Return the headers of a node's response; a `length` below 0 means that it is unknown."""
        headers = [
            (b"content-type", content_type),
            (b"x-lucid-job", self.job_id.encode()),
            (b"x-lucid-attempts", b"%d" % attempt),
            *self.headers,
        ]
        if node_id is not None:
            headers.append((b"x-lucid-node", node_id.encode()))
        headers += [(b"content-length", b"%d" % length)] if length >= 0 else _OF_STREAMS
        return headers

    async def start(
        self, status: int, content_type: bytes, node_id: str | None, attempt: int, length: int = -1
    ) -> None:
        """Begin the response; a `length` below 0 means that it is unknown."""
        self.running.has_begun = True
        headers = self.response_headers(content_type, node_id, attempt, length)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the response; wait while the client does not read."""
        running = self.running
        running.sending_since = time.monotonic()
        await self.send({"type": "http.response.body", "body": body, "more_body": more})
        running.sending_since = 0.0
        if not more:
            running.settle()
