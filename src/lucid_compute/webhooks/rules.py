"""Rules of webhooks: signatures of deliveries, pauses between attempts, which URLs are allowed. Pure."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import NamedTuple

from lucid_compute.egress.policy import MAX_URL_CHARACTERS, EgressPolicy, ProviderUrl
from lucid_compute.wire import backoff_seconds

TEST_EVENT = "webhook.test"
SECRET_PREFIX = "whsec_"  # noqa: S105 - what every secret begins with, and none itself
LONGEST_RETRY_SECONDS = 3600.0
RETRY_WINDOW = timedelta(days=1)
SIGNATURE_TOLERANCE = timedelta(minutes=5)
_SIGNATURE = re.compile(r"t=([0-9]{1,12})((?:,v1=[0-9a-f]{64}){1,4})")
FORMER_SECRET_SIGNS_FOR = timedelta(days=1)


class WebhookLimits(NamedTuple):
    """Bounds of webhooks. A first retry comes after `first_retry_seconds`, the next ones after twice as long each.

    Of more than `max_waiting` deliveries that wait for one webhook the oldest are given up.
    """

    per_owner: int = 50
    max_waiting: int = 10_000
    poll_seconds: float = 1.0
    attempt_seconds: float = 10.0
    first_retry_seconds: float = 5.0


LIMITS = WebhookLimits()


class BadSignature(ValueError):
    """A delivery was not signed with this secret, or not within the last five minutes."""


def sign(secrets: Iterable[str], body: bytes, at: datetime) -> str:
    """Return the header `Lucid-Signature` of a body that is sent at `at`: HMAC-SHA256 over `<seconds>.<body>`.

    There is a signature by each of the secrets: two of them while receivers change from the previous to the new one.
    """
    seconds = int(at.timestamp())
    return ",".join([f"t={seconds}", *(f"v1={_digest(secret, seconds, body)}" for secret in secrets)])


def verify(secret: str, body: bytes, signature: str, now: datetime) -> None:
    """Check that the header `Lucid-Signature` was made with the secret, for this body, within five minutes of `now`.

    Raises:
        BadSignature: the header has another form, secret, body or time; the message says which.
    """
    match = _SIGNATURE.fullmatch(signature)
    if match is None:
        raise BadSignature("Lucid-Signature does not read t=<seconds>,v1=<64 hexadecimal digits>.")
    seconds = int(match[1])
    digest = _digest(secret, seconds, body)
    if not any(hmac.compare_digest(digest, signed) for signed in match[2].split(",v1=")):
        raise BadSignature("The delivery was not signed with this secret, or its body was changed.")
    if abs(now.timestamp() - seconds) > SIGNATURE_TOLERANCE.total_seconds():
        raise BadSignature("The delivery was not signed just now: it is a repeated one, or a clock is wrong.")


def retry_seconds(attempts: int, chance: float, *, first_seconds: float = LIMITS.first_retry_seconds) -> float:
    """Return the pause after so many failed attempts: doubling up to an hour, times 0.5 to 1.5.

    `chance` is a random number from 0 to 1 that spreads the retries of many deliveries.
    """
    return backoff_seconds(
        attempts, first_seconds=first_seconds, longest_seconds=LONGEST_RETRY_SECONDS, jitter=0.5 + chance
    )


def _digest(secret: str, seconds: int, body: bytes) -> str:
    return hmac.new(secret.encode(), b"%d.%b" % (seconds, body), sha256).hexdigest()


MASK = "***"
_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_PARTS = re.compile(r"[^:/?#]*://[^/?#]*([^?#]*)(.*)", re.DOTALL)


def check_webhook_url(policy: EgressPolicy, text: str) -> ProviderUrl:
    """Parse a webhook's URL and check everything except its address, which is known when its name is resolved.

    Raises:
        ValueError: the URL is not allowed. The message says what to send, and quotes nothing of the query.
    """
    if len(text) > MAX_URL_CHARACTERS:
        raise ValueError(f"The URL is longer than {MAX_URL_CHARACTERS} characters; send a shorter one.")
    if "#" in text:
        raise ValueError("The URL has a fragment, which is never sent; send it without # and what follows.")
    base, _, query = text.partition("?")
    if not _QUERY.fullmatch(query):
        raise ValueError("The query has a character that is not allowed there; percent-encode it.")
    return policy.check_url(base)


def request_target(url: str) -> str:
    """Return the path and query of a checked URL, as they were written."""
    match = _PARTS.fullmatch(url)
    path, query = match.groups() if match else ("", "")
    return f"{path or '/'}{query}"


def masked(url: str) -> str:
    """Return the URL as responses show it: `***` replaces each value in its query."""
    base, mark, query = url.partition("?")
    return f"{base}?{'&'.join(map(_mask, query.split('&')))}" if query else base + mark


def _mask(part: str) -> str:
    name, _, value = part.partition("=")
    return f"{name}={MASK}" if value.strip("=") else MASK  # a bare word may be the token, with = to fill it up
