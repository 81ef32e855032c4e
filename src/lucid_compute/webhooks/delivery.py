"""Delivers one event to one webhook over HTTP and returns the outcome, never the response itself.

Deliveries go through `egress`, as requests to nodes do: it checks every address, follows no redirect and reads no body.
"""

from __future__ import annotations

import asyncio
import json
import time

from lucid_compute import __version__
from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines
from lucid_compute.egress.connection_kinds import HeadOnlyConnection
from lucid_compute.egress.faults import EgressFault, FaultKind
from lucid_compute.egress.policy import EgressPolicy, ProviderUrl
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.webhooks.outbox import Delivery, DeliveryResult
from lucid_compute.webhooks.rules import LIMITS, check_webhook_url, request_target, sign

TIMEOUT = "timeout"
_DELIVERED = 2  # hundreds


class Deliverer:
    """Delivers events for one replica, each on a connection of its own."""

    def __init__(
        self,
        policy: EgressPolicy,
        clock: DatabaseClock,
        own_endpoints: set[tuple[str, int]],
        attempt_seconds: float = LIMITS.attempt_seconds,
    ) -> None:
        """Connect to what `policy` allows except `own_endpoints`. An attempt may take `attempt_seconds`."""
        self._policy = policy
        self._clock = clock
        self._attempt_seconds = attempt_seconds
        self._deadlines = Deadlines(answer_seconds=attempt_seconds, total_seconds=attempt_seconds)
        self._client = HttpClient(policy)
        self._client.own_endpoints = own_endpoints

    async def deliver(self, delivery: Delivery) -> DeliveryResult:
        """Send the event once and return the outcome, within the time that an attempt may take."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._attempt_seconds):
                hundreds = await self._send(delivery) // 100
        except EgressFault as fault:
            return DeliveryResult(is_delivered=False, result=fault.reason, milliseconds=_ms_since(began))
        except TimeoutError:
            return DeliveryResult(is_delivered=False, result=TIMEOUT, milliseconds=_ms_since(began))
        return DeliveryResult(hundreds == _DELIVERED, f"{hundreds}xx", _ms_since(began))

    async def _send(self, delivery: Delivery) -> int:
        try:
            url = check_webhook_url(self._policy, delivery.url)
        except ValueError as error:
            raise EgressFault(FaultKind.ADDRESS_REFUSED, str(error)) from None
        body = json.dumps(delivery.event, ensure_ascii=False, separators=(",", ":")).encode()
        connection = await self._client.connect(url, HeadOnlyConnection, owner=f"webhook {delivery.webhook_id}")
        try:
            connection.send(self._head(delivery, url, body), body, self._deadlines, wants_stream=False)
            await connection.receive()
            return connection.status
        finally:
            connection.abort()
            self._client.release(url, connection)

    def _head(self, delivery: Delivery, url: ProviderUrl, body: bytes) -> bytes:
        lines = [
            f"POST {request_target(delivery.url)} HTTP/1.1",
            f"Host: {url.authority}",
            "Content-Type: application/json",
            "Accept-Encoding: identity",
            "Connection: close",
            f"User-Agent: lucid-compute/{__version__}",
            f"Lucid-Event: {delivery.type}",
            f"Lucid-Event-Id: {delivery.event_id}",
            f"Lucid-Signature: {sign(delivery.secrets, body, self._clock.now())}",
        ]
        return "\r\n".join([*lines, ""]).encode()


def _ms_since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)
