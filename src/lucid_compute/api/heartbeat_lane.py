"""The fast lane of `POST /compute/heartbeat`: plain ASGI beside FastAPI, with the same checks and the same answers.

Measured, the framework is the cost of a heartbeat and the commit is not (docs/adr/0003-heartbeat-lane.md). The body is
validated by the Pydantic type that the OpenAPI document shows.
"""

from __future__ import annotations

import random
from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import NamedTuple

from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from lucid_compute.api.dependencies import COMPUTE_WRITERS
from lucid_compute.api.error_responses import answer, answer_method_not_allowed, answer_unexpected
from lucid_compute.api.express_client import HANDED_OVER
from lucid_compute.api.rate_limits import HeartbeatRate
from lucid_compute.api.request_guard import ClientLeft, read_body
from lucid_compute.api.service import Service
from lucid_compute.api.strict_json import read_strictly
from lucid_compute.errors import DatabaseUnavailable, InvalidRequest, LucidError
from lucid_compute.field_faults import faults_from
from lucid_compute.field_types import write_instant
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.node_state import (
    FRESH_WINDOW,
    HEARTBEAT_INTERVAL_SECONDS,
    HEARTBEAT_JITTER,
    LIVE_WINDOW,
    Heartbeat,
    Receipt,
)

PATH = "/compute/heartbeat"
_SHORTEST = HEARTBEAT_INTERVAL_SECONDS * (1 - HEARTBEAT_JITTER)
_SPREAD = HEARTBEAT_INTERVAL_SECONDS * HEARTBEAT_JITTER * 2


class _Instants(NamedTuple):
    """What every answer to one group commit says of time, as it stands in the answer; `live_since` as in NodeState."""

    received_at: datetime
    live_since: datetime
    text: str


class BegunHeartbeat(NamedTuple):
    """One that the express lane had written, and leaves to this one.

    It repeats an older one; or was not taken, as `error` says.
    """

    node: FleetNode
    error: Exception | None


class HeartbeatLane:
    """Answers heartbeats, each after its commit. `express` counts those that the express lane took in its name."""

    def __init__(self, service: Service) -> None:
        """Serve them for one replica."""
        self._service = service
        self.rate = HeartbeatRate(service.settings.heartbeat_max_per_second)
        self._instants: _Instants | None = None
        self.outcomes: Counter[str] = Counter()
        self.express = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one heartbeat; any other method than POST is refused."""
        if scope["method"] != "POST":
            await answer_method_not_allowed(scope["method"], ["POST"])(scope, receive, send)
            return
        headers = dict(scope["headers"])
        try:
            body = await self._receive(scope, headers, receive)
        except LucidError as error:
            self.outcomes[error.code] += 1
            await answer(error)(scope, receive, send)
        except ClientLeft:
            self.outcomes["CLIENT_LEFT"] += 1
        except Exception as error:  # noqa: BLE001 - answered in our shape, as FastAPI's routes answer theirs
            self.outcomes["INTERNAL"] += 1
            await answer_unexpected(scope["method"], PATH, error)(scope, receive, send)
        else:
            self.outcomes["ACCEPTED"] += 1
            length = str(len(body)).encode()
            kind = (b"content-type", b"application/json")
            await send({"type": "http.response.start", "status": 200, "headers": [kind, (b"content-length", length)]})
            await send({"type": "http.response.body", "body": body})

    async def _receive(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        begun: BegunHeartbeat | None = scope.get("extensions", {}).get(HANDED_OVER)
        if begun is not None:
            if begun.error is not None:
                raise begun.error
            return await self._answer_repeated(begun.node)
        principal = await self._service.authenticator.authenticate_scope(scope, headers)
        principal.require(COMPUTE_WRITERS)
        heartbeat = read_heartbeat(await read_body(receive, headers))
        node = self.find(heartbeat.passport_id, principal)
        if node is None:
            node = await self._service.get_registered_node(heartbeat.passport_id, sees=principal.sees)
        principal.require_node(heartbeat.passport_id)
        self.rate.spend(heartbeat.passport_id)
        receipt = await self._service.heartbeats.write(heartbeat)
        return await self._answer_repeated(node) if receipt is None else self.answer(node, receipt)

    async def _answer_repeated(self, node: FleetNode) -> bytes:
        """Answer a heartbeat that repeats an older one, which may be one that another replica has just taken.

        Raises:
            DatabaseUnavailable: it is, and was not caught up with in time.
        """
        await self._service.feed.catch_up()
        if node.state.receipt is None:
            raise DatabaseUnavailable
        return self.answer(node, node.state.receipt)

    def find(self, passport_id: str, principal: Principal) -> FleetNode | None:
        """Answer the caller's node when the fleet holds it and it has not ended, as nearly always."""
        node = self._service.fleet.find_node(passport_id)
        if node is None or node.record.has_ended or principal.sees not in (None, node.record.owner):
            return None
        return node

    def answer(self, node: FleetNode, receipt: Receipt) -> bytes:
        """Answer the node's state: written by hand, since it is the same but for the id within one group commit."""
        state = node.state
        if self._instants is None or self._instants.received_at != receipt.received_at:
            live_since = self._service.fleet.live_since(receipt.received_at)
            self._instants = _write_instants(receipt.received_at, live_since)
        status = state.status(self._instants.live_since).value
        next_in_seconds = round(_SHORTEST + random.random() * _SPREAD, 3)  # noqa: S311 - jitter, not a secret
        drain = "true" if state.draining_since is not None else "false"
        return (
            f'{{"passportId":"{state.id}","status":"{status}",{self._instants.text},'
            f'"nextHeartbeatInSeconds":{next_in_seconds},"drain":{drain}}}'
        ).encode()


def read_heartbeat(body: bytes) -> Heartbeat:
    """Answer the heartbeat that a body holds.

    Raises:
        InvalidRequest: naming every fault.
    """
    try:
        heartbeat = Heartbeat.model_validate_json(body)
    except ValidationError as error:
        heartbeat = _read_again(body, error)
    if body.count(b":") != len(heartbeat.model_fields_set) or b"\\u0000" in body:
        read_strictly(body)  # more keys or colons than fields: perhaps one stands twice
    return heartbeat


def _read_again(body: bytes, error: ValidationError) -> Heartbeat:
    """Answer the heartbeat of a body whose only fault was a whole number written as 3.0.

    Raises:
        InvalidRequest: naming every fault, `error`'s unless the body is not JSON that could be kept.
    """
    value = read_strictly(body)
    with suppress(ValidationError):
        return Heartbeat.model_validate(value)
    raise InvalidRequest(faults_from(error.errors(include_url=False, include_input=False, include_context=False)))


def _write_instants(received_at: datetime, live_since: datetime) -> _Instants:
    fresh_until = write_instant(received_at + FRESH_WINDOW)
    unhealthy_at = write_instant(received_at + LIVE_WINDOW)
    return _Instants(
        received_at,
        live_since,
        f'"receivedAt":"{write_instant(received_at)}","freshUntil":"{fresh_until}","unhealthyAt":"{unhealthy_at}"',
    )
