"""`POST /v1/…`: one admission with two entrances, which are an ASGI application of its own and the fast path.

Forwarding through FastAPI takes three times as long as the gateway itself (docs/adr/0009-own-http-client.md). On the
fast path a request without a stream is sent to a node at once, without a task (docs/adr/0013-express-lane.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any

from starlette.types import Receive, Scope

from lucid_compute.accounting.refusals import NO_MODEL, NOBODY, RefusalRecorder
from lucid_compute.errors import InvalidRequest, LucidError, MethodNotAllowed, Overloaded, RoutingLoop
from lucid_compute.gateway.attempt import JSON, Ending, NeedsTask, NodeResponse, TasklessRequest
from lucid_compute.gateway.gateway import Gateway
from lucid_compute.gateway.refusal_responses import (
    give_up,
    key_revoked,
    overloaded,
    refusal,
    refusal_of,
    send_response,
)
from lucid_compute.gateway.request import GatewayRequest, RunningRequest, TaskRequest, new_job_id
from lucid_compute.gateway.request_body import PARSED_BYTES, InferenceRequest, model_named_in, read_in_steps
from lucid_compute.gateway.tracing import Span
from lucid_compute.gateway.upstreams import HOP_HEADER
from lucid_compute.gateway.watchdog import Watchdog
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.identity import Scope as KeyScope
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.keys.authentication import Admission, Authenticator
from lucid_compute.registry.keys.key_rates import KeyRates, rate_limit_headers
from lucid_compute.web.bodies import Body, BodyRoom, ClientLeft, body_too_slow
from lucid_compute.web.errors import log_unexpected, stopping
from lucid_compute.web.lanes import CutReason, FastPathClient, Headers, Response, Send
from lucid_compute.web.request_guard import REQUEST_ID, request_id_of

ENDPOINTS = {f"/v1/{name}": name for name in ("chat/completions", "completions", "embeddings", "responses")}
SESSION_HEADER = b"x-lucid-session"
MAX_SESSION_BYTES = 256
ERROR_SECONDS = 1.0
_log = logging.getLogger(__name__)
ALLOWED_SCOPES = (KeyScope.INFERENCE_RUN, KeyScope.ADMIN)
HOP = HOP_HEADER.encode()


class InferenceAdmission(Admission):
    """A request that is being admitted, with what is known of it so far.

    - `running`: its state at the entrance that serves it. `is_running`: it is counted in `running_count`.
    - `response_headers`: part of every response; None until the key is known to have the scope.
    - `is_charged`: it is subtracted from its key's allowance.
    - `inference`: the parsed body. `model_id`: the model that it seems to name. `request`: set once it is admitted.
    - `held`: what its body takes of the memory for bodies, if it was read here.
    - `ending`: how it ended on the fast path, if it was sent to a node there.
    """

    running: RunningRequest
    is_running = False
    is_charged = False
    response_headers: Headers | None = None
    job_id = ""
    span: Span | None = None
    inference: InferenceRequest | None = None
    request: GatewayRequest | None = None
    held: Body | None = None
    ending: NeedsTask | None = None

    def __init__(self, path: str, headers: dict[bytes, bytes], body: bytes | None = None) -> None:
        super().__init__(path, headers, body)
        self.model_id = NO_MODEL

    @property
    def identifying_headers(self) -> Headers:
        """The headers that identify the request to its client; the first is `X-Request-Id`."""
        return self.response_headers or [(b"x-request-id", request_id_of(self.headers).encode())]


Wait = Callable[[InferenceAdmission, Scope, Receive], Awaitable[None]]
"""What must be awaited before a request can be admitted."""


class InferenceLane:
    """Serves inference requests for one replica: those of the fast path in `take`, all others as an ASGI application.

    `running_count` counts requests that run, `outcomes` how requests ended (each ends once), `express` those that the
    fast path sent to a node.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        feed: ChangeFeed,
        rates: KeyRates,
        gateway: Gateway,
        *,
        watchdog: Watchdog,
        refusals: RefusalRecorder,
        max_running: int,
        max_body_bytes: int,
        room: BodyRoom,
    ) -> None:
        """`max_running`: how many requests may run at a time. Their bodies, each within its limit, take of `room`."""
        self._authenticator = authenticator
        self._feed = feed
        self._rates = rates
        self._gateway = gateway
        self._watched = watchdog.requests
        self._refusals = refusals
        self._max_running = max_running
        self._max_body_bytes = max_body_bytes
        self._room = room
        context = gateway.context
        self._fleet, self._clock = context.fleet, context.clock
        self._ledger, self._tracer = context.ledger, context.tracer
        self._overloaded = refusal(overloaded(), [])
        self._waiting: dict[TasklessRequest, tuple[FastPathClient, InferenceAdmission]] = {}
        self.running_count = self.express = 0
        self.outcomes: Counter[str] = Counter()

    # --- one admission

    def admit(self, admission: InferenceAdmission, now: datetime) -> GatewayRequest | Wait:
        """Return the admitted request, or what must be awaited before `admit` is called again.

        A repeated call does no step twice. Only a request that is not `is_running` is counted first, or refused as one
        too many.

        Raises:
            LucidError: the request is refused.
        """
        if not admission.is_running:
            self._begin(admission)
        if admission.request is not None:
            return admission.request
        principal = admission.principal or self._authenticator.find_known(admission.authorization, now)
        if principal is None:
            return self._authenticator.await_key
        admission.principal = principal
        headers = admission.response_headers or self._identify(admission, principal)
        if principal.limits and not admission.is_charged and not self._spend(admission, principal, headers):
            return self._await_allowance
        inference = admission.inference
        if inference is None:
            if admission.body is None or len(admission.body) > PARSED_BYTES:
                return self._await_body if admission.body is None else self._await_reading
            inference = admission.inference = self._read(admission, admission.body)
            admission.body = None
        model = self._fleet.find_model(inference.model)
        if model is None:
            return self._await_model
        admission.model_id = model.id
        self._gateway.count_request(principal.key_id)
        request = admission.request = GatewayRequest(principal, inference, model, admission.running)
        request.span = admission.span
        request.identify(admission.job_id, _session_of(admission.headers, inference, principal), headers)
        return request

    def _begin(self, admission: InferenceAdmission) -> None:
        """Count the request as running. Refuse it if it is one too many, unless it was sent to a node already."""
        if admission.ending is None:
            if admission.method != "POST":
                raise MethodNotAllowed(admission.method, ["POST"])
            hop = admission.headers.get(HOP)
            if hop is not None and self._feed.knows_replica(hop.decode("latin-1")):
                raise RoutingLoop([])
            if self._is_full:
                raise overloaded()
        admission.is_running = True
        self.running_count += 1

    @property
    def _is_full(self) -> bool:
        """Return whether another request would be one too many."""
        return self.running_count >= self._max_running or not self._ledger.has_room()

    def _learn_server(self, server: tuple[str, int | None] | None) -> None:
        """Remember an address of this service, so that no request is sent to it."""
        if server is not None and server[1] is not None:
            self._gateway.own_endpoints.add((server[0], server[1]))

    def _identify(self, admission: InferenceAdmission, principal: Principal) -> Headers:
        """Set the request's id and the headers of every response.

        Raises:
            Forbidden: the key lacks the scope.
        """
        principal.require(ALLOWED_SCOPES)
        if self._tracer is not None:
            admission.span = self._tracer.begin(f"POST {admission.path}", admission.headers)
        admission.job_id = new_job_id()
        sent = admission.headers.get(b"x-request-id")
        is_fit = sent is not None and REQUEST_ID.fullmatch(sent)
        headers = [(b"x-request-id", sent if sent and is_fit else admission.job_id.encode())]
        admission.response_headers = headers
        return headers

    def _spend(self, admission: InferenceAdmission, principal: Principal, headers: Headers) -> bool:
        """Subtract the request from its key's allowance; return False if the allowance must be awaited.

        Raises:
            RateLimited: the allowance is used up.
        """
        must_wait = False
        try:
            must_wait = not self._rates.spend(principal)
        finally:
            if not must_wait:
                headers += rate_limit_headers(self._rates.allowances(principal))
        admission.is_charged = not must_wait
        return not must_wait

    def _read(self, admission: InferenceAdmission, body: bytes) -> InferenceRequest:
        """Return the parsed body; if that fails, find the model it names, so that its owner sees the refusal.

        Raises:
            InvalidRequest: the body is not a valid request.
        """
        try:
            return InferenceRequest(ENDPOINTS[admission.path], body)
        except InvalidRequest:
            self._find_named_model(admission, body)
            raise

    def _find_named_model(self, admission: InferenceAdmission, body: bytes) -> None:
        if (model := self._fleet.find_model(model_named_in(body))) is not None:
            admission.model_id = model.id

    async def _await_reading(self, admission: InferenceAdmission, *_: Any) -> None:
        """Parse a large body in steps, between which other requests are served."""
        body = admission.body or b""
        try:
            admission.inference = await read_in_steps(ENDPOINTS[admission.path], body)
        except InvalidRequest:
            self._find_named_model(admission, body)
            raise
        admission.body = None

    async def _await_allowance(self, admission: InferenceAdmission, *_: Any) -> None:
        """Wait until the replicas have shared the limits of the key."""
        if admission.principal is not None:
            await self._rates.ask(admission.principal)

    async def _await_body(self, admission: InferenceAdmission, _scope: Scope, receive: Receive) -> None:
        admission.held = Body(self._room, admission.headers, self._max_body_bytes)
        admission.body = await admission.held.read_undisturbed(receive)

    async def _await_model(self, admission: InferenceAdmission, *_: Any) -> None:
        """Wait for the feed: another replica may have just registered the model."""
        await self._feed.catch_up()
        if admission.inference is not None:
            self._fleet.get_model(admission.inference.model)

    # --- the end of a request that is not served

    def _count(self, ended: LucidError | CutReason, admission: InferenceAdmission) -> None:
        """Count how a request ended that was not served, and record it as refused if the ledger has no attempt of it.

        A request that a node sent back to this service is not recorded: it is part of the one that was sent there.
        """
        outcome, cause = (ended.upper(), ended) if isinstance(ended, CutReason) else (ended.code, ended.cause)
        self.outcomes[outcome] += 1
        if admission.running.job is None and not isinstance(ended, RoutingLoop):
            owner = NOBODY if admission.principal is None else admission.principal.owner
            self._refusals.count(cause, owner, admission.model_id)

    def _refuse(self, admission: InferenceAdmission, error: Exception) -> Response:
        """Count a request that is refused before its response has begun; return the response."""
        headers = admission.identifying_headers
        if not isinstance(error, LucidError):
            error = log_unexpected(admission.method, admission.path, error, headers[0][1].decode())
        self._count(error, admission)
        if admission.span is not None:
            admission.span.end(error.code)
        return refusal(error, headers)

    def _release(self, admission: InferenceAdmission) -> None:
        """Stop counting and watching the request at this entrance."""
        self._watched.discard(admission.running)
        if admission.is_running:
            admission.is_running = False
            self.running_count -= 1

    def _watch(self, principal: Principal, running: RunningRequest) -> None:
        """End the request from now on when its client disconnects or its key is revoked."""
        running.key_id = principal.key_id
        self._watched.add(running)

    def _charge(self, request: GatewayRequest) -> None:
        """Subtract what the request has cost from its key's allowance."""
        if request.principal.limits is not None:
            self._rates.charge_tokens(request.principal, request.tokens)

    # --- the ASGI entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        admission = InferenceAdmission.of_scope(scope)
        running = admission.running = TaskRequest(receive)
        self._learn_server(scope.get("server"))
        try:
            await self._serve(await self._admit(admission, scope, running), admission, running, send)
        except ClientLeft:
            self._count(CutReason.CLIENT_LEFT, admission)
        except asyncio.CancelledError:
            running.cut = running.cut or CutReason.SHUTDOWN  # then the server cancelled it: its grace is over
            await self._cut(running, admission, scope, send)
        except Exception as error:  # noqa: BLE001 - becomes a response of our shape, as in FastAPI's routes
            if running.has_begun:  # a second head must not follow the first
                await self._break_off(running, admission, scope, error)
            else:
                await send_response(send, self._refuse(admission, error))
        finally:
            self._release(admission)
            running.close()
            if admission.held is not None:
                admission.held.release()
            if admission.span is not None:
                admission.span.end(running.cut)

    async def _admit(self, admission: InferenceAdmission, scope: Scope, running: TaskRequest) -> GatewayRequest:
        """Return the admitted request, after awaiting whatever it needs."""
        while not isinstance(admitted := self.admit(admission, self._clock.now()), GatewayRequest):
            if admission.principal is not None:
                self._watch(admission.principal, running)
            await admitted(admission, scope, running.receive)
        self._watch(admitted.principal, running)
        return admitted

    async def _serve(
        self, request: GatewayRequest, admission: InferenceAdmission, running: TaskRequest, send: Send
    ) -> None:
        """Serve an admitted request."""
        running.has_body = True
        request.attach(running, send)
        running.give_up = partial(give_up, request)
        try:
            await self._gateway.serve(request, admission.ending and admission.ending.failed)
            self.outcomes["SERVED"] += 1
        except LucidError as error:
            self._count(error, admission)
            await give_up(request, error)
        finally:
            self._charge(request)

    async def _cut(self, running: TaskRequest, admission: InferenceAdmission, scope: Scope, send: Send) -> None:
        """End a request that was cancelled: keep the task, and send an error where possible."""
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        cut = running.cut or CutReason.SHUTDOWN
        self._count(cut, admission)
        errors: dict[CutReason, LucidError] = {
            CutReason.KEY_REVOKED: key_revoked(),
            CutReason.BODY_TOO_SLOW: body_too_slow(),
            CutReason.SHUTDOWN: stopping(),
        }
        if (error := errors.get(cut)) is not None and (_is_stream(running) or not running.has_begun):
            with suppress(TimeoutError):
                async with asyncio.timeout(ERROR_SECONDS):
                    if running.give_up is None:
                        await send_response(send, refusal(error, admission.identifying_headers))
                    else:
                        await running.give_up(error)
            return
        if running.has_begun:
            _abort(scope)

    async def _break_off(
        self, running: TaskRequest, admission: InferenceAdmission, scope: Scope, error: Exception
    ) -> None:
        """End a response in which this service failed: a stream with an error event, any other by its connection."""
        job = running.job
        internal = log_unexpected(admission.method, admission.path, error, job.id if job else None)
        self._count(internal, admission)
        try:
            if running.give_up is not None and _is_stream(running):
                await running.give_up(internal)
                return
        except Exception:  # noqa: BLE001 - after any failure here, closing the connection is all that is left
            _log.exception("%s could not be told that it broke off", admission.path)
        _abort(scope)

    # --- the fast path

    def accept(
        self, client: FastPathClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> TasklessRequest | None:
        """Send a request to a node, refuse it, or pass it on to a task with what is known of it.

        Requests are passed on that ask for a stream, or must wait for anything except the node's response. So are all
        requests while tracing is on: spans take more time than the fast path saves.
        """
        if self._is_full and HOP not in headers:  # `admit` would refuse it too, but this is cheaper
            client.answer(*self._refuse_at_once(headers))
            return None
        running = TasklessRequest(self._gateway.context, self._end)
        admission = InferenceAdmission(path.decode(), headers, body)
        admission.running = running
        self._learn_server(client.server)
        now = self._clock.now()
        try:
            request = None if self._tracer is not None else self.admit(admission, now)
            ready = self._gateway.find_ready_node(request, now) if isinstance(request, GatewayRequest) else None
        except Exception as error:  # noqa: BLE001 - becomes the same response as in a task
            self._release(admission)
            client.answer(*self._refuse(admission, error))
            return None
        if ready is None or not isinstance(request, GatewayRequest):
            self._release(admission)
            client.pass_on(admission)
            return None
        self.express += 1
        self._watch(request.principal, running)
        self._waiting[running] = client, admission
        running.start(request, ready, now)
        return running

    def close(self) -> None:
        """End the requests that still run on the fast path, because the service stops."""
        for running in [*self._waiting]:
            running.end(CutReason.SHUTDOWN)

    def _refuse_at_once(self, headers: dict[bytes, bytes]) -> Response:
        """Count a request that is one too many; return its response, which is nearly all prepared."""
        status, ours, body = self._overloaded
        self.outcomes[Overloaded.code] += 1
        self._refusals.count(Overloaded.code.lower())
        return status, [*ours, (b"x-request-id", request_id_of(headers).encode())], body

    def _end(self, running: TasklessRequest, ending: Ending) -> None:
        """Respond to a request whose attempt on the fast path has ended, or pass it on."""
        request = running.request
        client, admission = self._waiting.pop(running)
        self._release(admission)
        if isinstance(ending, NeedsTask):
            admission.ending = ending
            client.pass_on(admission)
            return
        self._charge(request)
        if isinstance(ending, NodeResponse):
            self.outcomes["SERVED"] += 1
            headers = request.response_headers(JSON, running.node_id, 1, len(ending.body))
            client.answer(ending.status, headers, ending.body)
        elif ending is CutReason.SHUTDOWN:
            self.outcomes[ending.upper()] += 1
            client.answer(*refusal_of(request, stopping()))
        elif isinstance(ending, CutReason) and ending is not CutReason.KEY_REVOKED:
            self.outcomes[ending.upper()] += 1
            client.hang_up()
        else:
            error = _error_of(ending, admission)
            self.outcomes[error.code] += 1
            client.answer(*refusal_of(request, error))


def _session_of(headers: dict[bytes, bytes], inference: InferenceRequest, principal: Principal) -> str | None:
    """Return the request's session, separate for each owner; None when it names none."""
    session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or inference.session
    return session and f"{principal.owner} {session}"


def _error_of(ending: Ending, admission: InferenceAdmission) -> LucidError:
    """Return the error for an ending that is neither a node's response nor its failure."""
    if isinstance(ending, Exception):
        return log_unexpected("POST", admission.path, ending, admission.job_id)
    return key_revoked()


def _is_stream(running: RunningRequest) -> bool:
    """Return whether the response is a stream, which can end with an error event."""
    return running.job is not None and running.job.is_stream


def _abort(scope: Scope) -> None:
    if (abort := scope.get("extensions", {}).get("lucid.abort")) is not None:
        abort()
