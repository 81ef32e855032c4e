"""DNS: a bounded number of look-ups under way, in all and for each owner, so that no owner's names stop all others.

A look-up that hangs holds a thread for ten seconds and more: the system's resolver can't be interrupted. A name that
did not resolve in time is not asked again for half a minute. Such failures are not the provider's, as far as we know.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress

from lucid_compute.egress.faults import EgressFault, FaultKind

MAX_LOOKUPS = 64  # under way
MAX_LOOKUPS_OF_OWNER = 4
SLOW_NAME_SECONDS = 30.0
MAX_SLOW_NAMES = 1000

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
# The system's resolver, its memory or its network failed. Other errors say that the name has no address.
_OUR_ERRORS = frozenset({socket.EAI_AGAIN, socket.EAI_MEMORY, socket.EAI_SYSTEM})


class Lookups:
    """Resolves names for one client; simultaneous look-ups of one name are one."""

    def __init__(self, resolve: Resolver, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._resolve = resolve
        self._monotonic = monotonic
        self._running: dict[str, asyncio.Future[Sequence[str]]] = {}
        self._slots = asyncio.Semaphore(MAX_LOOKUPS)
        self._slots_of: dict[str, asyncio.Semaphore] = {}
        self._count_of: Counter[str] = Counter()  # look-ups of each owner that run or wait
        self._slow: dict[str, float] = {}

    async def addresses_of(self, host: str, port: int, owner: str, seconds: float) -> Sequence[str]:
        """Return the addresses of a name, empty if it has none; wait `seconds` at most. `owner` names the provider.

        Raises:
            EgressFault: it did not resolve in time, or the resolver failed.
        """
        if self._slow.get(host, 0.0) > self._monotonic():
            raise _too_slow(host)
        lookup = self._running.get(host)
        if lookup is None:
            lookup = self._running[host] = asyncio.ensure_future(self._look_up(host, port, owner))
            lookup.add_done_callback(lambda done: self._end(host, done))
        done, _ = await asyncio.wait([lookup], timeout=seconds)
        if not done:
            self._remember(host)
            raise _too_slow(host)
        try:
            return lookup.result()
        except socket.gaierror as error:
            if error.errno in _OUR_ERRORS:
                raise EgressFault(FaultKind.OUR_RESOLVER, f"{host} could not be looked up: DNS failed.") from None
        except (OSError, ValueError, UnicodeError):
            pass
        return ()

    async def _look_up(self, host: str, port: int, owner: str) -> Sequence[str]:
        own = self._slots_of.setdefault(owner, asyncio.Semaphore(MAX_LOOKUPS_OF_OWNER))
        self._count_of[owner] += 1
        try:
            async with own, self._slots:
                return await self._resolve(host, port)
        finally:
            self._count_of[owner] -= 1
            if not self._count_of[owner]:
                del self._count_of[owner], self._slots_of[owner]

    def _end(self, host: str, done: asyncio.Future[Sequence[str]]) -> None:
        self._running.pop(host, None)
        if not done.cancelled() and done.exception() is None:
            self._slow.pop(host, None)

    def _remember(self, host: str) -> None:
        if len(self._slow) >= MAX_SLOW_NAMES:
            del self._slow[next(iter(self._slow))]
        self._slow.pop(host, None)
        self._slow[host] = self._monotonic() + SLOW_NAME_SECONDS


class SystemResolver:
    """Resolves a name to every address that the system's resolver knows, in its order.

    Each look-up has a thread of its own, which the end of this process does not wait for.
    """

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`."""
        loop = asyncio.get_running_loop()
        found: asyncio.Future[list[str]] = loop.create_future()

        def look_up() -> None:
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                addresses, error = list(dict.fromkeys(str(info[4][0]) for info in infos)), None
            except (OSError, UnicodeError) as failure:
                addresses, error = [], failure
            with suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(_set, found, addresses, error)

        threading.Thread(target=look_up, name=f"resolve {host[:40]}", daemon=True).start()
        return await found


def _set(found: asyncio.Future[list[str]], addresses: list[str], error: Exception | None) -> None:
    if found.done():
        return
    if error is None:
        found.set_result(addresses)
    else:
        found.set_exception(error)


def _too_slow(host: str) -> EgressFault:
    return EgressFault(FaultKind.OUR_RESOLVER, f"{host} did not resolve in time.")
