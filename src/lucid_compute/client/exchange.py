"""What an exchange over HTTP needs in both clients: the request of a call, the bounds of its answer."""

from __future__ import annotations

import platform
import ssl
from collections.abc import Mapping
from typing import Any, TypeVar

import httpx

from lucid_compute import __version__
from lucid_compute.client.answers import Received, read_answer
from lucid_compute.client.attempts import RetryPolicy
from lucid_compute.client.call import Call
from lucid_compute.client.deadline import DEADLINE
from lucid_compute.client.errors import ConfigurationFault, UnexpectedAnswer
from lucid_compute.client.settings import ClientSettings

T = TypeVar("T")
MAX_ANSWER_BYTES = 64 * 1024 * 1024
CONNECT_SECONDS = 5.0
# Of an attempt, for TCP and again for TLS: httpcore leaves the socket of a handshake open when it is cancelled.
CONNECT_SHARE = 0.45
# Shorter than the 5 s after which uvicorn closes an idle connection, so that none is used in the instant it closes.
LIMITS = httpx.Limits(max_connections=100, max_keepalive_connections=20, keepalive_expiry=4.0)


class Exchange:
    """Builds requests and reads answers as the settings say; holds the key, and shows it to nobody."""

    def __init__(self, settings: ClientSettings) -> None:
        """Speak to the service of `settings`."""
        self.base_url = settings.base_url
        self._key = settings.api_key
        self.policy = RetryPolicy(settings.retries, settings.timeout_seconds, settings.total_timeout_seconds)

    def __repr__(self) -> str:
        """Answer the address alone."""
        return f"Exchange({self.base_url!r})"

    def request(self, call: Call[Any], request_id: str, seconds: float, deadline: float) -> httpx.Request:
        """Answer the request of a call that may take `seconds`, until `deadline` of the clock.

        The service logs it under `request_id`, so that one without an answer can be looked for too.
        """
        headers = {
            "Accept": "application/json",
            "Accept-Encoding": "identity",  # an answer can't be larger than what comes over the wire
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

    def read(self, call: Call[T], status: int, headers: Mapping[str, str], content: bytes) -> T:
        """Answer what the service answered."""
        received = Received(status, headers, content)
        return read_answer(call, received, base_url=self.base_url, has_key=self._key is not None)

    def require_size(self, size: int) -> None:
        """Refuse an answer of more bytes than any of the service's has.

        Raises:
            UnexpectedAnswer: it is.
        """
        if size > MAX_ANSWER_BYTES:
            raise UnexpectedAnswer(
                f"{self.base_url} answers more than {MAX_ANSWER_BYTES >> 20} MiB. Is it the address of lucid serve?",
                code="ANSWER_TOO_LARGE",
            )


def tls_of(settings: ClientSettings) -> ssl.SSLContext | bool:
    """Answer whom to trust: the system's authorities and certifi's, or those of `ca_file` alone; False without TLS.

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
