"""A pool of connections to providers, each opened only to an address that the egress policy has just allowed.

A name is resolved at every connect. If the policy denies any of its addresses, the connect fails; otherwise it uses a
checked address, not the name. Redirects are never followed, proxies and netrc never read. To an outbound node a
connection is a stream of its tunnel, for one request.
Source: the security page, "Provider URLs (SSRF)".
"""

from __future__ import annotations

import asyncio
import errno
import os
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from itertools import islice
from typing import NamedTuple

from lucid_compute.egress.connection import READ_BYTES, RESPONSE_LIMITS, HttpConnection, ResponseLimits
from lucid_compute.egress.faults import ConnectTimedOut, EgressFault, FaultKind
from lucid_compute.egress.lookups import Lookups, Resolver, SystemResolver
from lucid_compute.egress.policy import TUNNEL, Address, EgressPolicy, ProviderUrl
from lucid_compute.egress.write_batching import WriteBatch
from lucid_compute.tunnel.tunnels import Tunnels

MAX_ADDRESSES_TRIED = 4
END_SECONDS = 1.0
FREED_AT_A_TIME = 64  # idle connections, when no file descriptor or port is left

Origin = tuple[str, str, int]


class ClientLimits(NamedTuple):
    """Limits of a client's connections. `connect_seconds` covers the name and TCP; TLS has `tls_seconds` more."""

    connect_seconds: float = 3.0
    tls_seconds: float = 5.0
    max_age_seconds: float = 300.0
    max_idle_seconds: float = 60.0
    max_idle_per_origin: int = 256
    max_idle: int = 2048  # in all; then the one that was idle longest is closed


CLIENT_LIMITS = ClientLimits()


_OUR_ERRORS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EAGAIN}
)  # of a connect: file descriptors, memory or local ports are used up


class HttpClient:
    """Connections to providers, pooled by origin. `own_endpoints`: addresses of this service, never connected to."""

    def __init__(
        self,
        policy: EgressPolicy,
        resolver: Resolver | None = None,
        *,
        tunnels: Tunnels | None = None,
        limits: ClientLimits = CLIENT_LIMITS,
        response_limits: ResponseLimits = RESPONSE_LIMITS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create it in the event loop that it works in. `resolver` returns a name's addresses; None is the system's."""
        self._loop = asyncio.get_running_loop()
        self._monotonic = monotonic
        self._policy = policy
        self._tunnels = tunnels
        self._limits = limits
        self._response_limits = response_limits
        self._lookups = Lookups(resolver or SystemResolver(), monotonic)
        self._idle: dict[Origin, list[tuple[HttpConnection, float]]] = {}
        self._idle_longest_first: dict[HttpConnection, Origin] = {}
        self._busy: set[HttpConnection] = set()
        self._tls: ssl.SSLContext | None = None
        self._view = memoryview(bytearray(READ_BYTES))
        self._write_batch = WriteBatch(self._loop)
        self.own_endpoints: set[tuple[str, int]] = set()

    def acquire_idle(self, url: ProviderUrl) -> HttpConnection | None:
        """Return the idle connection to the provider that was used last, for one request; None when there is none.

        An outbound node's is a new stream, which need not be waited for.
        """
        if url.scheme == TUNNEL:
            return self._open_stream(url, HttpConnection)
        idle = self._idle.get((url.scheme, url.host, url.port))
        while idle:
            connection, _ = idle.pop()
            del self._idle_longest_first[connection]
            if not connection.is_lost and self._monotonic() - connection.made_at < self._limits.max_age_seconds:
                self._busy.add(connection)
                return connection
            connection.abort()
        return None

    async def connect(
        self, url: ProviderUrl, kind: type[HttpConnection] = HttpConnection, *, owner: str = ""
    ) -> HttpConnection:
        """Open a connection of class `kind` to the provider; `owner` is whose it is, to bound look-ups by.

        Raises:
            EgressFault: the name does not resolve, the policy forbids an address, or no address accepts the connection.
                Or the outbound node's agent has no connection to this replica.
        """
        if url.scheme == TUNNEL:
            if (stream := self._open_stream(url, kind)) is None:
                sentence = "The node opens its own connections, and this replica of the service has none from it."
                raise EgressFault(FaultKind.NOT_CONNECTED, sentence)
            return stream
        clock, limits = self._loop.time, self._limits
        seconds = limits.connect_seconds + (limits.tls_seconds if url.scheme == "https" else 0)
        ends_at = clock() + seconds
        faults: list[EgressFault] = []
        addresses = await self._addresses_of(url, owner, seconds)
        for left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            try:
                async with asyncio.timeout((ends_at - clock()) / left):  # a silent address leaves time for the next
                    return await self._open(url, address, kind)
            except EgressFault as error:
                faults.append(error.with_traceback(None))
            except TimeoutError:
                faults.append(ConnectTimedOut(url.authority))
        try:
            raise _fault_of_all(addresses, faults)
        finally:
            del faults  # a cycle with this frame would hold the request until garbage collection

    def release(self, url: ProviderUrl, connection: HttpConnection) -> None:
        """Keep the connection for the next request, or close it if it cannot be used again."""
        if connection not in self._busy:
            return  # released already, and perhaps acquired by another request
        self._busy.remove(connection)
        reusable = connection.is_reusable and url.scheme != TUNNEL
        connection.release()
        if reusable:
            idle = self._idle.setdefault((url.scheme, url.host, url.port), [])
            if len(idle) < self._limits.max_idle_per_origin:
                idle.append((connection, connection.last_read_at))
                self._idle_longest_first[connection] = (url.scheme, url.host, url.port)
                if len(self._idle_longest_first) > self._limits.max_idle:
                    self._close_longest_idle(1)
                return
        connection.abort()

    def release_at_end(self, url: ProviderUrl, connection: HttpConnection) -> None:
        """Release the connection once its response has ended, which may take up to a second. Its rest is dropped."""

        def drop() -> None:
            """Drop what came. This must not raise, because a transport calls it."""
            with suppress(EgressFault):
                while connection.is_ready:
                    if not connection.read_available():
                        break
                else:
                    return
            self.release(url, connection)

        connection.total_due_at = self._monotonic() + END_SECONDS
        connection.on_ready = drop
        drop()

    def enforce_limits(self) -> None:
        """Fail overdue requests and close connections that were idle too long. Call it several times a second."""
        now, max_idle_seconds = self._monotonic(), self._limits.max_idle_seconds
        for connection in [*self._busy]:
            if (fault := connection.overdue(now)) is not None:
                connection.fail(fault)
        for origin, idle in [*self._idle.items()]:
            kept = [entry for entry in idle if not entry[0].is_lost and now - entry[1] < max_idle_seconds]
            for connection, _ in set(idle) - set(kept):
                del self._idle_longest_first[connection]
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
        self._idle_longest_first.clear()

    def _close_longest_idle(self, count: int) -> None:
        """Close the connections that have been idle longest: their providers need them least."""
        for connection, origin in list(islice(self._idle_longest_first.items(), count)):
            del self._idle_longest_first[connection]
            self._idle[origin] = [entry for entry in self._idle[origin] if entry[0] is not connection]
            connection.abort()

    def _open_stream(self, url: ProviderUrl, kind: type[HttpConnection]) -> HttpConnection | None:
        """Return a connection over a new stream to an outbound node; None if this replica can't reach it."""
        connection = kind(self._view, self._write_batch, self._response_limits, self._monotonic)
        if self._tunnels is None or not self._tunnels.open_stream(url.host, connection):
            return None
        self._busy.add(connection)
        return connection

    async def _addresses_of(self, url: ProviderUrl, owner: str, seconds: float) -> list[Address]:
        """Return the addresses to connect to, after checking all of them."""
        addresses: list[Address] = list(url.known_addresses)
        if not addresses:
            texts = await self._lookups.addresses_of(url.host, url.port, owner, seconds)
            with suppress(ValueError):
                addresses = [ip_address(text.partition("%")[0]) for text in texts]
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
        """Return whether this is an address of this service; dual-stack sockets report IPv4 as IPv4-mapped."""
        plain = getattr(address, "ipv4_mapped", None) or address
        return (str(plain), port) in self.own_endpoints or (f"::ffff:{plain}", port) in self.own_endpoints

    async def _open(self, url: ProviderUrl, address: Address, kind: type[HttpConnection]) -> HttpConnection:
        is_https = url.scheme == "https"
        try:
            transport, connection = await self._loop.create_connection(
                partial(kind, self._view, self._write_batch, self._response_limits, self._monotonic),
                str(address),
                url.port,
                ssl=self._tls_context() if is_https else None,
                server_hostname=url.host if is_https else None,
                ssl_handshake_timeout=self._limits.tls_seconds if is_https else None,
            )
        except ssl.SSLError as error:
            why = getattr(error, "verify_message", "") or error.reason or "no TLS"
            raise EgressFault(FaultKind.TLS_FAILED, f"{url.authority}: the TLS handshake failed ({why}).") from None
        except OSError as error:
            why = os.strerror(error.errno) if error.errno else type(error).__name__
            if is_https and error.errno is None:  # raised by asyncio: TCP connected, the handshake did not end
                sentence = f"{url.authority}: the TLS handshake was not completed."
                raise EgressFault(FaultKind.TLS_FAILED, sentence) from None
            is_ours = error.errno in _OUR_ERRORS
            if is_ours:
                self._close_longest_idle(FREED_AT_A_TIME)
            kind_of_fault = FaultKind.OUR_SOCKETS if is_ours else FaultKind.CONNECT_FAILED
            raise EgressFault(kind_of_fault, f"{url.authority} could not be connected to ({why}).") from None
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


def _fault_of_all(addresses: list[Address], faults: list[EgressFault]) -> EgressFault:
    """Return the fault of a name none of whose addresses could be connected to; its message has each one's.

    Its kind is the last one's, unless a later address was only silent: what an address said tells more.
    """
    said = [fault for fault in faults if not isinstance(fault, ConnectTimedOut)]
    chosen = (said or faults)[-1]
    if len(faults) > 1:
        each = zip(addresses, faults, strict=True)
        chosen.message = " ".join(f"{address}: {fault.message}" for address, fault in each)
    return chosen
