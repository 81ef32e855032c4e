"""What httpx raises, told as exceptions of ours: what happened and what to do."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator

import httpx

from lucid_compute.client.errors import ConnectionFailed, LucidClientError, TimedOut, TlsFailed, UnexpectedAnswer

_LOST = ("disconnected", "closed connection")  # how httpcore and h11 say that the peer has left


def read_fault(error: httpx.HTTPError | httpx.InvalidURL | TimeoutError, url: str, seconds: float) -> LucidClientError:
    """Answer what came of an attempt at `url` that was allowed `seconds`, and ended in `error`."""
    is_plain = url.startswith("http:")
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        return _read_timeout(error, url, seconds)
    if isinstance(error, httpx.ConnectError):
        return _read_connect_fault(error, url)
    if isinstance(error, httpx.RemoteProtocolError) and not any(word in str(error) for word in _LOST):
        other = "https" if is_plain else "http"
        return UnexpectedAnswer(
            f"What answers at {url} is not HTTP. Is it another service's port, or is {other}:// meant?", code="NOT_HTTP"
        )
    if isinstance(error, httpx.NetworkError | httpx.RemoteProtocolError):
        return ConnectionFailed(
            f"The connection to {url} broke before the whole answer was there. Try again; if it goes on, look at the "
            f"service's log and at the proxies before it{', or write https:// if it speaks TLS' * is_plain}.",
            code="CONNECTION_LOST",
        )
    return LucidClientError(f"The request could not be written ({type(error).__name__}). Report this as a bug.")


def _read_timeout(error: httpx.TimeoutException | TimeoutError, url: str, seconds: float) -> LucidClientError:
    if isinstance(error, httpx.ConnectTimeout):
        return ConnectionFailed(
            f"No connection to {url} comes about in time. Is it the right address, and does a firewall let it pass"
            f"{'? If it speaks plain HTTP, write http://.' if url.startswith('https:') else '?'}",
            code="CONNECT_TIMED_OUT",
            is_certainly_undone=True,
        )
    if isinstance(error, httpx.PoolTimeout):
        message = "More calls run at a time than connections are allowed. Let fewer run at a time."
        return TimedOut(message, is_certainly_undone=True)
    return TimedOut(f"{url} did not answer within {seconds:.3g} s. It may have done it nevertheless.")


def _read_connect_fault(error: httpx.ConnectError, url: str) -> ConnectionFailed:
    for cause in _causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return TlsFailed(
                f"The certificate of {url} is not trusted: {cause.verify_message}. Use the name that it was made "
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
        f"No connection to {url} comes about. Is there a network, and a route to it?", is_certainly_undone=True
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Answer the error and all that led to it, groups of them too."""
    waiting, seen = [error], set[int]()
    while waiting:
        cause = waiting.pop(0)
        if id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [each for each in (cause.__cause__, cause.__context__) if each is not None]
            waiting += cause.exceptions if isinstance(cause, BaseExceptionGroup) else ()
