"""Send calls over HTTP, from threads or from asyncio, and turn what httpx raises into the client's errors."""

from __future__ import annotations

import asyncio
import platform
import socket
import ssl
import time
from codecs import getincrementaldecoder
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from random import random as any_share
from typing import Any, TypeVar, cast
from uuid import uuid4

import httpx

from lucid_compute import __version__
from lucid_compute.client.answers import Received, read_answer
from lucid_compute.client.attempts import Attempts, RetryPolicy
from lucid_compute.client.call import ApiCall
from lucid_compute.client.deadline import DEADLINE, DeadlineTransport
from lucid_compute.client.errors import (
    ConfigurationFault,
    ConnectionFailed,
    LucidClientError,
    TimedOut,
    TlsFailed,
    UnexpectedAnswer,
)
from lucid_compute.client.settings import ClientSettings

T = TypeVar("T")
MAX_ANSWER_BYTES = 64 * 1024 * 1024
MAX_STREAM_SECONDS = 6 * 3600.0
MAX_REFUSAL_PIECES = 64  # of 64 KiB at most
CONNECT_SECONDS = 5.0
# The share of an attempt for TCP, and again for TLS. httpcore leaves a socket open when its handshake is cancelled,
# so the connect has to time out by itself before the attempt is cancelled.
CONNECT_SHARE = 0.45
# Shorter than the 5 s after which uvicorn closes an idle connection: no request goes to one that is being closed.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=4.0)


class RequestCodec:
    """Builds requests and reads responses. It holds the key and never shows it."""

    def __init__(self, settings: ClientSettings) -> None:
        self.base_url = settings.base_url
        self._key = settings.api_key
        self.policy = RetryPolicy(settings.retries, settings.timeout_seconds, settings.total_timeout_seconds)

    def __repr__(self) -> str:
        """Return the address, without the key."""
        return f"RequestCodec({self.base_url!r})"

    def request(self, call: ApiCall[Any], request_id: str, seconds: float, deadline: float) -> httpx.Request:
        """Return the request of a call that may take `seconds`, until `deadline` of time.monotonic.

        The service logs it under `request_id`, so a call without a response can be found there too.
        """
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # else a small response could unpack to a huge one
            "User-Agent": f"lucid-compute/{__version__} python/{platform.python_version()}",
            "X-Request-Id": request_id,
        }
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        if call.body is not None:
            headers["Content-Type"] = "application/json"
        if call.idempotency_key is not None:
            headers["Idempotency-Key"] = call.idempotency_key
        timeout = httpx.Timeout(seconds, connect=min(seconds * CONNECT_SHARE, CONNECT_SECONDS))
        return httpx.Request(
            call.method,
            f"{self.base_url}{call.path}",
            params=call.query or None,
            headers=headers,
            content=call.body,
            extensions={"timeout": timeout.as_dict(), DEADLINE: deadline},
        )

    def read(self, call: ApiCall[T], status: int, headers: Mapping[str, str], content: bytes) -> T:
        """Return the result of a call from its response.

        Raises:
            LucidClientError: the service refused, or the response is not the service's.
        """
        received = Received(status, headers, content)
        return read_answer(call, received, base_url=self.base_url, has_key=self._key is not None)

    def require_size(self, size: int) -> None:
        """Check that a response is not larger than any response of the service.

        Raises:
            UnexpectedAnswer: it is larger.
        """
        if size > MAX_ANSWER_BYTES:
            raise UnexpectedAnswer(
                f"{self.base_url} answers more than {MAX_ANSWER_BYTES >> 20} MiB. Is it the address of lucid serve?",
                code="ANSWER_TOO_LARGE",
            )


def tls_of(settings: ClientSettings) -> ssl.SSLContext | bool:
    """Return whom to trust: the system's authorities and certifi's, or those in `ca_file` only; False without TLS.

    Raises:
        ConfigurationFault: `ca_file` can't be read.
    """
    if not settings.is_tls:
        return False
    if settings.ca_file is None:
        context = httpx.create_ssl_context(trust_env=False)
        context.load_default_certs()
        return context
    try:
        return ssl.create_default_context(cafile=settings.ca_file)
    except OSError as error:
        raise ConfigurationFault(f"The certificates of ca_file {settings.ca_file} can't be read: {error}.") from None


class Streamed:
    """A response that is read while it comes. Header names are in lower case."""

    def __init__(self, response: httpx.Response, codec: RequestCodec) -> None:
        self.headers: Mapping[str, str] = response.headers
        self._response, self._codec = response, codec

    def lines(self, longest: int) -> Iterator[str]:
        """Iterate over the lines of text.

        Raises:
            UnexpectedAnswer: the response, or a line, is longer than any of the service.
        """
        decoder = getincrementaldecoder("utf-8")(errors="replace")
        size, rest = 0, ""
        for piece in self._response.iter_raw():
            size += len(piece)
            self._codec.require_size(size)
            *lines, rest = (rest + decoder.decode(piece)).split("\n")
            self._codec.require_size(MAX_ANSWER_BYTES + 1 if len(rest) > longest else 0)
            yield from lines
        if rest:
            yield rest


_FAULTS = (httpx.HTTPError, httpx.InvalidURL, TimeoutError)


class Transport:
    """Sends calls, from any thread, and keeps the connections for the next call."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        random: Callable[[], float] = any_share,
    ) -> None:
        """Prepare connections. `clock`, `sleep` and `random` decide the pauses between attempts."""
        self._clock, self._sleep, self._random = clock, sleep, random
        self.codec = RequestCodec(settings)
        self._http = httpx.Client(transport=DeadlineTransport(tls_of(settings), LIMITS), trust_env=False)

    def run(self, call: ApiCall[T]) -> T:
        """Send a call until it succeeds, is refused, or is out of time.

        Raises:
            LucidClientError: the error of the last attempt.
        """
        attempts = Attempts(call, self.codec.policy, now_seconds=self._clock(), random=self._random)
        request_id = uuid4().hex
        while True:
            try:
                return self._attempt(call, request_id, attempts.seconds_for_attempt(self._clock()))
            except LucidClientError as error:
                if attempts.is_done_by(error):
                    return cast("T", None)
                if (pause := attempts.find_pause_seconds(error, self._clock())) is None:
                    raise
            self._sleep(pause)

    @contextmanager
    def stream(self, call: ApiCall[Any], wait_seconds: float) -> Iterator[Streamed]:
        """Send a call once, and yield its response while it comes. `wait_seconds` bounds each wait for the next piece.

        Raises:
            LucidClientError: the service refused, the connection broke, or the response is not the service's.
        """
        request_id = uuid4().hex
        request = self.codec.request(call, request_id, wait_seconds, time.monotonic() + MAX_STREAM_SECONDS)
        try:
            response = self._http.send(request, stream=True, follow_redirects=False)
            try:
                if not response.is_success:
                    content = b"".join(islice(response.iter_raw(), MAX_REFUSAL_PIECES))
                    self.codec.read(call, response.status_code, response.headers, content)
                yield Streamed(response, self.codec)
            finally:
                response.close()
        except _FAULTS as error:
            fault = client_error_of(error, self.codec.base_url, wait_seconds)
            fault.request_id = request_id
            raise fault from error

    def close(self) -> None:
        """Close every connection."""
        self._http.close()

    def _attempt(self, call: ApiCall[T], request_id: str, seconds: float) -> T:
        request = self.codec.request(call, request_id, seconds, time.monotonic() + seconds)
        try:
            response = self._http.send(request, stream=True, follow_redirects=False)
            try:
                content = bytearray()
                for piece in response.iter_raw():
                    content += piece
                    self.codec.require_size(len(content))
            finally:
                response.close()
        except _FAULTS as error:
            fault = client_error_of(error, self.codec.base_url, seconds)
            fault.request_id = request_id
            raise fault from error
        return self.codec.read(call, response.status_code, response.headers, bytes(content))


class AsyncTransport:
    """Sends calls from one event loop, any number at a time, and keeps the connections for the next call."""

    def __init__(
        self,
        settings: ClientSettings,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        random: Callable[[], float] = any_share,
    ) -> None:
        """Prepare connections. `clock`, `sleep` and `random` decide the pauses between attempts."""
        self._clock, self._sleep, self._random = clock, sleep, random
        self.codec = RequestCodec(settings)
        transport = httpx.AsyncHTTPTransport(verify=tls_of(settings), trust_env=False, limits=LIMITS)
        self._http = httpx.AsyncClient(transport=transport, trust_env=False)

    async def run(self, call: ApiCall[T]) -> T:
        """Send a call until it succeeds, is refused, or is out of time.

        Raises:
            LucidClientError: the error of the last attempt.
        """
        attempts = Attempts(call, self.codec.policy, now_seconds=self._clock(), random=self._random)
        request_id = uuid4().hex
        while True:
            try:
                return await self._attempt(call, request_id, attempts.seconds_for_attempt(self._clock()))
            except LucidClientError as error:
                if attempts.is_done_by(error):
                    return cast("T", None)
                if (pause := attempts.find_pause_seconds(error, self._clock())) is None:
                    raise
            await self._sleep(pause)

    async def close(self) -> None:
        """Close every connection."""
        await self._http.aclose()

    async def _attempt(self, call: ApiCall[T], request_id: str, seconds: float) -> T:
        request = self.codec.request(call, request_id, seconds, time.monotonic() + seconds)
        try:
            async with asyncio.timeout(seconds):
                response = await self._http.send(request, stream=True, follow_redirects=False)
                try:
                    content = bytearray()
                    async for piece in response.aiter_raw():
                        content += piece
                        self.codec.require_size(len(content))
                finally:
                    await response.aclose()
        except _FAULTS as error:
            fault = client_error_of(error, self.codec.base_url, seconds)
            fault.request_id = request_id
            raise fault from error
        return self.codec.read(call, response.status_code, response.headers, bytes(content))


_LOST = ("disconnected", "closed connection")  # in the messages of httpcore and h11 when the peer closed the connection


def client_error_of(
    error: httpx.HTTPError | httpx.InvalidURL | TimeoutError, url: str, seconds: float
) -> LucidClientError:
    """Return the client's error for an attempt at `url` that was allowed `seconds` and ended in `error`."""
    is_plain = url.startswith("http:")
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return _read_timeout(error, url, seconds)
    if isinstance(error, httpx.ConnectError):
        return _read_connect_fault(error, url)
    if isinstance(error, httpx.RemoteProtocolError) and not any(word in str(error) for word in _LOST):
        other = "https" if is_plain else "http"
        return UnexpectedAnswer(
            f"The response of {url} is not HTTP. Is it another service's port, or is {other}:// meant?", code="NOT_HTTP"
        )
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return ConnectionFailed(
            f"The connection to {url} broke before the response was complete. Try again; if it goes on, look at the "
            f"service's log and at the proxies in front of it{', or write https:// if it speaks TLS' * is_plain}.",
            code="CONNECTION_LOST",
        )
    return LucidClientError(f"The request could not be sent ({type(error).__name__}). Report this as a bug.")


def _read_timeout(error: httpx.TimeoutException | TimeoutError, url: str, seconds: float) -> LucidClientError:
    if isinstance(error, httpx.ConnectTimeout):
        return ConnectionFailed(
            f"No connection to {url} in time. Is it the right address, and does a firewall let it pass"
            f"{'? If it speaks plain HTTP, write http://.' if url.startswith('https:') else '?'}",
            code="CONNECT_TIMED_OUT",
            is_certainly_undone=True,
        )
    if isinstance(error, httpx.PoolTimeout):
        message = "More calls run at a time than connections are allowed. Let fewer run at a time."
        return TimedOut(message, is_certainly_undone=True)
    return TimedOut(f"{url} did not answer within {seconds:.3g} s. The request may still have been done.")


def _read_connect_fault(error: httpx.ConnectError, url: str) -> ConnectionFailed:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsFailed(
                f"The certificate of {url} is not trusted: {cause.verify_message}. Use the name that it was issued "
                "for, or pass its authority's certificate as ca_file.",
                code="CERTIFICATE_NOT_TRUSTED",
                is_certainly_undone=True,
            )
        if isinstance(cause, ssl.SSLError):
            return TlsFailed(
                f"{url} does not speak TLS as it should ({cause.reason or 'it hung up'}). If it speaks plain "
                "HTTP, write the address with http://.",
                is_certainly_undone=True,
            )
        if isinstance(cause, socket.gaierror):
            return ConnectionFailed(
                f"The host of {url} can't be found. Check the name in LUCID_API_URL or base_url, and the DNS.",
                code="NAME_NOT_FOUND",
                is_certainly_undone=True,
            )
        if isinstance(cause, ConnectionRefusedError):
            return ConnectionFailed(
                f"Nothing listens at {url}. Does lucid serve run there, and is the port right?",
                code="CONNECTION_REFUSED",
                is_certainly_undone=True,
            )
    return ConnectionFailed(
        f"No connection to {url} is possible. Is there a network, and a route to it?", is_certainly_undone=True
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Iterate over the error and all errors that led to it, also those in groups."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [each for each in (cause.__cause__, cause.__context__) if each is not None]
            waiting += cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
