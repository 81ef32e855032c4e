"""Shut the agent down: report that the node drains, wait until nothing runs on it, deregister it if wanted."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lucid_compute.agent.node_report import heartbeat_of
from lucid_compute.agent.observer import Observer
from lucid_compute.agent.reporter import Reporter
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.client import AsyncLucid, LucidClientError, errors

CHECK_SECONDS = 1.0
HEARTBEAT_SECONDS = 5.0
SILENCES_UNTIL_ALONE = 3  # then the registry is unreachable, and its gateway sends no requests
_log = logging.getLogger(__name__)


class Shutdown:
    """The shutdown of one node's agent."""

    def __init__(
        self,
        lucid: AsyncLucid,
        observer: Observer,
        reporter: Reporter,
        settings: AgentSettings,
        clock: Callable[[], float],
    ) -> None:
        self._lucid, self._observer, self._reporter = lucid, observer, reporter
        self._settings, self._clock = settings, clock
        self._silences = 0

    async def run(self) -> None:
        """Return when nothing runs on the node any more, or when the time for that is over."""
        passport_id = self._reporter.passport_id
        if passport_id is None:
            return
        ends_at = self._clock() + self._settings.drain_seconds
        _log.info("stopping: the node drains, for %g s at most", self._settings.drain_seconds)
        try:
            is_drained = await self._drain(passport_id, ends_at)
            if not is_drained:
                _log.warning("the time to drain is over; %s requests may still run", self._reporter.running() or "some")
            if self._settings.deregister_on_exit:
                await self._deregister(passport_id, max(ends_at - self._clock(), 0.0))
        except errors.NodeDeregistered:
            _log.info("the node is deregistered already")

    async def _drain(self, passport_id: str, ends_at: float) -> bool:
        """Return whether nothing runs on the node any more."""
        heartbeat_at = self._clock()
        while True:
            if self._clock() >= heartbeat_at:
                heartbeat_at = self._clock() + HEARTBEAT_SECONDS
                await self._send_heartbeat(passport_id)
            if await self._check_drained(passport_id):
                return True
            if self._clock() + CHECK_SECONDS > ends_at:
                return False
            await asyncio.sleep(CHECK_SECONDS)

    async def _send_heartbeat(self, passport_id: str) -> None:
        fields = heartbeat_of(self._observer.seen(), self._settings, stops=True)
        try:
            await self._reporter.sender.send(passport_id, fields)
        except errors.NodeDeregistered:
            raise
        except LucidClientError as error:
            _log.warning("the registry did not receive that the node drains: %s", error)

    async def _check_drained(self, passport_id: str) -> bool:
        """Return whether registry and inference server both report that nothing runs.

        A registry that does not respond sends no requests either.
        """
        try:
            is_drained = (await self._lucid.compute.health(passport_id)).drained
            self._silences = 0
        except errors.NodeDeregistered:
            raise
        except LucidClientError:
            self._silences += 1
            is_drained = self._silences >= SILENCES_UNTIL_ALONE
        if not is_drained or self._reporter.running():
            return False
        await self._observer.observe_server()  # the last observation may be seconds old
        return not self._reporter.running()

    async def _deregister(self, passport_id: str, wait_seconds: float) -> None:
        try:
            await self._lucid.compute.deregister(passport_id, wait_seconds=max(wait_seconds, 1.0))
        except errors.RequestsInFlight as error:
            _log.error("not deregistered: %s requests still run", error.in_flight)
        except LucidClientError as error:
            _log.error("not deregistered: %s", error)
        else:
            _log.info("deregistered")
