"""Webhooks' pure rules: signatures that hold for one secret, one body and a while, and pauses that grow."""

from __future__ import annotations

import hashlib
import hmac
from datetime import timedelta

import pytest

from lucid_compute.webhook_rules import BadSignature, path_of, retry_seconds, sign, verify
from tests.factories import NOW


def test_a_signature_is_hmac_sha256_over_the_seconds_and_the_body() -> None:
    """Computed here by hand, as a receiver in any language does."""
    seconds = int(NOW.timestamp())
    by_hand = hmac.new(b"whsec_x", f"{seconds}.".encode() + b'{"a":1}', hashlib.sha256).hexdigest()
    assert sign("whsec_x", b'{"a":1}', NOW) == f"t={seconds},v1={by_hand}"


def test_a_signature_holds_for_its_secret_its_body_and_five_minutes() -> None:
    """Anything else is refused, and says why."""
    signed = sign("s", b"body", NOW)
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


def test_a_path_is_sent_as_it_was_written() -> None:
    """With the slash and the /v1 at its end, which a provider's URL would lose."""
    assert path_of("https://host:8443/a/v1/") == "/a/v1/"
    assert path_of("https://host") == path_of("https://host/") == "/"
