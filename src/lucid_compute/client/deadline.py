"""The synchronous client's connections: every wait for the network ends at the deadline of the attempt.

The timeouts of httpx hold for each read. A peer that sends one byte of a response head now and then outlives them, and
httpx returns to its caller only after the whole head, so no loop over the body can stop that. asyncio cancels a task; a
blocked thread can't be cancelled. httpx gives no access to the network backend, so this transport stands on the public
API of httpcore, the library below httpx.
"""

from __future__ import annotations

import ssl
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import cast

import httpcore
import httpx

DEADLINE = "deadline"  # the extension of a request: an instant of time.monotonic
SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]
# httpx names its exceptions as httpcore does. Subclasses come before their base classes.
_ERRORS: dict[type[Exception], type[httpx.TransportError]] = {
    httpcore.ConnectTimeout: httpx.ConnectTimeout,
    httpcore.ReadTimeout: httpx.ReadTimeout,
    httpcore.WriteTimeout: httpx.WriteTimeout,
    httpcore.PoolTimeout: httpx.PoolTimeout,
    httpcore.ConnectError: httpx.ConnectError,
    httpcore.ReadError: httpx.ReadError,
    httpcore.WriteError: httpx.WriteError,
    httpcore.RemoteProtocolError: httpx.RemoteProtocolError,
    httpcore.LocalProtocolError: httpx.LocalProtocolError,
    httpcore.UnsupportedProtocol: httpx.UnsupportedProtocol,
    httpcore.TimeoutException: httpx.TimeoutException,
    httpcore.NetworkError: httpx.NetworkError,
    httpcore.ProtocolError: httpx.ProtocolError,
}


class DeadlineTransport(httpx.BaseTransport):
    """Sends requests whose extension `deadline` bounds everything, up to the last byte of the response."""

    def __init__(self, tls: ssl.SSLContext | bool, limits: httpx.Limits) -> None:
        """Prepare a pool of connections; `tls` False is for addresses without TLS."""
        self._of_thread = threading.local()
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls if isinstance(tls, ssl.SSLContext) else None,
            max_connections=limits.max_connections,
            max_keepalive_connections=limits.max_keepalive_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Backend(self._of_thread),
        )

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send the request. The thread that sends it must also read the response: the deadline is per thread."""
        self._of_thread.deadline = request.extensions.get(DEADLINE)
        url = request.url
        with _httpx_errors():
            response = self._pool.handle_request(
                httpcore.Request(
                    method=request.method,
                    url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=cast("Iterable[bytes]", request.stream),
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            status_code=response.status,
            headers=response.headers,
            stream=_Body(response),
            extensions=response.extensions,
        )

    def close(self) -> None:
        """Close every connection."""
        self._pool.close()


class _Body(httpx.SyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __iter__(self) -> Iterator[bytes]:
        with _httpx_errors():
            yield from self._response.iter_stream()

    def close(self) -> None:
        self._response.close()


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


@contextmanager
def _httpx_errors() -> Iterator[None]:
    try:
        yield
    except tuple(_ERRORS) as error:
        kind = next(kind for known, kind in _ERRORS.items() if isinstance(error, known))
        raise kind(str(error)) from error


def _bound(of_thread: threading.local, timeout: float | None, late: type[httpcore.TimeoutException]) -> float | None:
    """Return how many seconds a wait may take, at most `timeout`.

    Raises:
        TimeoutException: the deadline has passed; its class is `late`.
    """
    deadline = getattr(of_thread, "deadline", None)
    if deadline is None:
        return timeout
    left = float(deadline) - time.monotonic()
    if left <= 0:
        raise late("the deadline of the attempt has passed")
    return left if timeout is None else min(timeout, left)
