"""The fast lane of `POST /v1/…`: plain ASGI beside FastAPI, from a client's bytes to the gateway and back.

Forwarding through the framework costs three times what the gateway itself does (docs/adr/0009-own-http-client.md).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from contextlib import suppress
from functools import partial

from starlette.types import Receive, Scope

from lucid_compute.api.error_responses import answer_unexpected, log_unexpected
from lucid_compute.api.express_client import HANDED_OVER
from lucid_compute.api.inference_refusals import give_up, overloaded, send_refusal
from lucid_compute.api.openai_errors import rate_limit_headers
from lucid_compute.api.request_guard import (
    REQUEST_ID,
    ClientLeft,
    body_too_slow,
    read_body_undisturbed,
    request_id_of,
)
from lucid_compute.api.service import Service
from lucid_compute.errors import InvalidRequest, LucidError, MethodNotAllowed, Unauthorized
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.inference.call import Call, Headers, Send, new_job_id
from lucid_compute.inference.exchange import CutReason, TaskExchange
from lucid_compute.inference.express import HandedOver
from lucid_compute.inference.request_body import InferenceRequest, model_named_in
from lucid_compute.inference.targets import HOP_HEADER
from lucid_compute.passports import ModelPassport
from lucid_compute.routing_errors import RoutingLoop
from lucid_compute.wire.keys import Scope as KeyScope

ENDPOINTS = {f"/v1/{name}": name for name in ("chat/completions", "completions", "embeddings", "responses")}
MAX_BODY_BYTES = 10 * 1024 * 1024
SESSION_HEADER = b"x-lucid-session"
MAX_SESSION_BYTES = 256
LAST_WORD_SECONDS = 1.0
_log = logging.getLogger(__name__)
ALLOWED_SCOPES = (KeyScope.INFERENCE_RUN, KeyScope.ADMIN)
HOP = HOP_HEADER.encode()


class InferenceLane:
    """Serves inference requests for one replica. `running` counts those under way, `outcomes` how they ended.

    Each ends once. `express` counts those that the express lane began in its name.
    """

    def __init__(self, service: Service) -> None:
        """Serve none yet."""
        self._service = service
        self._most = service.settings.inference_max_concurrency
        self._servers: set[tuple[str, int | None]] = set()
        self.running = self.express = 0
        self.outcomes: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self.running += 1
        exchange = TaskExchange(receive)
        try:
            await self._admit(scope, exchange, send)
        except ClientLeft:
            self._count(CutReason.CLIENT_LEFT, exchange)
        except LucidError as error:
            self._count(error, exchange)
            await send_refusal(send, error, [_name(scope)])
        except Exception as error:  # noqa: BLE001 - answered in our shape, as FastAPI's routes answer theirs
            self._count("internal", exchange)
            name, request_id = _name(scope)
            refusal = answer_unexpected(scope["method"], scope["path"], error, request_id.decode())
            refusal.raw_headers.append((name, request_id))
            await refusal(scope, receive, send)
        finally:
            self.running -= 1

    @property
    def is_full(self) -> bool:
        """Whether one request more would be too many."""
        return self.running >= self._most or not self._service.jobs.has_room()

    async def _admit(self, scope: Scope, exchange: TaskExchange, send: Send) -> None:
        """Find out who asks for what, refusing as early as can be, and serve it."""
        handed_over: HandedOver | None = scope.get("extensions", {}).get(HANDED_OVER)
        headers = dict(scope["headers"])
        if handed_over is not None:
            principal = handed_over.call.principal
        else:
            self._refuse_early(scope, headers)
            principal = await self._service.authenticator.authenticate_scope(scope, headers)
        exchange.key_id, exchange.owner = principal.key_id, principal.owner
        principal.require(ALLOWED_SCOPES)
        exchanges = self._service.watchdog.exchanges
        exchanges.add(exchange)
        tracer = self._service.gateway.tools.tracer
        if tracer is not None:
            exchange.span = tracer.begin(f"POST {scope['path']}", headers)
        try:
            if handed_over is not None:
                await self._serve(handed_over, exchange, send)
            else:
                await self._converse(scope, headers, principal, exchange, send)
        except asyncio.CancelledError:
            if exchange.cut is None:
                raise
            await self._cut(exchange, scope, send)
        except Exception as error:  # a fault of ours: no second head may follow the one that was sent
            if not exchange.has_begun:
                raise
            await self._break_off(exchange, scope, error)
        finally:
            exchanges.discard(exchange)
            exchange.close()
            if exchange.span is not None:
                exchange.span.end(exchange.cut)

    def _refuse_early(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['method']} is not a method of this path; it takes POST.")
        hop = headers.get(HOP)
        if hop is not None and self._service.feed.knows_replica(hop.decode("latin-1")):
            raise RoutingLoop([])
        if self.running > self._most or not self._service.jobs.has_room():
            raise overloaded()
        self.learn_server(scope.get("server"))

    async def _converse(
        self, scope: Scope, headers: dict[bytes, bytes], principal: Principal, exchange: TaskExchange, send: Send
    ) -> None:
        """Read what is asked for, and have it served."""
        service = self._service
        job_id, answer_headers = name_request(headers)
        try:
            if principal.limits is not None:
                self.spend(principal, answer_headers)
            body = await read_body_undisturbed(exchange.receive, headers, MAX_BODY_BYTES)
            request = self._read(scope["path"], body, exchange)
            model = service.fleet.find_model(request.model) or await self._catch_up(request.model)
        except LucidError as error:
            if exchange.span is not None:
                exchange.span.end(error.code)
            self._count(error, exchange)
            await send_refusal(send, error, answer_headers)
            return
        service.gateway.note_request()
        call = Call(principal, request, model, exchange)
        call.span = exchange.span
        call.identify(job_id, session_of(headers, request, principal), answer_headers)
        await self._serve(HandedOver(call, None), exchange, send)

    def _read(self, path: str, body: bytes, exchange: TaskExchange) -> InferenceRequest:
        """Answer what is asked for; if it can't be understood, note of which model, so that its owner can be told.

        Raises:
            InvalidRequest: it can't be understood.
        """
        try:
            return InferenceRequest(ENDPOINTS[path], body)
        except InvalidRequest:
            if (model := self._service.fleet.find_model(model_named_in(body))) is not None:
                exchange.model_id = model.id
            raise

    async def _serve(self, begun: HandedOver, exchange: TaskExchange, send: Send) -> None:
        """Have a request served whose body is there."""
        call, failed = begun
        exchange.has_body = True
        exchange.model_id = call.model.id
        call.attach(exchange, send)
        exchange.give_up = partial(give_up, call)
        try:
            await self._service.gateway.serve(call, failed)
            self.outcomes["SERVED"] += 1
        except LucidError as error:
            self._count(error, exchange)
            await give_up(call, error)
        finally:
            self.charge(call)

    def charge(self, call: Call) -> None:
        """Take what the call has cost off its key's allowance."""
        if call.principal.limits is not None:
            self._service.rates.charge_tokens(call.principal, call.tokens)

    def spend(self, principal: Principal, headers: Headers) -> None:
        """Take a request off the key's allowance; add the headers that tell what is left, also when nothing is.

        Raises:
            RateLimited: nothing is.
        """
        rates = self._service.rates
        try:
            rates.require_tokens(principal)  # first, for it takes nothing off
            rates.spend_request(principal)
        finally:
            headers += rate_limit_headers(rates.allowances(principal))

    async def _catch_up(self, name: str) -> ModelPassport:
        """Answer a model that another replica may have only just registered.

        Raises:
            ModelNotFound: there is none.
        """
        await self._service.feed.catch_up()
        return self._service.fleet.get_model(name)

    def learn_server(self, server: tuple[str, int | None] | None) -> None:
        """Know an address of our own, so that no request is sent to it."""
        if server is not None and server not in self._servers:
            self._servers.add(server)
            if server[1] is not None:
                self._service.gateway.own_endpoints.add((server[0], server[1]))

    def _count(self, ended: LucidError | str, exchange: TaskExchange) -> None:
        """Count how a request ended that was not served, and keep what no attempt in the ledger stands for.

        A request that came back to us by way of a node is part of the one that was sent there, whose attempt failed.
        """
        outcome, cause = (ended.upper(), ended) if isinstance(ended, str) else (ended.code, ended.cause)
        self.outcomes[outcome] += 1
        if exchange.job is None and not isinstance(ended, RoutingLoop):
            self._service.refusals.note(cause, exchange.owner, exchange.model_id)

    async def _cut(self, exchange: TaskExchange, scope: Scope, send: Send) -> None:
        """End a request that was cut from our side: the task goes on, the client is told if it can be."""
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        cut = exchange.cut
        self._count(str(cut), exchange)
        errors: dict[CutReason | None, LucidError] = {
            CutReason.KEY_REVOKED: Unauthorized("The key was revoked while the request ran."),
            CutReason.BODY_TOO_SLOW: body_too_slow(),
        }
        if (error := errors.get(cut)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    if exchange.give_up is None:
                        await send_refusal(send, error, [_name(scope)])
                    else:
                        await exchange.give_up(error)
            return
        if exchange.has_begun:
            _abort(scope)

    async def _break_off(self, exchange: TaskExchange, scope: Scope, error: Exception) -> None:
        """End an answer that had begun when we failed: a stream by an event, any other by its connection."""
        job = exchange.job
        told = log_unexpected(scope["method"], scope["path"], error, job.id if job else None)
        self._count(told, exchange)
        try:
            if job is not None and job.is_stream and exchange.give_up is not None:
                await exchange.give_up(told)
                return
        except Exception:  # noqa: BLE001 - whatever it is, the connection is all that is left to be ended
            _log.exception("%s could not be told that it broke off", scope["path"])
        _abort(scope)


def _abort(scope: Scope) -> None:
    if (abort := scope.get("extensions", {}).get("lucid.abort")) is not None:
        abort()


def name_request(headers: dict[bytes, bytes]) -> tuple[str, Headers]:
    """Answer a new job's id, and the header that names the request to its client: by its own name, or by the job's."""
    job_id = new_job_id()
    sent = headers.get(b"x-request-id")
    is_fit = sent is not None and REQUEST_ID.fullmatch(sent)
    return job_id, [(b"x-request-id", sent if sent and is_fit else job_id.encode())]


def session_of(headers: dict[bytes, bytes], request: InferenceRequest, principal: Principal) -> str | None:
    """Answer the session that a request belongs to, apart from those of other owners; None when it names none."""
    session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or request.session
    return session and f"{principal.owner} {session}"


def _name(scope: Scope) -> tuple[bytes, bytes]:
    """Answer the header that names a request which has no job."""
    return b"x-request-id", request_id_of(dict(scope["headers"])).encode()
