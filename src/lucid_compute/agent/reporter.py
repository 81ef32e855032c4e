"""Report one node: register it, send heartbeats, and publish changes, until stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from lucid_compute.agent.fatal_errors import SLOW_RETRY_SECONDS, NodeEnded, Superseded, refusal
from lucid_compute.agent.heartbeat_sender import Backoff, HeartbeatSender
from lucid_compute.agent.node_report import declaration_of, heartbeat_of, metadata_of
from lucid_compute.agent.observer import Observer
from lucid_compute.agent.registration import Registration
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.client import AsyncLucid, LucidClientError, errors
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.shapes import HeartbeatAnswer

DESCRIBE_SECONDS = 4.0
LOOK_SECONDS = 1.0
SHORTEST_INTERVAL_SECONDS = 2.0  # also for changes: the registry accepts one heartbeat a second
LONGEST_INTERVAL_SECONDS = 60.0
_log = logging.getLogger(__name__)


class Reporter:
    """Keeps the registry's view of the node up to date. `wake` ends a wait between two heartbeats."""

    def __init__(
        self,
        lucid: AsyncLucid,
        observer: Observer,
        settings: AgentSettings,
        *,
        clock: Callable[[], float],
        stop: asyncio.Event,
        wake: asyncio.Event,
    ) -> None:
        """Report what `observer` sees, until `stop` is set."""
        self._lucid, self._observer, self._settings = lucid, observer, settings
        self._clock, self._stop, self._wake = clock, stop, wake
        self._registration = Registration(lucid, settings)
        self._backoff = Backoff()
        self._trouble: str | None = None
        self._is_draining = self._is_drained = False
        self._status: NodeStatus | None = None
        self.sender = HeartbeatSender(lucid)
        self.passport_id: str | None = None

    async def run(self) -> None:
        """Report until stopped. The last heartbeat still reports the node as healthy or unhealthy, not draining.

        Raises:
            AgentFault: an error that waiting does not fix.
        """
        await self._register(is_first=True)
        describing = asyncio.create_task(self._keep_described())
        try:
            while not self._stop.is_set():
                started_at = self._clock()
                seconds = await self._send_heartbeat()
                await self._wait(max(seconds - (self._clock() - started_at), 0.0), since=started_at)
        finally:
            describing.cancel()
            await asyncio.wait({describing})

    async def _register(self, *, is_first: bool) -> None:
        """Find or create the passport, however long the registry is unreachable; return at once when stopped.

        A passport is created only for an inference server that was seen: until then the node would serve nothing.

        Raises:
            AgentFault: the registry refuses. Raised only at the start of the agent, when a person can read it.
        """
        while not self._stop.is_set():
            try:
                seen = self._observer.seen()
                is_seen = seen.server is not None and seen.server.detection is not None
                metadata = metadata_of(seen, self._settings)
                passport = await self._registration.find_or_make(metadata, may_make=is_seen)
                self.passport_id = None if passport is None else passport.id
            except LucidClientError as error:
                if is_first and (fault := refusal(error)) is not None:
                    raise fault from error
                await self._wait(self._after(error))
            else:
                self._recovered()
                if self.passport_id is not None:
                    return
                await self._wait_for_server()

    async def _wait_for_server(self) -> None:
        """Wait until an inference server was seen, and say so."""
        url = self._settings.url
        _log.warning("not registered yet: no inference server answers at %s. Start it, or correct --url", url)
        while not self._stop.is_set():
            seen = self._observer.seen().server
            if seen is not None and seen.detection is not None:
                return
            await self._wait(LOOK_SECONDS)

    async def _send_heartbeat(self) -> float:
        """Send one heartbeat. Return in how many seconds the next one is due."""
        if self.passport_id is None:
            await self._register(is_first=False)
            return 0.0
        fields = heartbeat_of(self._observer.seen(), self._settings, stops=False)
        try:
            answer = await self.sender.send(self.passport_id, fields)
        except errors.NodeDeregistered as error:
            raise NodeEnded(f"{error.message} The agent stops; start it again to register the node again.") from error
        except errors.NotFound as error:
            _log.warning("the registry knows no node %s any more; registering it again (%s)", self.passport_id, error)
            self.passport_id = None
            return SHORTEST_INTERVAL_SECONDS
        except LucidClientError as error:
            if _is_of_a_former_boot(error):
                raise Superseded(
                    f"Another agent, started later, reports for passport {self.passport_id}, so this one ends. "
                    "If both are to run, give each its own --name."
                ) from error
            return self._after(error)
        self._recovered()
        self._say_status(answer.status)
        await self._follow_drain(self.passport_id, answer)
        return min(max(answer.next_heartbeat_in_seconds, SHORTEST_INTERVAL_SECONDS), LONGEST_INTERVAL_SECONDS)

    @property
    def accepted_node(self) -> tuple[str, str] | None:
        """The passport and the bootId of the node, once a heartbeat of this agent was accepted."""
        if self.passport_id is None or self._status is None:
            return None
        return self.passport_id, self.sender.boot_id

    def _say_status(self, status: NodeStatus) -> None:
        """Log the node's status when the first heartbeat is accepted, and when it changes."""
        before, self._status = self._status, status
        if status is before or status is NodeStatus.DRAINING:
            return
        first = ", first heartbeat accepted" if before is None else ""
        if status is NodeStatus.HEALTHY:
            _log.info("healthy%s: this node can be sent requests", first)
        else:
            _log.warning("%s%s: this node gets no request", status.value, first)

    async def _follow_drain(self, passport_id: str, answer: HeartbeatAnswer) -> None:
        """Log once each: an operator drains the node, nothing runs on it any more, the drain is over."""
        if answer.drain != self._is_draining:
            self._is_draining, self._is_drained = answer.drain, False
            words = "an operator drains this node: the gateway starts no request on it; the agent goes on reporting"
            _log.info("%s", words if answer.drain else "the operator's drain is over: requests come again")
        if not self._is_draining or self._is_drained:
            return
        try:
            health = await self._lucid.compute.health(passport_id)
        except LucidClientError:
            return  # the next heartbeat tries again
        if health.drained and not self.running():
            self._is_drained = True
            _log.info("drained: nothing runs on this node any more, it is safe to stop")

    def running(self) -> int | None:
        """Return how many requests the inference server reports as running; None when it does not report it."""
        server = self._observer.seen().server
        return None if server is None or server.fault is not None else server.reading.running

    async def _keep_described(self) -> None:
        """Keep passport and declaration up to date. A background task: heartbeats never wait for it."""
        backoff, trouble = Backoff(), None
        while True:
            seconds = DESCRIBE_SECONDS
            try:
                await self._describe()
            except LucidClientError as error:
                seconds = backoff.fail() if error.is_transient else SLOW_RETRY_SECONDS
                if not error.is_transient and trouble != error.message:
                    trouble = error.message
                    _log.error("what the node is could not be written; trying again every minute: %s", error)
            else:
                backoff, trouble = Backoff(), None
            await asyncio.sleep(seconds)

    async def _describe(self) -> None:
        seen, passport_id = self._observer.seen(), self.passport_id
        models = declaration_of(seen, self._settings)
        if passport_id is not None and models is not None:  # a server that can't serve does not report what it is
            await self._registration.describe(passport_id, metadata_of(seen, self._settings))
            await self._registration.declare(passport_id, models)

    async def _wait(self, seconds: float, since: float | None = None) -> None:
        """Wait, unless stopped or woken. Being woken counts only some time after the last heartbeat, at `since`."""
        until = self._clock() + seconds
        if since is not None:
            await self._wait_for_stop(min(since + SHORTEST_INTERVAL_SECONDS, until) - self._clock())
        try:
            async with asyncio.timeout(max(until - self._clock(), 0.0)):
                await self._wake.wait()
        except TimeoutError:
            pass
        self._wake.clear()

    async def _wait_for_stop(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._stop.wait()
        except TimeoutError:
            pass

    def _after(self, error: LucidClientError) -> float:
        """Log a failure, once for each kind. Return how many seconds to wait."""
        if self._trouble != error.code:
            self._trouble = error.code
            often = "" if error.is_transient else f" every {SLOW_RETRY_SECONDS:.0f} s"
            _log.warning("the registry takes nothing from this node; trying again%s: %s", often, error)
        if not error.is_transient:
            return SLOW_RETRY_SECONDS
        return self._backoff.fail(at_least_seconds=min(error.retry_after_seconds or 0.0, LONGEST_INTERVAL_SECONDS))

    def _recovered(self) -> None:
        if self._trouble is not None:
            _log.info("the registry takes this node's heartbeats again")
        self._trouble = None
        self._backoff.succeed()


def _is_of_a_former_boot(error: LucidClientError) -> bool:
    """Return whether the registry refuses a heartbeat because a later boot replaced this one, which is final."""
    fields = error.details.get("fields")
    faults = fields if isinstance(error, errors.InvalidRequest) and isinstance(fields, list) else []
    return any(isinstance(fault, dict) and fault.get("path") == "bootId" for fault in faults)
