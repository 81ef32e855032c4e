"""The address of the service and the key. The only file of the client that reads the environment."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from lucid_compute.client.errors import ConfigurationFault

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_SECONDS = 10.0
DEFAULT_TOTAL_TIMEOUT_SECONDS = 30.0
DEFAULT_RETRIES = 2
_URL_EXAMPLE = "Write it like https://compute.example.com or http://127.0.0.1:8000."


class Setting(NamedTuple):
    """A variable that clients read, for lists of settings."""

    name: str
    default: str | None
    meaning: str


SETTINGS = (
    Setting("LUCID_API_URL", DEFAULT_URL, "Address of the service that clients speak to."),
    Setting("LUCID_API_KEY", None, "API key that clients send."),
)


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """How to reach the service: an address without a trailing slash, a key or None, and limits in seconds."""

    base_url: str
    api_key: str | None = field(repr=False)
    timeout_seconds: float
    total_timeout_seconds: float
    retries: int
    ca_file: Path | None

    @property
    def is_tls(self) -> bool:
        """Return whether the service is reached over TLS."""
        return self.base_url.startswith("https://")


def read_settings(
    base_url: str | None,
    api_key: str | None,
    *,
    timeout_seconds: float,
    total_timeout_seconds: float,
    retries: int,
    ca_file: str | Path | None,
) -> ClientSettings:
    """Return checked settings. An address or a key that is None comes from the environment.

    Raises:
        ConfigurationFault: a setting can't be used. The message never contains the key.
    """
    if not (timeout_seconds > 0 and total_timeout_seconds > 0 and retries >= 0):
        raise ConfigurationFault("Give timeouts above 0 seconds, and 0 retries or more.")
    return ClientSettings(
        base_url=_read_url(os.environ.get("LUCID_API_URL") or DEFAULT_URL if base_url is None else base_url),
        api_key=_read_key(os.environ.get("LUCID_API_KEY") if api_key is None else api_key),
        timeout_seconds=timeout_seconds,
        total_timeout_seconds=total_timeout_seconds,
        retries=retries,
        ca_file=None if ca_file is None else Path(ca_file),
    )


def _read_url(text: str) -> str:
    url = text.strip()
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ConfigurationFault(f"The service's address is no URL. {_URL_EXAMPLE}") from None
    if parts.username is not None or parts.password is not None:
        raise ConfigurationFault(f"The service's address holds a user or a password. Leave them out. {_URL_EXAMPLE}")
    if parts.scheme not in {"http", "https"}:
        raise ConfigurationFault(
            f"The service's address {url!r} begins with neither http:// nor https://. {_URL_EXAMPLE}"
        )
    if not parts.hostname or port == 0 or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigurationFault(
            f"The service's address {url!r} names no host that can be connected to. {_URL_EXAMPLE}"
        )
    if parts.query or parts.fragment:
        raise ConfigurationFault(f"The service's address {url!r} has a ? or a #. Leave it out. {_URL_EXAMPLE}")
    return url.rstrip("/")


def _read_key(text: str | None) -> str | None:
    key = (text or "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationFault(
            "The API key holds blanks or characters that no key has. Copy it again; keys begin with lk_live_."
        )
    return key or None
