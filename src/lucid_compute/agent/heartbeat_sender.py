"""Send heartbeats, numbered since the start of the agent and at most twice each; and the pauses after failures."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

from pydantic import ValidationError

from lucid_compute.client import AsyncLucid, LucidClientError
from lucid_compute.registry.domain.node_state import Heartbeat
from lucid_compute.registry.shapes import HeartbeatAnswer
from lucid_compute.wire import backoff_seconds

RETRY_AFTER_SECONDS = 1.0  # once: two heartbeats may then be lost within the 30 s that count
_ALWAYS = ("status", "load", "available_models", "queue_depth")
_log = logging.getLogger(__name__)


class HeartbeatSender:
    """Sends the heartbeats of one boot."""

    def __init__(self, lucid: AsyncLucid) -> None:
        """Start a new boot. The registry then refuses heartbeats of earlier boots."""
        self._lucid = lucid
        self.boot_id = uuid4().hex
        self.sequence = 0

    async def send(self, passport_id: str, fields: Mapping[str, Any]) -> HeartbeatAnswer:
        """Send one heartbeat, and again after a second if it is lost. The registry counts it once.

        Raises:
            LucidClientError: both attempts failed, or the first failed in a way that a repetition does not fix.
        """
        self.sequence += 1
        heartbeat = self._make(passport_id, fields)
        try:
            return await self._lucid.compute.send(heartbeat)
        except LucidClientError as error:
            if not error.is_transient or (error.retry_after_seconds or 0) > RETRY_AFTER_SECONDS:
                raise
        await asyncio.sleep(RETRY_AFTER_SECONDS)
        return await self._lucid.compute.send(heartbeat)

    def _make(self, passport_id: str, fields: Mapping[str, Any]) -> Heartbeat:
        """Return the heartbeat. If the wire refuses a field, return one with the required fields only."""
        own = {
            "passport_id": passport_id,
            "boot_id": self.boot_id,
            "sequence": self.sequence,
            "sent_at": datetime.now(UTC),
        }
        try:
            return Heartbeat.model_validate({**fields, **own}, by_name=True)
        except ValidationError:
            _log.exception("the heartbeat does not fit the wire; sending what has to be there")
            plain = {name: fields[name] for name in _ALWAYS} | {
                "load": None,
                "queue_depth": None,
                "available_models": [],
            }
            return Heartbeat.model_validate({**plain, **own}, by_name=True)


FIRST_SECONDS = 2.0
LONGEST_SECONDS = 20.0  # below the 30 s after which a node is stale: the first heartbeat after an outage comes in time


class Backoff:
    """Counts consecutive failures. The pauses grow up to a limit, and differ from other agents' by chance."""

    def __init__(self) -> None:
        self.failures = 0

    def succeed(self) -> None:
        """Reset the count."""
        self.failures = 0

    def fail(self, *, at_least_seconds: float = 0.0) -> float:
        """Count a failure. Return the seconds to wait, `at_least_seconds` or more."""
        self.failures += 1
        jitter = 0.5 + random.random() / 2  # noqa: S311 - jitter, not a secret
        pause = backoff_seconds(
            self.failures, first_seconds=FIRST_SECONDS, longest_seconds=LONGEST_SECONDS, jitter=jitter
        )
        return at_least_seconds + pause
