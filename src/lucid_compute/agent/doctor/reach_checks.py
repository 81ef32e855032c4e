"""Checks of the way from the registry to the node: its probe, and the certificate of the node's URL."""

from __future__ import annotations

import asyncio
import ssl
from datetime import UTC, datetime
from typing import NamedTuple

from lucid_compute.agent.doctor.check import CheckFinding, DoctorContext, failed, passed, skipped, warned
from lucid_compute.agent.settings import is_loopback
from lucid_compute.client.errors import NotFound, RateLimited
from lucid_compute.gateway.shapes import ProbeAnswer, ProbeCode

EXPIRES_SOON_DAYS = 14
TLS_SECONDS = 5.0
_PORTS = {"http": 80, "https": 443}
# OpenSSL's X509_V_ERR_…: CERT_HAS_EXPIRED; HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH; the codes for an unknown issuer.
_EXPIRED = 10
_OTHER_NAMES = frozenset({62, 64})
_UNKNOWN_ISSUERS = frozenset({18, 19, 20, 21})
# `{set_url}` is the command that changes the registered URL.
PROBE_FIXES = {
    ProbeCode.MODEL_MISSING: "Load what is missing, or declare what the server lists: lucid agent run declares it",
    ProbeCode.ADDRESS_REFUSED: "Register an address that the service may connect to: {set_url}",
    ProbeCode.ROUTING_LOOP: "Register the inference server's own URL, not the service's: {set_url}",
    ProbeCode.NAME_UNKNOWN: "Register a name that resolves where the service runs, or an address: {set_url}",
    ProbeCode.CONNECT_FAILED: "Let the inference server listen on 0.0.0.0, on the port of the registered URL.",
    ProbeCode.CONNECT_TIMED_OUT: "Open the node's firewall for the service, on the port of the registered URL. "
    "Or do without an open port: lucid agent run --outbound",
    ProbeCode.TLS_FAILED: "Serve a valid certificate for the name in the registered URL, with its whole chain.",
    ProbeCode.CONNECTION_LOST: "Read the logs of the inference server and its proxy: one of them closes connections.",
    ProbeCode.FIRST_BYTE_TIMEOUT: "Restart the inference server: it takes the request and does not answer.",
    ProbeCode.BAD_RESPONSE: "Register the URL of the inference server itself; the response is not HTTP/1.1: {set_url}",
    ProbeCode.BAD_STATUS: "Register the base URL, below which /models answers: {set_url}",
    ProbeCode.REDIRECTED: "Register the URL that it redirects to: {set_url}",
    ProbeCode.AUTH_REFUSED: "Register the server's key: lucid passports update {node} --set inferenceKey=…",
    ProbeCode.NOT_JSON: "Register the base URL, below which /models lists models: {set_url}",
    ProbeCode.NOT_CONNECTED: "Start the node's agent, or see why it does not connect: lucid agent run --outbound",
    ProbeCode.OUR_RESOLVER: "The service's DNS did not answer, perhaps for this name alone: ask its operator.",
    ProbeCode.OUR_SOCKETS: "The service has no connections left: ask its operator, or try again.",
}
_LOOPBACK_FIX = "Register the address at which the service reaches this machine: {set_url}"


class Certificate(NamedTuple):
    """The result of a TLS handshake from here: when the certificate ends, or why it is not valid."""

    expires_at: datetime | None
    refusal: ssl.SSLCertVerificationError | None = None


async def check_probe(context: DoctorContext) -> CheckFinding:
    """Does the registry reach the inference server?"""
    try:
        context.probe = answer = await context.lucid.compute.probe(context.node.id)
    except RateLimited as error:
        return skipped(f"{error.message} Run lucid doctor again in a moment.")
    except NotFound:
        return skipped("The service is older than this command and has no probe.")
    if answer.code is ProbeCode.OK:
        took = f"connected in {answer.connect_ms or 0:.0f} ms, answered in {answer.answer_ms or 0:.0f} ms"
        return passed(f"The service reaches {_place(context)}: {took}.")
    fix = PROBE_FIXES[answer.code]
    if _means_the_registry_itself(context, answer):
        fix = _LOOPBACK_FIX
    set_url = f"lucid passports update {context.called} --set inferenceUrl=URL"
    return failed(
        f"The service went to {_place(context)}: {answer.message}",
        fix.format(set_url=set_url, node=context.called),
    )


async def check_tls(context: DoctorContext) -> CheckFinding:
    """Is the certificate of the registered URL valid, and for how long?"""
    if context.is_outbound:
        return skipped("The node's agent connects to the service, and checks the service's certificate.")
    if context.registered.scheme != "https":
        return skipped("The registered URL is plain http.")
    try:
        seen = await _look_at_certificate(context)
    except (OSError, TimeoutError):
        return _judge_probed(context)
    return _judge_expiry(seen.expires_at) if seen.refusal is None else _judge_refusal(context, seen.refusal)


def _place(context: DoctorContext) -> str:
    """Return where the service went."""
    return "the node down its agent's connection" if context.is_outbound else context.registered_url


def _judge_refusal(context: DoctorContext, refusal: ssl.SSLCertVerificationError) -> CheckFinding:
    host, code = context.registered.hostname, refusal.verify_code
    sentence = f"The certificate of {host} is not valid: {refusal.verify_message.rstrip('.')}."
    if code == _EXPIRED:
        return failed(sentence, f"Renew the certificate of {host}, and have the server load it.")
    if code in _OTHER_NAMES:
        return failed(sentence, f"Get a certificate that names {host}, or register the URL with the name that it has.")
    if code in _UNKNOWN_ISSUERS:
        return failed(sentence, "Serve a certificate of a public authority, with its whole chain: fullchain.pem.")
    return failed(sentence, f"Serve a valid certificate for {host}.")


def _means_the_registry_itself(context: DoctorContext, answer: ProbeAnswer) -> bool:
    """Return whether the URL says localhost, to a service that runs on another machine."""
    is_unreached = answer.code in {ProbeCode.ADDRESS_REFUSED, ProbeCode.CONNECT_FAILED}
    return is_unreached and is_loopback(context.registered_url) and not context.is_local_registry


async def _look_at_certificate(context: DoctorContext) -> Certificate:
    """Do a TLS handshake with the server at the registered URL.

    Raises:
        OSError, TimeoutError: it can't be reached from here, or the handshake fails.
    """
    parts = context.registered
    port = parts.port or _PORTS[parts.scheme]
    try:
        async with asyncio.timeout(TLS_SECONDS):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=ssl.create_default_context())
    except ssl.SSLCertVerificationError as error:
        return Certificate(None, error)
    certificate = writer.get_extra_info("peercert") or {}
    writer.transport.abort()
    ends = certificate.get("notAfter")
    return Certificate(None if ends is None else datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC))


def _judge_probed(context: DoctorContext) -> CheckFinding:
    """Judge by what the registry saw, when nothing can be seen from here."""
    probe: ProbeAnswer | None = getattr(context, "probe", None)
    if probe is None or probe.tls is None:
        return skipped("No TLS handshake was possible from here; what the service saw is above.")
    return _judge_expiry(probe.tls.certificate_expires_at)


def _judge_expiry(expires_at: datetime | None) -> CheckFinding:
    if expires_at is None:
        return passed("The certificate is valid.")
    days = (expires_at - datetime.now(UTC)).total_seconds() / 86400
    sentence = f"The certificate is valid until {expires_at:%Y-%m-%d %H:%MZ}, {days:.0f} days from now."
    if days < EXPIRES_SOON_DAYS:
        return warned(sentence, "Renew it now, and look whether its renewal still runs.")
    return passed(sentence)
