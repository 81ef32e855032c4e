"""Keeps one connection to each live replica of the service.

A connection through a load balancer reaches one replica, and nobody can choose which. So the agent dials until it has
reached as many as there are, and closes connections to replicas that it has reached already.
"""

from __future__ import annotations

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple
from urllib.parse import urlencode

from websockets.asyncio.client import connect
from websockets.exceptions import InvalidHandshake, InvalidStatus, WebSocketException
from websockets.frames import CloseCode

from lucid_compute.agent.outbound.forwarder import Forwarder
from lucid_compute.agent.outbound.link import Link
from lucid_compute.tunnel.frames import MAX_RECEIVED_BYTES
from lucid_compute.wire import backoff_seconds

PATH = "/compute/connect"
OPEN_SECONDS = 10.0
PING_SECONDS = 10.0
PONG_SECONDS = 20.0  # a ping waits behind what was written before it, over a slow line
CLOSE_SECONDS = 2.0
FIRST_PAUSE_SECONDS = 0.5  # after a failure
LONGEST_PAUSE_SECONDS = 20.0
FIRST_REDIAL_SECONDS = 0.05  # after a connection to a replica that was reached already
LONGEST_REDIAL_SECONDS = 5.0
_log = logging.getLogger(__name__)


class ServiceAddress(NamedTuple):
    """How the service is reached. `tls` is None for plain http."""

    url: str
    key: str
    tls: ssl.SSLContext | None


class OutboundLinks:
    """The connections of one agent. `node` returns the passport's id and the bootId to connect with; None: not yet."""

    def __init__(
        self, address: ServiceAddress, node: Callable[[], tuple[str, str] | None], forwarder: Forwarder
    ) -> None:
        self._address = address
        self._node = node
        self._forwarder = forwarder
        self._links: dict[str, Link] = {}  # by replica
        self._tasks: set[asyncio.Task[None]] = set()
        self._wanted = 1
        self._has_changed = asyncio.Event()
        self._trouble = ""

    async def run(self) -> None:
        """Keep the connections until this task is cancelled."""
        failures = repeats = 0
        try:
            while True:
                node = self._node()
                if node is None or len(self._links) >= self._wanted:
                    failures = repeats = 0
                    await self._wait(FIRST_PAUSE_SECONDS if node is None else PING_SECONDS)
                    continue
                is_new = await self._dial(*node)
                failures = failures + 1 if is_new is None else 0
                repeats = repeats + 1 if is_new is False else 0
                if failures:
                    await asyncio.sleep(_pause(failures, FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS))
                elif repeats and await self._wait(_pause(repeats, FIRST_REDIAL_SECONDS, LONGEST_REDIAL_SECONDS)):
                    repeats = 0  # replicas come and go: the next one may be the one that is missing
        finally:
            tasks = [*self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _dial(self, passport_id: str, boot_id: str) -> bool | None:
        """Open a connection. Return whether it reaches another replica than those before; None if it fails."""
        base = self._address.url.replace("http", "ws", 1)
        try:
            websocket = await connect(
                f"{base}{PATH}?{urlencode({'passportId': passport_id, 'bootId': boot_id})}",
                additional_headers={"Authorization": f"Bearer {self._address.key}"},
                compression=None,
                ssl=self._address.tls,
                open_timeout=OPEN_SECONDS,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                max_size=MAX_RECEIVED_BYTES,
            )
        except InvalidStatus as error:
            self._say(_words_of(error))
            return None
        except (OSError, TimeoutError, InvalidHandshake, WebSocketException) as error:
            self._say(f"the service can't be connected to: {error or type(error).__name__}")
            return None
        link = Link(websocket, self._forwarder, self._has_changed.set)
        task = asyncio.create_task(self._keep(link))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        hello = await link.greeting()
        if hello is None:
            task.cancel()
            self._say(link.ended_with or "the service does not greet")
            return None
        self._wanted = hello.replicas
        if hello.replica_id in self._links:
            await websocket.close(CloseCode.NORMAL_CLOSURE, "This replica is connected already.")
            return False
        self._links[hello.replica_id] = link
        link.keep()
        self._trouble = ""
        _log.info("connected to replica %.8s, %d of %d", hello.replica_id, len(self._links), self._wanted)
        return True

    async def _keep(self, link: Link) -> None:
        """Run a connection, and forget it when it ends."""
        try:
            await link.run()
        finally:
            if link.replica is not None and self._links.get(link.replica.replica_id) is link:
                del self._links[link.replica.replica_id]
                _log.info("a connection to the service ended: %s", link.ended_with or "closed")
            self._has_changed.set()

    async def _wait(self, seconds: float) -> bool:
        """Wait until a replica says something, or for so long; return whether one did.

        Forget the replicas that stop: others are needed.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._has_changed.wait()
        has_changed = self._has_changed.is_set()
        self._has_changed.clear()
        for replica_id, link in [*self._links.items()]:
            if link.is_moving:
                del self._links[replica_id]  # its task goes on until the replica closes it
            elif link.replica is not None:
                self._wanted = link.replica.replicas
        return has_changed

    def _say(self, trouble: str) -> None:
        """Log a trouble, once until it is over."""
        if trouble != self._trouble:
            self._trouble = trouble
            _log.warning("no connection for requests to this node; trying again: %s", trouble)


def _pause(count: int, first_seconds: float, longest_seconds: float) -> float:
    jitter = 0.5 + random.random() / 2  # noqa: S311 - jitter, not a secret
    return backoff_seconds(count, first_seconds=first_seconds, longest_seconds=longest_seconds, jitter=jitter)


def _words_of(error: InvalidStatus) -> str:
    """Return what the service answered instead of a connection."""
    body = bytes(error.response.body or b"").decode(errors="replace")
    return f"the service answers {error.response.status_code}: {body[:300]}"
