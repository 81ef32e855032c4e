"""The admin key of a `lucid serve` on this machine, for whom its file is readable: so that a first try needs no key."""

from __future__ import annotations

import os
import stat
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

ADMIN_KEY_FILE = "admin.key"
LONGEST_KEY = 512


def find_local_key(api_url: str, data_dir: Path) -> str | None:
    """Answer the key in the data folder's `admin.key`; None for an address that is not loopback.

    The key leaves this machine for nobody. A file that is not ours, or that others may read, is left alone: it is
    nothing that `lucid serve` wrote, and we would hand its content to whoever listens there.
    """
    if not is_loopback(api_url):
        return None
    try:
        with (data_dir / ADMIN_KEY_FILE).open(encoding="ascii") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                return None
            return file.read(LONGEST_KEY + 1).strip() or None
    except (OSError, ValueError):  # no such file, or nothing that is a key
        return None


def is_loopback(url: str) -> bool:
    """Whether the URL names this machine by a loopback address, or as localhost."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
