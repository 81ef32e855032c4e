"""Connections for special requests: probes, which report the TLS session, and webhooks, which need only a status."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime
from typing import NamedTuple

from lucid_compute.egress.connection import HttpConnection
from lucid_compute.egress.faults import FaultKind


class TlsSession(NamedTuple):
    """The TLS version, and when the peer's certificate expires; None if that is unreadable."""

    version: str
    certificate_expires_at: datetime | None


class ProbeConnection(HttpConnection):
    """A connection whose `tls` is its TLS session, None over plain http."""

    __slots__ = ("tls",)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and the TLS session."""
        super().connection_made(transport)
        self.tls = _session_of(transport)


def _session_of(transport: asyncio.BaseTransport) -> TlsSession | None:
    session = transport.get_extra_info("ssl_object")
    if session is None:
        return None
    certificate = transport.get_extra_info("peercert") or {}
    return TlsSession(session.version() or "unknown", _instant(certificate.get("notAfter")))


def _instant(text: str | None) -> datetime | None:
    try:
        return None if text is None else datetime.fromtimestamp(ssl.cert_time_to_seconds(text), UTC)
    except (ValueError, OverflowError):
        return None


class HeadOnlyConnection(HttpConnection):
    """A connection for one request, whose response is complete with its head; the body is dropped."""

    __slots__ = ()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Ignore it: the body's framing does not matter."""

    def on_headers_complete(self) -> None:
        """End the response, unless it is an interim one."""
        super().on_headers_complete()
        self.is_whole = self.has_head

    def on_body(self, part: bytes) -> None:
        """Drop the body."""

    def _refuse(self, message: str, kind: FaultKind = FaultKind.BAD_RESPONSE) -> None:
        if not self.has_head:
            super()._refuse(message, kind)
