"""The URLs of webhooks: a provider's rules and a query as well, which often holds a token. Pure."""

from __future__ import annotations

import re

from lucid_compute.egress_policy import MAX_URL_CHARACTERS, EgressPolicy, ProviderUrl

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
    """Answer what a request asks for at a URL that was checked: its path and query, as they were written."""
    match = _PARTS.fullmatch(url)
    path, query = match.groups() if match else ("", "")
    return f"{path or '/'}{query}"


def masked(url: str) -> str:
    """Answer the URL as it may be shown: of its query the names that have a value, and no value."""
    base, mark, query = url.partition("?")
    return f"{base}?{'&'.join(map(_mask, query.split('&')))}" if query else base + mark


def _mask(part: str) -> str:
    name, _, value = part.partition("=")
    return f"{name}={MASK}" if value.strip("=") else MASK  # a bare word may be the token, with = to fill it up
