"""The lane of `POST /v1/…`: one admission, and two entrances: ASGI beside FastAPI, and the fast path.

Forwarding through the framework costs three times what the gateway itself does (docs/adr/0009-own-http-client.md). On
the fast path a request for a whole answer is sent to a node at once, without a task (docs/adr/0013-express-lane.md).
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
from lucid_compute.errors import InvalidRequest, LucidError, MethodNotAllowed, Overloaded, RoutingLoop, Unauthorized
from lucid_compute.gateway.attempt import JSON, Ending, ExpressExchange, HandedOver, NodeResponse
from lucid_compute.gateway.event_stream import error_event
from lucid_compute.gateway.gateway import Gateway
from lucid_compute.gateway.request import Call, RunningRequest, TaskRequest, new_job_id
from lucid_compute.gateway.request_body import InferenceRequest, model_named_in
from lucid_compute.gateway.tracing import Span
from lucid_compute.gateway.upstreams import HOP_HEADER
from lucid_compute.gateway.watchdog import Watchdog
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.identity import Scope as KeyScope
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.keys.authentication import Admission, Authenticator
from lucid_compute.registry.keys.rate_limits import KeyRates, rate_limit_headers
from lucid_compute.web.errors import headers_of, log_unexpected, openai_body, openai_bytes
from lucid_compute.web.lanes import CutReason, FastPathClient, Headers, Response, Send
from lucid_compute.web.request_guard import REQUEST_ID, ClientLeft, body_too_slow, read_body_undisturbed, request_id_of

ENDPOINTS = {f"/v1/{name}": name for name in ("chat/completions", "completions", "embeddings", "responses")}
MAX_BODY_BYTES = 10 * 1024 * 1024
SESSION_HEADER = b"x-lucid-session"
MAX_SESSION_BYTES = 256
LAST_WORD_SECONDS = 1.0
_log = logging.getLogger(__name__)
ALLOWED_SCOPES = (KeyScope.INFERENCE_RUN, KeyScope.ADMIN)
HOP = HOP_HEADER.encode()


class InferenceAdmission(Admission):
    """A request on its way in. `exchange` stands for it at the entrance where it is; `call` is it once it is admitted.

    `response_headers` are those of every response, None until the key may ask. `is_running` while it is counted.
    `model_id` is of the model that it seems to name. `ending` is how it ended on the fast path, once it was sent there.
    """

    exchange: RunningRequest
    is_running = False
    response_headers: Headers | None = None
    job_id = ""
    span: Span | None = None
    request: InferenceRequest | None = None
    model_id = NO_MODEL
    call: Call | None = None
    ending: HandedOver | None = None

    @property
    def names(self) -> Headers:
        """The headers that tell a client of its request; the first is `X-Request-Id`."""
        return self.response_headers or [(b"x-request-id", request_id_of(self.headers).encode())]


Wait = Callable[[InferenceAdmission, Scope, Receive], Awaitable[None]]
"""What has to be awaited before a request can be admitted."""


class InferenceLane:
    """Serves inference requests for one replica: of the fast path by `take`, all others by ASGI.

    `running` counts those under way, `outcomes` how they ended: each ends once. `express` counts those that the fast
    path sent to a node.
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
    ) -> None:
        """Serve none yet, and `max_running` at a time."""
        self._authenticator = authenticator
        self._feed = feed
        self._rates = rates
        self._gateway = gateway
        self._exchanges = watchdog.exchanges
        self._refusals = refusals
        self._most = max_running
        tools = gateway.tools
        self._fleet, self._clock, self._ledger, self._tracer = tools.fleet, tools.clock, tools.ledger, tools.tracer
        self._overloaded = refusal(_overloaded(), [])
        self._waiting: dict[ExpressExchange, tuple[FastPathClient, InferenceAdmission]] = {}
        self.running = self.express = 0
        self.outcomes: Counter[str] = Counter()

    # --- one admission

    def admit(self, admission: InferenceAdmission, now: datetime) -> Call | Wait:
        """Return the call when the request is in order, else what has to be awaited before it is admitted again.

        Nothing is done twice, except that one which is not `is_running` is first counted, or refused as too many.

        Raises:
            LucidError: it is refused.
        """
        if not admission.is_running:
            self._begin(admission)
        if admission.call is not None:
            return admission.call
        principal = admission.principal or self._authenticator.find_known(admission.authorization, now)
        if principal is None:
            return self._authenticator.await_key
        admission.principal = principal
        headers = admission.response_headers or self._identify(admission, principal)
        request = admission.request
        if request is None:
            if admission.body is None:
                return self._await_body
            request = admission.request = self._read(admission, admission.body)
            admission.body = None
        model = self._fleet.find_model(request.model)
        if model is None:
            return self._await_model
        admission.model_id = model.id
        self._gateway.note_request()
        call = admission.call = Call(principal, request, model, admission.exchange)
        call.span = admission.span
        call.identify(admission.job_id, _session_of(admission.headers, request, principal), headers)
        return call

    def _begin(self, admission: InferenceAdmission) -> None:
        """Count one request more; what was sent to a node already was counted before."""
        if admission.ending is None:
            if admission.method != "POST":
                raise MethodNotAllowed(admission.method, ["POST"])
            hop = admission.headers.get(HOP)
            if hop is not None and self._feed.knows_replica(hop.decode("latin-1")):
                raise RoutingLoop([])
            if self._is_full:
                raise _overloaded()
        admission.is_running = True
        self.running += 1

    @property
    def _is_full(self) -> bool:
        """Return whether one request more would be too many."""
        return self.running >= self._most or not self._ledger.has_room()

    def _learn_server(self, server: tuple[str, int | None] | None) -> None:
        """Know an address of our own, so that no request is sent to it."""
        if server is not None and server[1] is not None:
            self._gateway.own_endpoints.add((server[0], server[1]))

    def _identify(self, admission: InferenceAdmission, principal: Principal) -> Headers:
        """Give the request its id, by which its client is told of it, and take it off its key's allowance."""
        principal.require(ALLOWED_SCOPES)
        if self._tracer is not None:
            admission.span = self._tracer.begin(f"POST {admission.path}", admission.headers)
        admission.job_id = new_job_id()
        sent = admission.headers.get(b"x-request-id")
        is_fit = sent is not None and REQUEST_ID.fullmatch(sent)
        headers = [(b"x-request-id", sent if sent and is_fit else admission.job_id.encode())]
        admission.response_headers = headers
        if principal.limits is not None:
            try:
                self._rates.require_tokens(principal)  # first, for it takes nothing off
                self._rates.spend_request(principal)
            finally:
                headers += rate_limit_headers(self._rates.allowances(principal))
        return headers

    def _read(self, admission: InferenceAdmission, body: bytes) -> InferenceRequest:
        """Return what is asked for; if it can't be understood, note of which model, so that its owner can be told.

        Raises:
            InvalidRequest: it can't be understood.
        """
        try:
            return InferenceRequest(ENDPOINTS[admission.path], body)
        except InvalidRequest:
            if (model := self._fleet.find_model(model_named_in(body))) is not None:
                admission.model_id = model.id
            raise

    async def _await_body(self, admission: InferenceAdmission, _scope: Scope, receive: Receive) -> None:
        admission.body = await read_body_undisturbed(receive, admission.headers, MAX_BODY_BYTES)

    async def _await_model(self, admission: InferenceAdmission, *_: Any) -> None:
        """Look for a model that another replica may have only just registered."""
        await self._feed.catch_up()
        if admission.request is not None:
            self._fleet.get_model(admission.request.model)

    # --- how a request ends that is not served

    def _count(self, ended: LucidError | CutReason, admission: InferenceAdmission) -> None:
        """Count how a request ended that was not served, and keep what no attempt in the ledger stands for.

        A request that came back to us by way of a node is part of the one that was sent there, whose attempt failed.
        """
        outcome, cause = (ended.upper(), ended) if isinstance(ended, CutReason) else (ended.code, ended.cause)
        self.outcomes[outcome] += 1
        if admission.exchange.job is None and not isinstance(ended, RoutingLoop):
            owner = NOBODY if admission.principal is None else admission.principal.owner
            self._refusals.note(cause, owner, admission.model_id)

    def _refuse(self, admission: InferenceAdmission, error: Exception) -> Response:
        """Count a request that is refused before anything was sent to its client; return the response."""
        headers = admission.names
        if not isinstance(error, LucidError):
            error = log_unexpected(admission.method, admission.path, error, headers[0][1].decode())
        self._count(error, admission)
        if admission.span is not None:
            admission.span.end(error.code)
        return refusal(error, headers)

    def _release(self, admission: InferenceAdmission) -> None:
        """Count it as running no longer, at this entrance."""
        self._exchanges.discard(admission.exchange)
        if admission.is_running:
            admission.is_running = False
            self.running -= 1

    def _watch(self, principal: Principal, exchange: RunningRequest) -> None:
        """End the exchange from now on when its client leaves, or its key is revoked."""
        exchange.key_id = principal.key_id
        self._exchanges.add(exchange)

    def _charge(self, call: Call) -> None:
        """Take what the call has cost off its key's allowance."""
        if call.principal.limits is not None:
            self._rates.charge_tokens(call.principal, call.tokens)

    # --- the ASGI entrance

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        admission = InferenceAdmission.of_scope(scope)
        exchange = admission.exchange = TaskRequest(receive)
        self._learn_server(scope.get("server"))
        try:
            await self._serve(await self._admit(admission, scope, exchange), admission, exchange, send)
        except ClientLeft:
            self._count(CutReason.CLIENT_LEFT, admission)
        except asyncio.CancelledError:
            if exchange.cut is None:
                raise
            await self._cut(exchange, admission, scope, send)
        except Exception as error:  # noqa: BLE001 - answered in our shape, as FastAPI's routes answer theirs
            if exchange.has_begun:  # no second head may follow the one that was sent
                await self._break_off(exchange, admission, scope, error)
            else:
                await send_response(send, self._refuse(admission, error))
        finally:
            self._release(admission)
            exchange.close()
            if admission.span is not None:
                admission.span.end(exchange.cut)

    async def _admit(self, admission: InferenceAdmission, scope: Scope, exchange: TaskRequest) -> Call:
        while not isinstance(call := self.admit(admission, self._clock.now()), Call):
            if admission.principal is not None:
                self._watch(admission.principal, exchange)
            await call(admission, scope, exchange.receive)
        self._watch(call.principal, exchange)
        return call

    async def _serve(self, call: Call, admission: InferenceAdmission, exchange: TaskRequest, send: Send) -> None:
        """Have a request served whose body is there."""
        exchange.has_body = True
        call.attach(exchange, send)
        exchange.give_up = partial(give_up, call)
        try:
            await self._gateway.serve(call, admission.ending and admission.ending.failed)
            self.outcomes["SERVED"] += 1
        except LucidError as error:
            self._count(error, admission)
            await give_up(call, error)
        finally:
            self._charge(call)

    async def _cut(self, exchange: TaskRequest, admission: InferenceAdmission, scope: Scope, send: Send) -> None:
        """End a request that was cut from our side: the task goes on, the client is told if it can be."""
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        cut = exchange.cut or CutReason.SHUTDOWN
        self._count(cut, admission)
        errors: dict[CutReason, LucidError] = {
            CutReason.KEY_REVOKED: _key_revoked(),
            CutReason.BODY_TOO_SLOW: body_too_slow(),
        }
        if (error := errors.get(cut)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    if exchange.give_up is None:
                        await send_response(send, refusal(error, admission.names))
                    else:
                        await exchange.give_up(error)
            return
        if exchange.has_begun:
            _abort(scope)

    async def _break_off(
        self, exchange: TaskRequest, admission: InferenceAdmission, scope: Scope, error: Exception
    ) -> None:
        """End a response that had begun when we failed: a stream by an event, any other by its connection."""
        job = exchange.job
        told = log_unexpected(admission.method, admission.path, error, job.id if job else None)
        self._count(told, admission)
        try:
            if job is not None and job.is_stream and exchange.give_up is not None:
                await exchange.give_up(told)
                return
        except Exception:  # noqa: BLE001 - whatever it is, the connection is all that is left to be ended
            _log.exception("%s could not be told that it broke off", admission.path)
        _abort(scope)

    # --- the fast path

    def accept(
        self, client: FastPathClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> ExpressExchange | None:
        """Send a request to a node, refuse it, or pass it on, with what was found, to be served in a task.

        Passed on is what asks for a stream or has to wait for anything else than the answer of its node. Requests that
        are traced are too: spans take more time than the fast path saves.
        """
        if self._is_full and HOP not in headers:  # as `admit` would refuse it, and just then it has to be cheap
            client.answer(*self._refuse_at_once(headers))
            return None
        exchange = ExpressExchange(self._gateway.tools, self._end)
        admission = InferenceAdmission(path.decode(), headers, body)
        admission.exchange = exchange
        self._learn_server(client.server)
        now = self._clock.now()
        try:
            call = None if self._tracer is not None else self.admit(admission, now)
            ready = self._gateway.find_ready(call, now) if isinstance(call, Call) else None
        except Exception as error:  # noqa: BLE001 - answered in our shape, as in a task
            self._release(admission)
            client.answer(*self._refuse(admission, error))
            return None
        if ready is None or not isinstance(call, Call):
            self._release(admission)
            client.pass_on(admission)
            return None
        self.express += 1
        self._watch(call.principal, exchange)
        self._waiting[exchange] = client, admission
        exchange.start(call, ready, now)
        return exchange

    def close(self) -> None:
        """End what still runs on the fast path, because the service stops."""
        for exchange in [*self._waiting]:
            exchange.end(CutReason.SHUTDOWN)

    def _refuse_at_once(self, headers: dict[bytes, bytes]) -> Response:
        """Count a request that is one too many; return its response, nearly all of which is ready."""
        status, ours, body = self._overloaded
        self.outcomes[Overloaded.code] += 1
        self._refusals.note(Overloaded.code.lower())
        return status, [*ours, (b"x-request-id", request_id_of(headers).encode())], body

    def _end(self, exchange: ExpressExchange, ending: Ending) -> None:
        """Do what is due when an exchange of the fast path ended."""
        call = exchange.call
        client, admission = self._waiting.pop(exchange)
        self._release(admission)
        if isinstance(ending, HandedOver):
            admission.ending = ending
            client.pass_on(admission)
            return
        self._charge(call)
        if isinstance(ending, NodeResponse) and ending.body:
            self.outcomes["SERVED"] += 1
            headers = call.answer_headers(JSON, exchange.node_id, 1, len(ending.body))
            client.answer(ending.status, headers, ending.body)
        elif isinstance(ending, CutReason) and ending is not CutReason.KEY_REVOKED:
            self.outcomes[ending.upper()] += 1
            client.hang_up()
        else:
            error = _error_of(ending, admission)
            self.outcomes[error.code] += 1
            client.answer(*_refusal_of(call, error))


def _session_of(headers: dict[bytes, bytes], request: InferenceRequest, principal: Principal) -> str | None:
    """Return the session that a request belongs to, apart from those of other owners; None when it names none."""
    session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or request.session
    return session and f"{principal.owner} {session}"


def refusal(error: LucidError, headers: Headers) -> Response:
    """Return the response that refuses a request; `headers` are added to the error's own."""
    body = openai_bytes(error)
    ours = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
    basic = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return error.http_status, [*basic, *ours, *headers], body


async def send_response(send: Send, response: Response) -> None:
    """Send a complete response."""
    status, headers, body = response
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def give_up(call: Call, error: LucidError) -> None:
    """Return a call with an error; a stream that has begun is ended by it."""
    if call.span is not None:
        call.span.end(error.code)
    if call.has_begun:
        await call.write(error_event(call.request.endpoint, openai_body(error)), more=False)
    else:
        await send_response(call.send, _refusal_of(call, error))


def _refusal_of(call: Call, error: LucidError) -> Response:
    """Return the response to a call that no node served."""
    job = call.exchange.job  # of the last attempt
    tried = (b"x-lucid-attempts", b"%d" % (job.attempt if job else 0))
    return refusal(error, [*call.headers, (b"x-lucid-job", call.job_id.encode()), tried])


def _error_of(ending: Ending, admission: InferenceAdmission) -> LucidError:
    """Return what a client is told of an ending that is neither an answer nor a node's failure."""
    if isinstance(ending, NodeResponse) and ending.refusal is not None:
        return ending.refusal
    if isinstance(ending, Exception):
        return log_unexpected("POST", admission.path, ending, admission.job_id)
    return _key_revoked()


def _overloaded() -> Overloaded:
    message = "As many requests as this service takes are running. Send it again after Retry-After seconds."
    return Overloaded(message, retry_after_seconds=1)


def _key_revoked() -> Unauthorized:
    return Unauthorized("The key was revoked while the request ran.")


def _abort(scope: Scope) -> None:
    if (abort := scope.get("extensions", {}).get("lucid.abort")) is not None:
        abort()


def name_request(headers: dict[bytes, bytes]) -> tuple[str, Headers]:
    """Return a new job's id, and the header that names the request to its client: by its own name, or by the job's."""
    job_id = new_job_id()
    sent = headers.get(b"x-request-id")
    is_fit = sent is not None and REQUEST_ID.fullmatch(sent)
    return job_id, [(b"x-request-id", sent if sent and is_fit else job_id.encode())]


def session_of(headers: dict[bytes, bytes], request: InferenceRequest, principal: Principal) -> str | None:
    """Return the session that a request belongs to, apart from those of other owners; None when it names none."""
    session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or request.session
    return session and f"{principal.owner} {session}"
