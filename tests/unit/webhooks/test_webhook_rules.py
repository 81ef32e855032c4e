"""Webhooks' pure rules: signatures that hold for one secret, one body and a while, and pauses that grow."""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta

import pytest

from lucid_compute.client import read_webhook
from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.webhooks.rules import (
    BadSignature,
    check_webhook_url,
    masked,
    request_target,
    retry_seconds,
    sign,
    verify,
)
from tests.factories import NOW


def test_a_signature_is_hmac_sha256_over_the_seconds_and_the_body() -> None:
    """Computed here by hand, as a receiver in any language does."""
    seconds = int(NOW.timestamp())
    by_hand = hmac.new(b"whsec_x", f"{seconds}.".encode() + b'{"a":1}', hashlib.sha256).hexdigest()
    assert sign(["whsec_x"], b'{"a":1}', NOW) == f"t={seconds},v1={by_hand}"


def test_a_signature_holds_for_its_secret_its_body_and_five_minutes() -> None:
    """Anything else is refused, and says why."""
    signed = sign(["s"], b"body", NOW)
    verify("s", b"body", signed, NOW)
    verify("s", b"body", signed, NOW + timedelta(minutes=5))
    verify("s", b"body", signed, NOW - timedelta(minutes=4, seconds=59))
    for secret, body, signature, at, why in (
        ("other", b"body", signed, NOW, "not signed with this secret"),
        ("s", b"another", signed, NOW, "its body was changed"),
        ("s", b"body", signed.replace("t=", "t=1"), NOW, "not signed with this secret"),
        ("s", b"body", signed, NOW + timedelta(minutes=5, seconds=2), "not signed just now"),
        ("s", b"body", signed, NOW - timedelta(minutes=6), "not signed just now"),
        *(
            ("s", b"body", text, NOW, "does not read")
            for text in ("", "t=,v1=", "v1=00", signed + " ", f"t=-1{signed}")
        ),
    ):
        with pytest.raises(BadSignature, match=why):
            verify(secret, body, signature, at)


def test_pauses_double_up_to_an_hour_and_differ_by_chance() -> None:
    """The last ones are short enough for a dozen attempts in a day."""
    assert [retry_seconds(attempts, 0.5) for attempts in (1, 2, 3)] == [5, 10, 20]
    assert retry_seconds(1, 0.0) == 2.5
    assert retry_seconds(10, 0.5) == 2560
    assert retry_seconds(11, 0.5) == retry_seconds(10_000, 0.5) == 3600
    assert retry_seconds(10_000, 0.999) < 2 * 3600


def test_while_a_secret_is_changed_both_sign() -> None:
    """The new one first; a receiver may know either."""
    signed = sign(["new", "old"], b"body", NOW)
    assert signed.startswith(sign(["new"], b"body", NOW) + ",v1=")
    for secret in ("new", "old"):
        verify(secret, b"body", signed, NOW)
    with pytest.raises(BadSignature, match="not signed with this secret"):
        verify("another", b"body", signed, NOW)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://host:8443/a/v1/", "/a/v1/"),
        ("https://host", "/"),
        ("https://host/", "/"),
        ("https://host?x=a/b", "/?x=a/b"),
        ("https://host/a?", "/a?"),
        ("https://host/a?b=c?d://e&f", "/a?b=c?d://e&f"),
        ("http://[2001:4860::1]:8080/a?b", "/a?b"),
    ],
)
def test_path_and_query_are_sent_as_they_were_written(url: str, target: str) -> None:
    """With the slash and the /v1 at its end, which a provider's URL would lose."""
    check_webhook_url(EgressPolicy(), url)
    assert request_target(url) == target


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://host/a", "https://host/a"),
        ("https://host/a?", "https://host/a?"),
        ("https://host/a?token=x=y&b&c=", "https://host/a?token=***&***&***"),
        ("https://host/a?x/y?z=1", "https://host/a?x/y?z=***"),
        ("https://host?x", "https://host?***"),
        ("https://host/a?dG9rZQ==", "https://host/a?***"),
    ],
)
def test_of_a_query_only_names_are_shown(url: str, shown: str) -> None:
    assert masked(url) == shown


def test_a_receiver_reads_an_event_that_is_from_us() -> None:
    """Also one of a newer service; what is signed and no event is refused like what is not signed."""
    body = b'{"id":"e","type":"node.exploded","occurredAt":"2026-11-24T21:00:00.000Z","passportId":"p","new":1}'
    event = read_webhook("s", body, sign(["s"], body, NOW), now=NOW)
    assert (event.id, event.type, event.passport_id, event.owner, event.details) == (
        "e",
        "node.exploded",
        "p",
        None,
        {},
    )
    for secret, sent in (("other", body), ("s", b"[]"), ("s", b"no JSON")):
        with pytest.raises(BadSignature):
            read_webhook(secret, sent, sign(["s"], sent, NOW), now=NOW)
