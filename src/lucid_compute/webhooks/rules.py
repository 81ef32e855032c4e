"""Webhooks: which events there are, how a delivery is signed and checked, when a failed one is tried again. Pure."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from hashlib import sha256

from lucid_compute.egress.policy import MAX_URL_CHARACTERS, EgressPolicy, ProviderUrl
from lucid_compute.wire import backoff_seconds

TEST_EVENT = "webhook.test"
SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with, and none itself
FIRST_RETRY_SECONDS = 5.0
LONGEST_RETRY_SECONDS = 3600.0
TRIED_FOR = timedelta(days=1)
SIGNATURE_IS_GOOD_FOR = timedelta(minutes=5)
_SIGNATURE = re.compile(r"t=([0-9]{1,12})((?:,v1=[0-9a-f]{64}){1,4})")
FORMER_SECRET_SIGNS_FOR = timedelta(days=1)


class BadSignature(ValueError):
    """A delivery was not signed with this secret, or not just now."""


def sign(secrets: Iterable[str], body: bytes, at: datetime) -> str:
    """Return the header `Lucid-Signature` of a body that is sent at `at`: HMAC-SHA256 over `<seconds>.<body>`.

    Each of the secrets signs: there are two while receivers change over from one to the next.
    """
    seconds = int(at.timestamp())
    return ",".join([f"t={seconds}", *(f"v1={_digest(secret, seconds, body)}" for secret in secrets)])


def verify(secret: str, body: bytes, signature: str, now: datetime) -> None:
    """Return if the header `Lucid-Signature` was made with the secret, for this body and within five minutes of `now`.

    Raises:
        BadSignature: saying which of these is not so.
    """
    match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise BadSignature("Lucid-Signature does not read t=<seconds>,v1=<64 hexadecimal digits>.")
    seconds = int(match[1])
    digest = _digest(secret, seconds, body)
    if not any(hmac.compare_digest(digest, signed) for signed in match[2].split(",v1=")):
        raise BadSignature("The delivery was not signed with this secret, or its body was changed.")
    if abs(now.timestamp() - seconds) > SIGNATURE_IS_GOOD_FOR.total_seconds():
        raise BadSignature("The delivery was not signed just now: it is a repeated one, or a clock is wrong.")


def retry_seconds(attempts: int, chance: float) -> float:
    """Return how long to wait after `attempts` that failed: doubling up to an hour, times 0.5 to 1.5 by `chance`."""
    return backoff_seconds(
        attempts, first_seconds=FIRST_RETRY_SECONDS, longest_seconds=LONGEST_RETRY_SECONDS, jitter=0.5 + chance
    )


def _digest(secret: str, seconds: int, body: bytes) -> str:
    return hmac.new(secret.encode(), b"%d.%b" % (seconds, body), sha256).hexdigest()


MASK = "***"
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_PARTS = re.compile(r"[^:/?#]*://[^/?#]*([^?#]*)(.*)", re.DOTALL)


def check_webhook_url(policy: EgressPolicy, text: str) -> ProviderUrl:
    """Read a webhook's URL, and check all that is known of it before its name is resolved.

    Raises:
        ValueError: a sentence that says what to send, and quotes nothing of the query.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"The URL is longer than {MAX_URL_CHARACTERS} characters; send a shorter one.")
    if "#" in text:
        raise ValueError("The URL has a fragment, which is never sent; send it without # and what follows.")
    base, _, query = text.partition("?")
    if not _QUERY.fullmatch(query):
        raise ValueError("The query has a character that is not allowed there; percent-encode it.")
    return policy.check_url(base)


def target_of(url: str) -> str:
    """Return what a request asks for at a URL that was checked: its path and query, as they were written."""
    match = _PARTS.fullmatch(url)
    path, query = match.groups() if match else ("", "")
    return f"{path or '/'}{query}"


def masked(url: str) -> str:
    """Return the URL as it may be shown: of its query the names that have a value, and no value."""
    base, mark, query = url.partition("?")
    return f"{base}?{'&'.join(map(_mask, query.split('&')))}" if query else base + mark


def _mask(part: str) -> str:
    name, _, value = part.partition("=")
    return f"{name}={MASK}" if value.strip("=") else MASK  # a bare word may be the token, with = to fill it up
