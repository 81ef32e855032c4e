"""The fast lane of `POST /v1/…`: plain ASGI beside FastAPI, from a client's bytes to the gateway and back.

Forwarding through the framework costs three times what the gateway itself does (docs/adr/0009-own-http-client.md).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from functools import partial

from starlette.types import Receive, Scope, Send

from lucid_compute.api.error_responses import answer_unexpected, headers_of
from lucid_compute.api.openai_errors import openai_body, openai_bytes, rate_limit_headers
from lucid_compute.api.request_guard import (
    REQUEST_ID,
    ClientLeft,
    body_too_slow,
    read_body_undisturbed,
    request_id_of,
)
from lucid_compute.api.service import Service
from lucid_compute.errors import LucidError, MethodNotAllowed, Overloaded, Unauthorized
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.inference.call import Call, Headers, new_job_id
from lucid_compute.inference.event_stream import error_event
from lucid_compute.inference.exchange import CutReason, Exchange
from lucid_compute.inference.request_body import InferenceRequest
from lucid_compute.inference.targets import HOP_HEADER
from lucid_compute.passports import ModelPassport
from lucid_compute.routing_errors import RoutingLoop
from lucid_compute.wire.keys import Scope as KeyScope

ENDPOINTS = {f"/v1/{name}": name for name in ("chat/completions", "completions", "embeddings", "responses")}
MAX_BODY_BYTES = 10 * 1024 * 1024
SESSION_HEADER = b"x-lucid-session"
MAX_SESSION_BYTES = 256
LAST_WORD_SECONDS = 1.0
_ALLOWED = (KeyScope.INFERENCE_RUN, KeyScope.ADMIN)
_HOP = HOP_HEADER.encode()


class InferenceLane:
    """Serves inference requests for one replica. `running` counts those under way, `outcomes` how they ended."""

    def __init__(self, service: Service) -> None:
        """Serve none yet."""
        self._service = service
        self._most = service.settings.inference_max_concurrency
        self._servers: set[tuple[str, int]] = set()
        self.running = 0
        self.outcomes: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        self.running += 1
        try:
            await self._admit(scope, receive, send)
        except ClientLeft:
            self.outcomes["CLIENT_LEFT"] += 1
        except LucidError as error:
            await self._refuse(send, error, [_name(scope)])
        except Exception as error:  # noqa: BLE001 - answered in our shape, as FastAPI's routes answer theirs
            self.outcomes["INTERNAL"] += 1
            name, request_id = _name(scope)
            refusal = answer_unexpected(scope["method"], scope["path"], error, request_id.decode())
            refusal.raw_headers.append((name, request_id))
            await refusal(scope, receive, send)
        finally:
            self.running -= 1

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Find out who asks for what, refusing as early as can be, and serve it."""
        if scope["method"] != "POST":
            raise MethodNotAllowed(f"{scope['method']} is not a method of this path; it takes POST.")
        headers = dict(scope["headers"])
        self._refuse_loop(headers)
        if self.running > self._most or not self._service.jobs.has_room():
            message = "As many requests as this service takes are running. Send it again after Retry-After seconds."
            raise Overloaded(message, retry_after_seconds=1)
        if scope.get("server") not in self._servers:
            self._learn_server(scope)
        principal = await self._service.authenticator.authenticate_scope(scope, headers)
        principal.require(_ALLOWED)
        exchange = Exchange(principal.key_id, receive)
        exchanges = self._service.watchdog.exchanges
        exchanges.add(exchange)
        try:
            await self._converse(scope, headers, principal, exchange, send)
        except asyncio.CancelledError:
            if exchange.cut is None:
                raise
            await self._cut(exchange, scope, send)
        finally:
            exchanges.discard(exchange)
            exchange.close()

    async def _converse(
        self, scope: Scope, headers: dict[bytes, bytes], principal: Principal, exchange: Exchange, send: Send
    ) -> None:
        """Read what is asked for, and have it served."""
        service = self._service
        job_id = new_job_id()
        request_id = headers.get(b"x-request-id")
        is_fit = request_id is not None and REQUEST_ID.fullmatch(request_id)
        answer_headers: Headers = [(b"x-request-id", request_id if request_id and is_fit else job_id.encode())]
        try:
            if principal.limits is not None:
                self._spend(principal, answer_headers)
            body = await read_body_undisturbed(exchange.receive, headers, MAX_BODY_BYTES)
            exchange.has_body = True
            request = InferenceRequest(ENDPOINTS[scope["path"]], body)
            model = service.fleet.find_model(request.model) or await self._catch_up(request.model)
        except LucidError as error:
            await self._refuse(send, error, answer_headers)
            return
        session = headers.get(SESSION_HEADER, b"")[:MAX_SESSION_BYTES].decode("latin-1") or request.session
        call = Call(principal, request, model, exchange, send)
        call.identify(job_id, session and f"{principal.owner} {session}", answer_headers)
        exchange.give_up = partial(self._give_up, call)
        try:
            await service.gateway.serve(call)
            self.outcomes["SERVED"] += 1
        except LucidError as error:
            await self._give_up(call, error)
        finally:
            if principal.limits is not None:
                service.rates.charge_tokens(principal, call.tokens)

    def _spend(self, principal: Principal, headers: Headers) -> None:
        """Take a request off the key's allowance; add the headers that tell what is left, also when nothing is.

        Raises:
            RateLimited: nothing is.
        """
        rates = self._service.rates
        try:
            rates.spend_request(principal)
            rates.require_tokens(principal)
        finally:
            headers += rate_limit_headers(rates.allowances(principal))

    async def _catch_up(self, name: str) -> ModelPassport:
        """Answer a model that another replica may have only just registered.

        Raises:
            ModelNotFound: there is none.
        """
        await self._service.feed.catch_up()
        return self._service.fleet.get_model(name)

    def _refuse_loop(self, headers: dict[bytes, bytes]) -> None:
        hop = headers.get(_HOP)
        if hop is not None and self._service.feed.knows_replica(hop.decode("latin-1")):
            raise RoutingLoop([])

    def _learn_server(self, scope: Scope) -> None:
        """Know an address of our own, so that no request is sent to it."""
        server = scope.get("server")
        if server is not None and server[1] is not None:
            self._servers.add(tuple(server))
            self._service.gateway.own_endpoints.add((server[0], server[1]))

    async def _give_up(self, call: Call, error: LucidError) -> None:
        if not call.has_begun:
            job = call.exchange.job  # of the last attempt
            tried = (b"x-lucid-attempts", b"%d" % (job.attempt if job else 0))
            await self._refuse(call.send, error, [*call.headers, (b"x-lucid-job", call.job_id.encode()), tried])
            return
        self.outcomes[error.code] += 1
        await call.write(error_event(call.request.endpoint, openai_body(error)), more=False)

    async def _cut(self, exchange: Exchange, scope: Scope, send: Send) -> None:
        """End a request that was cut from our side: the task goes on, the client is told if it can be."""
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        cut = exchange.cut
        self.outcomes[str(cut).upper()] += 1
        errors: dict[CutReason | None, LucidError] = {
            CutReason.KEY_REVOKED: Unauthorized("The key was revoked while the request ran."),
            CutReason.BODY_TOO_SLOW: body_too_slow(),
        }
        if (error := errors.get(cut)) is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_WORD_SECONDS):
                    if exchange.give_up is None:
                        await self._refuse(send, error, [_name(scope)])
                    else:
                        await exchange.give_up(error)
            return
        if exchange.has_begun and (abort := scope.get("extensions", {}).get("lucid.abort")) is not None:
            abort()

    async def _refuse(self, send: Send, error: LucidError, headers: Headers) -> None:
        self.outcomes[error.code] += 1
        body = openai_bytes(error)
        ours = [(name.lower().encode(), value.encode()) for name, value in headers_of(error).items()]
        allow = [(b"allow", b"POST")] if isinstance(error, MethodNotAllowed) else []
        basic = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        start = {
            "type": "http.response.start",
            "status": error.http_status,
            "headers": [*basic, *ours, *allow, *headers],
        }
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _name(scope: Scope) -> tuple[bytes, bytes]:
    """Answer the header that names a request which has no job."""
    return b"x-request-id", request_id_of(dict(scope["headers"])).encode()
