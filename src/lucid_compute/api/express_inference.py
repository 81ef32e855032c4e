"""The express lane of `POST /v1/…`: requests for a whole answer that can be sent to a node at once, without a task.

It takes only what is in order in every respect. The ordinary lane takes the rest: it finds out again what is wrong and
says so, or goes on where this one got stuck. Only what is refused because too much runs is refused here too: just then
it has to be cheap.
"""

from __future__ import annotations

from datetime import datetime

from lucid_compute.api.error_responses import log_unexpected
from lucid_compute.api.express_client import ExpressClient, Refusal
from lucid_compute.api.inference_lane import (
    ALLOWED_SCOPES,
    ENDPOINTS,
    HOP,
    InferenceLane,
    name_request,
    session_of,
)
from lucid_compute.api.inference_refusals import overloaded, refusal
from lucid_compute.api.request_guard import request_id_of
from lucid_compute.api.service import Service
from lucid_compute.errors import LucidError, Overloaded, RateLimited, Unauthorized
from lucid_compute.inference.attempt import JSON, Answer
from lucid_compute.inference.call import Call
from lucid_compute.inference.exchange import CutReason
from lucid_compute.inference.express import Ending, ExpressExchange, HandedOver
from lucid_compute.inference.request_body import InferenceRequest

_OVERLOADED = overloaded().cause
_ENDPOINTS = {path.encode(): endpoint for path, endpoint in ENDPOINTS.items()}


class ExpressInference:
    """Serves inference requests for one replica, in the ordinary lane's name."""

    def __init__(self, service: Service, lane: InferenceLane) -> None:
        """Serve none yet."""
        self._service = service
        self._lane = lane
        self._is_traced = service.gateway.tools.tracer is not None  # spans take more time than this lane saves
        self._waiting: dict[ExpressExchange, ExpressClient] = {}
        self._overloaded = refusal(overloaded(), [])

    def take(
        self, client: ExpressClient, path: bytes, headers: dict[bytes, bytes], body: bytes
    ) -> ExpressExchange | Refusal | None:
        """Serve a request, which is to be ended if its client leaves; or answer what it is refused with.

        None when it is one for the ordinary lane.
        """
        endpoint = _ENDPOINTS.get(path)
        if endpoint is None or HOP in headers:
            return None
        if self._lane.is_full:
            return self._refuse_at_once(headers)
        if self._is_traced:
            return None
        now = self._service.clock.now()
        try:
            begun = self._read(endpoint, headers, body, now)
        except LucidError:
            return None
        if begun is None or not self._send(*begun, client, now):
            return None
        return begun[1]

    def close(self) -> None:
        """End what still runs, because the service stops."""
        for exchange in [*self._waiting]:
            exchange.end(CutReason.SHUTDOWN)

    def _refuse_at_once(self, headers: dict[bytes, bytes]) -> Refusal:
        """Answer what a request is refused with when as many run as may, and count it."""
        status, ours, body = self._overloaded
        self._lane.outcomes[Overloaded.code] += 1
        self._service.refusals.note(_OVERLOADED)
        return status, [*ours, (b"x-request-id", request_id_of(headers).encode())], body

    def _read(
        self, endpoint: str, headers: dict[bytes, bytes], body: bytes, now: datetime
    ) -> tuple[Call, ExpressExchange] | None:
        """Answer what is asked for; None when it is a stream, or a model that is not known here.

        Raises:
            LucidError: it is refused.
        """
        service = self._service
        principal = service.authenticator.authenticate_known(headers, now)
        principal.require(ALLOWED_SCOPES)
        request = InferenceRequest(endpoint, body)
        if request.is_stream or (model := service.fleet.find_model(request.model)) is None:
            return None
        exchange = ExpressExchange(service.gateway.tools, principal.key_id, self._end)
        call = Call(principal, request, model, exchange)
        job_id, answer_headers = name_request(headers)
        call.identify(job_id, session_of(headers, request, principal), answer_headers)
        return call, exchange

    def _send(self, call: Call, exchange: ExpressExchange, client: ExpressClient, now: datetime) -> bool:
        """Send the request to a node; whether there was one that it could be sent to at once."""
        service, lane = self._service, self._lane
        lane.learn_server(client.server)
        ready = service.gateway.find_ready(call, now)
        if ready is None:
            return False
        if call.principal.limits is not None:
            try:
                lane.spend(call.principal, call.headers)
            except RateLimited:
                service.gateway.tools.client.give_back(ready.target.url, ready.connection)
                return False
        service.gateway.note_request()
        lane.running += 1
        lane.express += 1
        service.watchdog.exchanges.add(exchange)
        self._waiting[exchange] = client
        exchange.start(call, ready, now)
        return True

    def _end(self, exchange: ExpressExchange, ending: Ending) -> None:
        """Do what is due when an exchange ended."""
        lane, call = self._lane, exchange.call
        lane.running -= 1
        self._service.watchdog.exchanges.discard(exchange)
        client = self._waiting.pop(exchange)
        lane.charge(call)
        if isinstance(ending, Answer) and ending.body:
            lane.outcomes["SERVED"] += 1
            headers = call.answer_headers(JSON, exchange.node_id, 1, len(ending.body))
            client.answer(ending.status, headers, ending.body)
        elif isinstance(ending, HandedOver):
            client.go_on(ending)
        elif isinstance(ending, CutReason) and ending is not CutReason.KEY_REVOKED:
            lane.outcomes[ending.upper()] += 1
            client.hang_up()
        else:
            self._refuse(client, call, _error_of(ending, call))

    def _refuse(self, client: ExpressClient, call: Call, error: LucidError) -> None:
        self._lane.outcomes[error.code] += 1
        named = [(b"x-lucid-job", call.job_id.encode()), (b"x-lucid-attempts", b"1")]
        client.answer(*refusal(error, [*call.headers, *named]))


def _error_of(ending: Ending, call: Call) -> LucidError:
    """Answer what a client is told of an ending that is neither an answer nor a node's failure."""
    if isinstance(ending, Answer) and ending.refusal is not None:
        return ending.refusal
    if isinstance(ending, Exception):
        return log_unexpected("POST", f"/v1/{call.request.endpoint}", ending, call.job_id)
    return Unauthorized("The key was revoked while the request ran.")
