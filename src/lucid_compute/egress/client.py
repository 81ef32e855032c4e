"""The way out: connections to providers, each opened only to an address that the egress policy has just allowed.

A name is resolved at every connect; if any of its addresses is denied it is not connected to, and else it is connected
to by the address that was checked, not by the name. Redirects are never followed, proxies and netrc never read.
Source: the security page, "Provider URLs (SSRF)".
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import ip_address
from typing import Any

from lucid_compute.egress.connection import READ_BYTES, HttpConnection
from lucid_compute.egress.faults import ConnectTimedOut, EgressFault, FaultKind
from lucid_compute.egress.policy import Address, EgressPolicy, ProviderUrl
from lucid_compute.egress.write_batching import WriteBatch

CONNECT_SECONDS = 3.0
TLS_SECONDS = 5.0
MAX_AGE_SECONDS = 300.0
MAX_IDLE_SECONDS = 60.0
MAX_IDLE_PER_ORIGIN = 256
MAX_ADDRESSES_TRIED = 4
MAX_LOOKUPS = 32  # at a time

Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
Origin = tuple[str, str, int]


class SystemResolver:
    """Finds every address that the system's resolver knows of a name, in its order.

    It asks on threads of its own and once at a time for each name, so that a name whose servers never respond holds up
    one of these threads, and neither other names nor whatever else runs in threads.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_LOOKUPS, "resolve")
        self._asked: dict[str, asyncio.Future[list[Any]]] = {}

    async def __call__(self, host: str, port: int) -> list[str]:
        """Return the addresses of `host`."""
        asked = self._asked.get(host)
        if asked is None:
            ask = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
            asked = self._asked[host] = asyncio.get_running_loop().run_in_executor(self._threads, ask)
            asked.add_done_callback(lambda _: self._asked.pop(host))
        return list(dict.fromkeys(str(found[4][0]) for found in await asyncio.shield(asked)))


class HttpClient:
    """Connections to providers: pooled by origin, bounded in age, idle time and number."""

    def __init__(self, policy: EgressPolicy, resolver: Resolver | None = None) -> None:
        """Connect to what `policy` allows. `resolver` answers a name's addresses; None is the system's."""
        self._policy = policy
        self._resolve = resolver or SystemResolver()
        self._idle: dict[Origin, list[tuple[HttpConnection, float]]] = {}
        self._busy: set[HttpConnection] = set()
        self._tls: ssl.SSLContext | None = None
        self._view = memoryview(bytearray(READ_BYTES))
        self._late_writes = WriteBatch()
        self.own_endpoints: set[tuple[str, int]] = set()

    def take_idle(self, url: ProviderUrl) -> HttpConnection | None:
        """Return an idle connection to the provider, the one used last; None when there is none."""
        idle = self._idle.get((url.scheme, url.host, url.port))
        while idle:
            connection, _ = idle.pop()
            if not connection.is_lost and time.monotonic() - connection.made_at < MAX_AGE_SECONDS:
                self._busy.add(connection)
                return connection
            connection.abort()
        return None

    async def connect(self, url: ProviderUrl, kind: type[HttpConnection] = HttpConnection) -> HttpConnection:
        """Open a connection to the provider, of the `kind` that is wanted.

        Raises:
            EgressFault: its name does not resolve or leads where the policy forbids, or nothing answers there.
        """
        clock = asyncio.get_running_loop().time
        ends_at = clock() + CONNECT_SECONDS + (TLS_SECONDS if url.scheme == "https" else 0)
        fault: EgressFault = ConnectTimedOut(url.authority)
        try:
            async with asyncio.timeout_at(ends_at):
                addresses = await self._addresses_of(url)
        except TimeoutError:
            raise EgressFault(FaultKind.NAME_UNKNOWN, f"{url.host} did not resolve in time.") from None
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                async with asyncio.timeout((ends_at - clock()) / left):  # one that is silent leaves time for the next
                    return await self._open(url, address, kind)
            except EgressFault as error:
                fault = error
            except TimeoutError:
                continue
        try:
            raise fault
        finally:
            del fault  # else it and this frame would hold each other, and the request, until garbage is collected

    def give_back(self, url: ProviderUrl, connection: HttpConnection) -> None:
        """Keep the connection for the next request, or close it when it can't be used again."""
        if connection not in self._busy:
            return  # given back already, and perhaps taken by another request
        self._busy.remove(connection)
        reusable = connection.is_reusable
        connection.release()
        if reusable:
            idle = self._idle.setdefault((url.scheme, url.host, url.port), [])
            if len(idle) < MAX_IDLE_PER_ORIGIN:
                idle.append((connection, connection.last_read_at))
                return
        connection.abort()

    def tend(self) -> None:
        """Fail what is overdue and close what has been idle for too long; to be called several times a second."""
        now = time.monotonic()
        for connection in [*self._busy]:
            if (fault := connection.overdue(now)) is not None:
                connection.fail(fault)
        for origin, idle in [*self._idle.items()]:
            kept = [entry for entry in idle if not entry[0].is_lost and now - entry[1] < MAX_IDLE_SECONDS]
            for connection, _ in set(idle) - set(kept):
                connection.abort()
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]

    def close(self) -> None:
        """Close every connection."""
        for connection in [*self._busy, *(entry[0] for idle in self._idle.values() for entry in idle)]:
            connection.fail(EgressFault(FaultKind.CONNECTION_LOST, "This service is shutting down."))
        self._idle.clear()

    async def _addresses_of(self, url: ProviderUrl) -> list[Address]:
        """Return the addresses to connect to, every one of them checked."""
        addresses: list[Address] = list(url.known_addresses)
        if not addresses:
            try:
                addresses = [ip_address(text.partition("%")[0]) for text in await self._resolve(url.host, url.port)]
            except (OSError, ValueError, UnicodeError):
                addresses = []
        if not addresses:
            raise EgressFault(FaultKind.NAME_UNKNOWN, f"{url.host} does not resolve.")
        for address in addresses:
            if self._is_own(address, url.port):
                raise EgressFault(FaultKind.ROUTING_LOOP, f"{url.authority} leads back to this service.")
            try:
                self._policy.check_address(address, url.port)
            except ValueError as error:
                raise EgressFault(FaultKind.ADDRESS_REFUSED, f"{url.host}: {error}") from None
        return addresses[:MAX_ADDRESSES_TRIED]

    def _is_own(self, address: Address, port: int) -> bool:
        """Return whether the service was reached here; a socket for both families calls IPv4 addresses IPv4-mapped."""
        plain = getattr(address, "ipv4_mapped", None) or address
        return (str(plain), port) in self.own_endpoints or (f"::ffff:{plain}", port) in self.own_endpoints

    async def _open(self, url: ProviderUrl, address: Address, kind: type[HttpConnection]) -> HttpConnection:
        is_https = url.scheme == "https"
        try:
            transport, connection = await asyncio.get_running_loop().create_connection(
                partial(kind, self._view, self._late_writes),
                str(address),
                url.port,
                ssl=self._tls_context() if is_https else None,
                server_hostname=url.host if is_https else None,
                ssl_handshake_timeout=TLS_SECONDS if is_https else None,
            )
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or "no TLS"
            raise EgressFault(FaultKind.TLS_FAILED, f"{url.authority}: the TLS handshake failed ({why}).") from None
        except OSError as error:
            why = error.strerror or type(error).__name__
            if is_https and error.errno is None:  # asyncio's own: it was connected to, and the handshake not ended
                sentence = f"{url.authority}: the TLS handshake was not completed."
                raise EgressFault(FaultKind.TLS_FAILED, sentence) from None
            raise EgressFault(FaultKind.CONNECT_FAILED, f"{url.authority} could not be connected to ({why}).") from None
        peer = transport.get_extra_info("peername")
        if peer and ip_address(peer[0].partition("%")[0]) == address:
            self._busy.add(connection)
            return connection
        connection.abort()
        if peer:
            raise EgressFault(FaultKind.ADDRESS_REFUSED, f"{url.authority} was answered by another address.")
        raise EgressFault(FaultKind.CONNECT_FAILED, f"{url.authority} closed the connection at once.")

    def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = ssl.create_default_context()
        return self._tls
