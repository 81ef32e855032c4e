"""One HTTP delivery of one event to one webhook, and its outcome. Nothing of the response is passed on.

It goes where requests to nodes go: through `egress`, which checks every address, follows no redirect and reads no body.
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
from lucid_compute.webhooks.rules import check_webhook_url, sign, target_of

ATTEMPT_SECONDS = 10.0
TIMEOUT = "timeout"
_DEADLINES = Deadlines(answer_seconds=ATTEMPT_SECONDS, total_seconds=ATTEMPT_SECONDS)
_DELIVERED = 2  # hundreds


class Deliverer:
    """Delivers events for one replica, each on a connection of its own."""

    def __init__(self, policy: EgressPolicy, clock: DatabaseClock, own_endpoints: set[tuple[str, int]]) -> None:
        """Go where `policy` allows, and never to `own_endpoints`; sign by `clock`."""
        self._policy = policy
        self._clock = clock
        self._client = HttpClient(policy)
        self._client.own_endpoints = own_endpoints

    async def deliver(self, delivery: Delivery) -> DeliveryResult:
        """Send the event and return the outcome, within ten seconds."""
        began = time.monotonic()
        try:
            async with asyncio.timeout(ATTEMPT_SECONDS):
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
        connection = await self._client.connect(url, HeadOnlyConnection)
        try:
            connection.send(self._head(delivery, url, body), body, _DEADLINES, wants_stream=False)
            await connection.receive()
            return connection.status
        finally:
            connection.abort()
            self._client.release(url, connection)

    def _head(self, delivery: Delivery, url: ProviderUrl, body: bytes) -> bytes:
        lines = [
            f"POST {target_of(delivery.url)} HTTP/1.1",
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
