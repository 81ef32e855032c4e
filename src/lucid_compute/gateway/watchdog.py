"""Requests under way, looked at four times a second: has the client left, does it read, is its key still valid?

Done by looking and not by a timer and a task for each request: nearly all end before the first look, and cost nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time

from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.request import RunningRequest
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.web.lanes import CutReason

LOOK_SECONDS = 0.25
SLOW_READER_SECONDS = 60.0
BODY_SECONDS = 30.0
WRITTEN_AFTER_SECONDS = 1.0
KEYS_EVERY_SECONDS = 5.0
CLEAN_EVERY_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Watchdog:
    """Looks after one replica's requests under way, and after its connections to nodes."""

    def __init__(self, keys: KeyRing, tools: GatewayContext) -> None:
        self._keys = keys
        self._tools = tools
        self.exchanges: set[RunningRequest] = set()
        self.lag_seconds = 0.0
        self._keys_due = self._cleaning_due = 0.0

    async def run(self) -> None:
        """Look, for as long as this task runs."""
        try:
            while True:
                began = time.monotonic()
                await asyncio.sleep(LOOK_SECONDS)
                now = time.monotonic()
                self.lag_seconds = now - began - LOOK_SECONDS
                try:
                    self.look(now)
                except Exception:  # noqa: BLE001 - one look that fails must not be the last
                    _log.exception("a look at the requests under way failed")
        finally:
            self._tools.client.close()

    def look(self, now: float) -> None:
        """Look once."""
        self._tools.client.tend()
        is_for_keys = now >= self._keys_due
        if is_for_keys:
            self._keys_due = now + KEYS_EVERY_SECONDS
        for exchange in [*self.exchanges]:
            self._look_at(exchange, now, is_for_keys=is_for_keys)
        if now >= self._cleaning_due:
            self._cleaning_due = now + CLEAN_EVERY_SECONDS
            self._tools.traffic.forget_ended()
            self._tools.targets.forget_ended()

    def _look_at(self, exchange: RunningRequest, now: float, *, is_for_keys: bool) -> None:
        if exchange.has_body:
            exchange.watch()  # not before: the watcher takes what the client sends
        elif now - exchange.started_at > BODY_SECONDS:
            exchange.end(CutReason.BODY_TOO_SLOW)
        if exchange.sending_since and now - exchange.sending_since > SLOW_READER_SECONDS:
            exchange.end(CutReason.CLIENT_TOO_SLOW)
        if is_for_keys and not self._keys.is_valid(exchange.key_id, self._tools.clock.now()):
            exchange.end(CutReason.KEY_REVOKED)
        job = exchange.job
        if job is not None and not job.is_written and now - exchange.started_at > WRITTEN_AFTER_SECONDS:
            self._tools.ledger.begin(job)
