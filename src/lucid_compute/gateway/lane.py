"""`POST /v1/…`: how a request is admitted, and how it ends. The connection calls it without FastAPI and ASGI.

Forwarding through FastAPI takes three times as long as the gateway itself (docs/adr/0009-own-http-client.md). A request
is served in callbacks; a task runs only while something is awaited (docs/adr/0013-express-lane.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import datetime
from functools import partial

from lucid_compute.accounting.refusals import NO_MODEL, NOBODY, RefusalRecorder
from lucid_compute.errors import (
    InvalidRequest,
    LucidError,
    MethodNotAllowed,
    Overloaded,
    RefusedByNode,
    RoutingLoop,
    Unauthorized,
)
from lucid_compute.gateway.endpoints import PATHS
from lucid_compute.gateway.event_stream import error_event
from lucid_compute.gateway.form_body import read_form
from lucid_compute.gateway.gateway import Gateway, ServedRequest
from lucid_compute.gateway.request import GatewayRequest, new_job_id
from lucid_compute.gateway.request_body import PARSED_BYTES, InferenceRequest, model_named_in, read_in_steps
from lucid_compute.gateway.tracing import Span, begin_request, end_request
from lucid_compute.gateway.upstreams import HOP_HEADER
from lucid_compute.gateway.watchdog import Watchdog
from lucid_compute.registry.domain.identity import Principal, Scope
from lucid_compute.registry.domain.key_limits import require_model
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.keys.authentication import Authenticator
from lucid_compute.registry.keys.budgets import KeyBudgets
from lucid_compute.registry.keys.key_rates import KeyRates, rate_limit_headers
from lucid_compute.web.bodies import Body, BodyRoom, ClientLeft, body_too_slow
from lucid_compute.web.errors import headers_of, inference_body, inference_bytes, log_unexpected, stopping
from lucid_compute.web.lanes import CutReason, Headers, IncomingRequest, LaneClient, Response, Wait
from lucid_compute.web.request_guard import REQUEST_ID, request_id_of

SESSION_HEADER = b"x-lucid-session"
MAX_SESSION_BYTES = 256
OK = 200
ALLOWED_SCOPES = (Scope.INFERENCE_RUN, Scope.ADMIN)
HOP = HOP_HEADER.encode()


class InferenceCall(ServedRequest):
    """One call of an endpoint, with what is known of it so far.

    - `is_running`: it is counted in `running_count`.
    - `response_headers`: part of every response; None until the key is known to have the scope.
    - `is_charged`: it is subtracted from its key's allowance. `holds_place`: it is one of the key's requests at once.
    - `inference`: the parsed body. `model_id`: the model that it seems to name. `request`: set once it is admitted.
    - `held`: what its body takes of the memory for bodies, if it was read here.
    """

    is_running = False
    is_charged = False
    holds_place = False
    response_headers: Headers | None = None
    job_id = ""
    span: Span | None = None
    inference: InferenceRequest | None = None
    request: GatewayRequest | None = None
    held: Body | None = None

    def __init__(self, lane: InferenceLane, client: LaneClient, request: IncomingRequest, started_at: float) -> None:
        super().__init__(client, request, started_at)
        self.has_body = self.body is not None
        self.model_id = NO_MODEL
        self._lane = lane

    @property
    def identifying_headers(self) -> Headers:
        """The headers that identify the request to its client; the first is `X-Request-Id`."""
        return self.response_headers or [(b"x-request-id", request_id_of(self.headers).encode())]

    def step(self) -> Wait | None:
        """Admit the request and send it to a node; return what must be awaited first.

        Raises:
            LucidError: the request is refused, or its attempts have failed.
        """
        return self._lane.step(self)

    def succeed(self, response: Response | bytes) -> None:
        """End the request with the response of a node, or with the last part of one that has begun."""
        self._lane.succeed(self, response)

    def refuse(self, error: Exception) -> None:
        """End the request with an error."""
        self._lane.refuse(self, error)

    def cut(self, reason: CutReason) -> None:
        """End the request before its response is complete."""
        self._lane.cut(self, reason)

    def go_on(self) -> None:
        """Continue to pass a stream on: the client has read what was written."""
        self.sending_since = 0.0
        if self.exchange is not None:
            self.exchange.go_on()


AwaitStep = Callable[[InferenceCall], Awaitable[None]]
"""What must be awaited before a request can be admitted."""


class InferenceLane:
    """Serves inference requests for one replica.

    `running_count` counts requests that run, `outcomes` how requests ended (each ends once), `express` those that were
    sent to a node without a task.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        feed: ChangeFeed,
        rates: KeyRates,
        gateway: Gateway,
        *,
        budgets: KeyBudgets,
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
        self._budgets = budgets
        self._gateway = gateway
        self._watched = watchdog.requests
        self._refusals = refusals
        self._max_running = max_running
        self._max_body_bytes = max_body_bytes
        self._room = room
        context = gateway.context
        self._fleet, self._clock, self._monotonic = context.fleet, context.clock, context.monotonic
        self._ledger, self._tracer, self._time_ns = context.ledger, context.tracer, context.time_ns
        self._overloaded = {path: _refusal(_overloaded(), [], path) for path in PATHS}
        self.running_count = self.express = 0
        self.outcomes: Counter[str] = Counter()

    def accept(self, client: LaneClient, request: IncomingRequest) -> InferenceCall | None:
        """Serve a request. Return it while it waits; None when it was answered already."""
        headers = request.headers
        if self._is_full and request.method == "POST" and HOP not in headers:
            client.answer(*self._refuse_at_once(request))  # `admit` would refuse it too, but this is cheaper
            return None
        self._learn_server(client.server)
        call = InferenceCall(self, client, request, self._monotonic())
        call.advance()
        if call.is_over:
            return None
        self.express += call.exchange is not None and not call.is_waiting
        self._watched.add(call)
        return call

    def close(self) -> None:
        """End the requests that still run, because the service stops."""
        for call in [*self._watched]:
            call.end(CutReason.SHUTDOWN)

    def step(self, call: InferenceCall) -> Wait | None:
        """Admit a request and send it to a node; return what must be awaited first.

        Raises:
            LucidError: the request is refused, or its attempts have failed.
        """
        request, now = call.request, self._clock.now()
        if request is None:
            admitted = self.admit(call, now)
            if not isinstance(admitted, GatewayRequest):
                return partial(admitted, call)
            request = admitted
        return self._gateway.serve(call, request, now)

    # --- admission

    def admit(self, admission: InferenceCall, now: datetime) -> GatewayRequest | AwaitStep:
        """Return the admitted request, or what must be awaited before `admit` is called again.

        A repeated call does no step twice.

        Raises:
            LucidError: the request is refused.
        """
        if not admission.is_running:
            self._begin(admission)
        principal = admission.principal or self._authenticator.find_known(admission.authorization, now)
        if principal is None:
            return self._authenticator.await_key
        admission.principal = principal
        headers = admission.response_headers or self._identify(admission, principal)
        if (wait := self._spend(admission, principal, headers, now)) is not None:
            return wait
        inference = admission.inference or self._parse(admission)
        if not isinstance(inference, InferenceRequest):
            return inference
        return self._enter(admission, principal, inference, headers)

    def _enter(
        self, admission: InferenceCall, principal: Principal, inference: InferenceRequest, headers: Headers
    ) -> GatewayRequest | AwaitStep:
        """Return the request, if its key may use the model now; else what must be awaited first.

        Raises:
            ModelNotAllowed: the key may use other models only.
            RateLimited: as many requests of the key run as may run at once.
        """
        model = self._fleet.find_model(inference.model)
        if model is None:
            return self._await_model
        admission.model_id = model.id
        if principal.limits is not None:
            require_model(principal.limits, inference.model, (model.id, *model.known_as))
            admission.holds_place = admission.holds_place or self._rates.begin(principal)
            if not admission.holds_place:
                return self._await_place
        self._gateway.count_request(principal.key_id)
        request = admission.request = GatewayRequest(principal, inference, model, admission)
        request.span = admission.span
        request.identify(admission.job_id, _session_of(admission.headers, inference, principal), headers)
        if model.route is not None:
            self._gateway.follow_route(request)
        return request

    def _begin(self, admission: InferenceCall) -> None:
        """Count the request as running, unless it is one too many."""
        if admission.method != "POST":
            raise MethodNotAllowed(admission.method, ["POST"])
        hop = admission.headers.get(HOP)
        if hop is not None and self._feed.knows_replica(hop.decode("latin-1")):
            raise RoutingLoop([])
        if self._is_full:
            raise _overloaded()
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

    def _identify(self, admission: InferenceCall, principal: Principal) -> Headers:
        """Set the request's id and the headers of every response.

        Raises:
            Forbidden: the key lacks the scope.
        """
        principal.require(ALLOWED_SCOPES)
        admission.key_id = principal.key_id
        if self._tracer is not None:
            endpoint = PATHS[admission.path]
            admission.span = begin_request(self._tracer, endpoint, admission.headers)
        admission.job_id = new_job_id(self._time_ns())
        sent = admission.headers.get(b"x-request-id")
        is_fit = sent is not None and REQUEST_ID.fullmatch(sent)
        headers = [(b"x-request-id", sent if sent and is_fit else admission.job_id.encode())]
        admission.response_headers = headers
        return headers

    def _spend(
        self, admission: InferenceCall, principal: Principal, headers: Headers, now: datetime
    ) -> AwaitStep | None:
        """Subtract the request from its key's allowance, once; return what must be awaited first.

        Raises:
            RateLimited: the allowance is used up, or the key's budget is spent.
        """
        if admission.is_charged or principal.limits is None:
            return None
        if not self._budgets.admit(principal, now):
            return self._await_budget
        must_wait = False
        try:
            must_wait = not self._rates.spend(principal)
        finally:
            if not must_wait:
                headers += rate_limit_headers(self._rates.allowances(principal))
        admission.is_charged = not must_wait
        return self._await_allowance if must_wait else None

    def _parse(self, admission: InferenceCall) -> InferenceRequest | AwaitStep:
        """Return the parsed body, or what must be awaited first.

        Raises:
            InvalidRequest: the body is not a valid request.
        """
        if admission.body is None or len(admission.body) > PARSED_BYTES or PATHS[admission.path].is_form:
            return self._await_body if admission.body is None else self._await_reading
        inference = admission.inference = self._read(admission, admission.body)
        admission.body = None
        return inference

    def _read(self, admission: InferenceCall, body: bytes) -> InferenceRequest:
        """Return the parsed body; if that fails, find the model it names, so that its owner sees the refusal.

        Raises:
            InvalidRequest: the body is not a valid request.
        """
        try:
            return InferenceRequest(PATHS[admission.path], body)
        except InvalidRequest:
            self._find_named_model(admission, body)
            raise

    def _find_named_model(self, admission: InferenceCall, body: bytes) -> None:
        if (model := self._fleet.find_model(model_named_in(body))) is not None:
            admission.model_id = model.id

    async def _await_reading(self, admission: InferenceCall) -> None:
        """Parse a large body or a form in steps, between which other requests are served."""
        body, endpoint = admission.body or b"", PATHS[admission.path]
        try:
            if endpoint.is_form:
                admission.inference = await read_form(endpoint, body, admission.headers.get(b"content-type", b""))
            else:
                admission.inference = await read_in_steps(endpoint, body)
        except InvalidRequest:
            self._find_named_model(admission, body)
            raise
        admission.body = None

    async def _await_allowance(self, admission: InferenceCall) -> None:
        """Wait until the replicas have shared the limits of the key."""
        if admission.principal is not None:
            await self._rates.ask(admission.principal)

    async def _await_budget(self, admission: InferenceCall) -> None:
        """Wait until it is known what the key has spent."""
        if admission.principal is not None:
            await self._budgets.ask(admission.principal, self._clock.now())

    async def _await_place(self, admission: InferenceCall) -> None:
        """Wait a moment for a place of the key that another replica returns."""
        if admission.principal is not None:
            await self._rates.wait(admission.principal)
            admission.holds_place = True

    async def _await_body(self, admission: InferenceCall) -> None:
        if admission.receive is None:
            raise ClientLeft
        takes_form = PATHS[admission.path].is_form
        admission.held = Body(self._room, admission.headers, self._max_body_bytes, takes_form=takes_form)
        admission.body = await admission.held.read_undisturbed(admission.receive)
        admission.has_body = True

    async def _await_model(self, admission: InferenceCall) -> None:
        """Wait for the feed: another replica may have just registered the model."""
        await self._feed.catch_up()
        if admission.inference is not None:
            self._fleet.get_model(admission.inference.model)

    # --- the end of a request

    def succeed(self, call: InferenceCall, response: Response | bytes) -> None:
        """End a request with the response of a node, or with the last part of one that has begun."""
        if call.request is not None:
            self._gateway.record_served(call.request)
        self.outcomes["SERVED"] += 1
        self._close(call, status=OK if isinstance(response, bytes) else response[0])
        if isinstance(response, bytes):
            call.client.write(response, more=False)
        else:
            call.client.answer(*response)

    def refuse(self, call: InferenceCall, error: Exception) -> None:
        """End a request with an error."""
        if not isinstance(error, LucidError):
            id_ = call.job_id or call.identifying_headers[0][1].decode()
            error = log_unexpected(call.method, call.path, error, id_)
        if call.exchange is not None:
            call.exchange.abandon()
        self._count(error, call)
        self._respond(call, error, error.code)

    def cut(self, call: InferenceCall, reason: CutReason) -> None:
        """End a request before its response is complete, with an error if its client can read one."""
        if call.exchange is not None:
            call.exchange.cut(reason)
        self._count(reason, call)
        errors: dict[CutReason, LucidError] = {
            CutReason.KEY_REVOKED: _key_revoked(),
            CutReason.BODY_TOO_SLOW: body_too_slow(),
            CutReason.SHUTDOWN: stopping(),
        }
        self._respond(call, errors.get(reason), reason)

    def _respond(self, call: InferenceCall, error: LucidError | None, outcome: str) -> None:
        """Send an error: a response, or an event if a stream has begun. None closes the connection."""
        request, has_begun, identifying = call.request, call.has_begun, call.identifying_headers
        self._close(call, outcome, status=OK if has_begun else 0 if error is None else error.http_status)
        if error is None:
            call.client.hang_up()
        elif request is None:
            call.client.answer(*_refusal(error, identifying, call.path))
        elif has_begun:
            call.client.write(error_event(request.inference.endpoint, inference_body(error, call.path)), more=False)
        else:
            call.client.answer(*_refusal_of(request, error))

    def _close(self, call: InferenceCall, outcome: str | None = None, *, status: int) -> None:
        """Stop counting and watching a request, and break the cycles that only garbage collection would free."""
        call.is_over = True
        self._watched.discard(call)
        if call.is_running:
            self.running_count -= 1
        if call.holds_place and call.principal is not None:
            self._rates.end(call.principal)
        if call.held is not None:
            call.held.release()
        if call.choice is not None:  # one that has ended does not change
            call.choice.end(outcome)
        if call.span is not None:
            asked = None if call.inference is None else call.inference.model
            end_request(call.span, status, outcome, asked=asked, job=call.job)
        request = call.request
        if self._gateway.queue is not None:
            self._gateway.leave_queue(call)
            self._gateway.queue.give_turn(NO_MODEL if request is None else request.model.id)
        if request is not None and request.principal.limits is not None:
            self._rates.charge_tokens(request.principal, request.tokens)
        call.request = call.exchange = None

    def _count(self, ended: LucidError | CutReason, call: InferenceCall) -> None:
        """Count how a request ended that was not served, and record it as refused if the ledger has no attempt of it.

        A request that a node sent back to this service is not recorded: it is part of the one that was sent there.
        """
        outcome, cause = (ended.upper(), ended) if isinstance(ended, CutReason) else (ended.code, ended.cause)
        self.outcomes[outcome] += 1
        if call.job is None and not isinstance(ended, RoutingLoop):
            owner = NOBODY if call.principal is None else call.principal.owner
            self._refusals.count(cause, owner, call.model_id)

    def _refuse_at_once(self, request: IncomingRequest) -> Response:
        """Count a request that is one too many; return its response, which is nearly all prepared."""
        status, ours, body = self._overloaded[request.path]
        self.outcomes[Overloaded.code] += 1
        self._refusals.count(Overloaded.code.lower())
        return status, [*ours, (b"x-request-id", request_id_of(request.headers).encode())], body


def _session_of(headers: dict[bytes, bytes], inference: InferenceRequest, principal: Principal) -> str | None:
    """Return the request's session, separate for each owner; None when it names none."""
    session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or inference.session
    return session and f"{principal.owner} {session}"


def _refusal(error: LucidError, headers: Headers, path: str) -> Response:
    """Return the response that refuses a request at `path`; `headers` are added to the error's own."""
    body = error.response if isinstance(error, RefusedByNode) else inference_bytes(error, path)
    ours = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
    basic = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    return error.http_status, [*basic, *ours, *headers], body


def _refusal_of(request: GatewayRequest, error: LucidError) -> Response:
    """Return the response to a request that no node served."""
    job = request.running.job  # of the last attempt
    attempts = (b"x-lucid-attempts", b"%d" % (job.attempt if job else 0))
    return _refusal(
        error, [*request.headers, (b"x-lucid-job", request.job_id.encode()), attempts], request.running.path
    )


def _overloaded() -> Overloaded:
    """Return the error of a request that is one too many."""
    message = "As many requests as this service takes are running. Send it again in 1 s."
    return Overloaded(message, retry_after_seconds=1)


def _key_revoked() -> Unauthorized:
    """Return the error of a request whose key ended while it ran."""
    return Unauthorized("The key was revoked while the request ran.")
