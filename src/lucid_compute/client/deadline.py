"""Connections of the synchronous client that end with the attempt.

httpx's timeouts are for each read: a peer that drips a byte at a time outlives any of them. asyncio can cut off a task;
a thread can't be, so here each wait for the network ends when the attempt's time does.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable

import httpcore
import httpx

DEADLINE = "deadline"  # the extension of a request: an instant of time.monotonic
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class DeadlineTransport(httpx.HTTPTransport):
    """Sends requests whose extension `deadline` bounds everything, until their answers are read."""

    def __init__(self, tls: ssl.SSLContext | bool, limits: httpx.Limits) -> None:
        """Connect with `tls`; False is for addresses that need none."""
        super().__init__(verify=tls, trust_env=False, limits=limits)
        self._of_thread = threading.local()
        # The transport of httpx takes no backend, its pool does.
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls if isinstance(tls, ssl.SSLContext) else None,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Backend(self._of_thread),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send it, bounded by its deadline; the thread that sends it also reads the answer."""
        self._of_thread.deadline = request.extensions.get(DEADLINE)
        return super().handle_request(request)


class _Backend(httpcore.NetworkBackend):
    def __init__(self, of_thread: threading.local) -> None:
        self._of_thread = of_thread
        self._inner = httpcore.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[SocketOption] | None = None,
    ) -> httpcore.NetworkStream:
        bound = _bound(self._of_thread, timeout, httpcore.ConnectTimeout)
        stream = self._inner.connect_tcp(host, port, bound, local_address, socket_options)
        return _Stream(stream, self._of_thread)


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream, of_thread: threading.local) -> None:
        self._inner, self._of_thread = inner, of_thread

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _bound(self._of_thread, timeout, httpcore.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, _bound(self._of_thread, timeout, httpcore.WriteTimeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        bound = _bound(self._of_thread, timeout, httpcore.ConnectTimeout)
        return _Stream(self._inner.start_tls(ssl_context, server_hostname, bound), self._of_thread)

    def get_extra_info(self, info: str) -> object:
        return self._inner.get_extra_info(info)


def _bound(of_thread: threading.local, timeout: float | None, late: type[httpcore.TimeoutException]) -> float | None:
    """Answer how long the network may be waited for, at most `timeout`."""
    deadline = getattr(of_thread, "deadline", None)
    if deadline is None:
        return timeout
    left = float(deadline) - time.monotonic()
    if left <= 0:
        raise late("the attempt's time is over")
    return left if timeout is None else min(timeout, left)
