"""Inspects running requests four times a second: does the client read, is its key still valid?

Periodic inspection replaces a timer and a task for each request. Nearly all requests end before it and cost nothing.
"""

from __future__ import annotations

import asyncio
import logging

from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.request import RunningRequest
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.web.lanes import CutReason

INSPECT_EVERY_SECONDS = 0.25
BODY_SECONDS = 30.0
WRITTEN_AFTER_SECONDS = 1.0
KEYS_EVERY_SECONDS = 5.0
CLEAN_EVERY_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Watchdog:
    """Inspects one replica's running requests and its connections to nodes."""

    def __init__(self, keys: KeyRing, context: GatewayContext, *, slow_reader_seconds: float) -> None:
        """`slow_reader_seconds`: how long a client may leave a part of its response unread."""
        self._keys = keys
        self._context = context
        self._slow_reader_seconds = slow_reader_seconds
        self.requests: set[RunningRequest] = set()
        self.lag_seconds = 0.0
        self._keys_due = self._cleaning_due = 0.0

    async def run(self) -> None:
        """Inspect until this task is cancelled, then close the connections to nodes."""
        try:
            while True:
                began = self._context.monotonic()
                await asyncio.sleep(INSPECT_EVERY_SECONDS)
                now = self._context.monotonic()
                self.lag_seconds = now - began - INSPECT_EVERY_SECONDS
                try:
                    self.inspect(now)
                except Exception:  # noqa: BLE001 - an inspection that fails must not be the last
                    _log.exception("a look at the requests under way failed")
        finally:
            self._context.client.close()

    def inspect(self, now: float) -> None:
        """Inspect all requests and connections once."""
        self._context.client.enforce_limits()
        checks_keys = now >= self._keys_due
        if checks_keys:
            self._keys_due = now + KEYS_EVERY_SECONDS
        for request in [*self.requests]:
            self._inspect_request(request, now, checks_key=checks_keys)
        if now >= self._cleaning_due:
            self._cleaning_due = now + CLEAN_EVERY_SECONDS
            self._context.stats.forget_ended()
            self._context.upstreams.forget_ended()

    def _inspect_request(self, request: RunningRequest, now: float, *, checks_key: bool) -> None:
        if not request.has_body and now - request.started_at > BODY_SECONDS:
            request.end(CutReason.BODY_TOO_SLOW)
        elif request.sending_since and now - request.sending_since > self._slow_reader_seconds:
            request.end(CutReason.CLIENT_TOO_SLOW)
        elif checks_key and request.key_id and not self._keys.is_valid(request.key_id, self._context.clock.now()):
            request.end(CutReason.KEY_REVOKED)
        elif request.job is not None and now - request.started_at > WRITTEN_AFTER_SECONDS:
            self._context.ledger.begin(request.job)
