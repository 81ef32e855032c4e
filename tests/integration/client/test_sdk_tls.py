"""TLS between the SDK and the service: the key goes to nobody who can't prove their name."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from lucid_compute.client import errors
from tests.authority import Authority, make_authority
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.sdk import KINDS, Kind, speaker

ALIVE = Behaviour(answer=respond(b'{"status":"ok"}'))
LOOPBACK = "IP:127.0.0.1"


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """An authority that nobody trusts unless told to."""
    return make_authority(tmp_path)


async def ask(kind: Kind, url: str, **options: Any) -> Any:
    """Ask whether the service is alive."""
    async with speaker(kind, url, **options) as client:
        return await client.ask(lambda lucid: lucid.healthz())


async def failure(kind: Kind, url: str, **options: Any) -> errors.LucidClientError:
    """What asking ends in."""
    with pytest.raises(errors.LucidClientError) as raised:
        await ask(kind, url, **options)
    return raised.value


@pytest.mark.parametrize("kind", KINDS)
async def test_a_private_authority_is_trusted_when_it_is_named(
    kind: Kind, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By `ca_file`, or as the system's."""
    async with FaultNode(ALIVE, tls=authority.issue(LOOPBACK)) as node:
        assert (await ask(kind, node.url, ca_file=authority.certificate)).status == "ok"
        monkeypatch.setenv("SSL_CERT_FILE", str(authority.certificate))
        assert (await ask(kind, node.url)).status == "ok"


@pytest.mark.parametrize("kind", KINDS)
async def test_who_is_not_trusted_hears_no_key(kind: Kind, authority: Authority) -> None:
    """An unknown authority, another's name: no request is sent, none is repeated, and the sentence says which."""
    async with FaultNode(ALIVE, tls=authority.issue(LOOPBACK)) as node:
        unknown = await failure(kind, node.url, retries=3)
        assert "ca_file" in str(unknown)
    async with FaultNode(ALIVE, tls=authority.issue("DNS:other.example")) as other:
        mistaken = await failure(kind, other.url, retries=3, ca_file=authority.certificate)
        assert "127.0.0.1" in str(mistaken)
    for error in (unknown, mistaken):
        assert (type(error), error.code) == (errors.TlsFailed, "CERTIFICATE_NOT_TRUSTED")
    assert (node.requests, other.requests) == ([], [])
    assert (node.connections, other.connections) == (0, 0)  # no handshake was finished


@pytest.mark.parametrize("kind", KINDS)
async def test_a_wrong_scheme_is_told(kind: Kind, authority: Authority) -> None:
    """TLS where plain HTTP is spoken, and the other way round."""
    refuses = Behaviour(greeting=b"HTTP/1.1 400 Said\r\n\r\n")  # what servers of HTTP say to a client's TLS
    async with FaultNode(refuses) as plain, FaultNode(ALIVE, tls=authority.issue(LOOPBACK)) as node:
        error = await failure(kind, plain.url.replace("http:", "https:"), retries=3)
        assert isinstance(error, errors.TlsFailed)
        assert "http://" in str(error)
        error = await failure(kind, node.url.replace("https:", "http:"))
        assert "https://" in str(error)
        assert node.requests == plain.requests == []


@pytest.mark.parametrize("kind", KINDS)
async def test_a_handshake_that_never_ends_is_ended(kind: Kind) -> None:
    """A port that takes connections and says nothing."""
    async with FaultNode(Behaviour(cut_head_after=0)) as node:
        began = time.monotonic()
        error = await failure(kind, node.url.replace("http:", "https:"), timeout_seconds=0.3)
        assert isinstance(error, errors.ConnectionFailed | errors.TimedOut)
        assert time.monotonic() - began < 3


@pytest.mark.parametrize("kind", KINDS)
async def test_certificates_that_cannot_be_read_are_told_at_once(kind: Kind, tmp_path: Path) -> None:
    """Nobody has to call to learn of it."""
    (tmp_path / "odd.pem").write_text("no certificate")
    for path in (tmp_path / "none.pem", tmp_path / "odd.pem"):
        with pytest.raises(errors.ConfigurationFault, match="ca_file"):
            kind("https://127.0.0.1", ca_file=path)
