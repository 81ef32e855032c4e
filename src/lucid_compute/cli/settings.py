"""What the command line itself reads from the environment. Without `lucid settings`, which imports all settings."""

from __future__ import annotations

import os
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path

API_URL = "LUCID_API_URL"
API_KEY = "LUCID_API_KEY"
PROFILE = "LUCID_PROFILE"
DATA_DIR = "LUCID_DATA_DIR"
DATABASE_URL = "LUCID_DATABASE_URL"
POSTGRES_USER = "LUCID_EMBEDDED_POSTGRES_USER"


def api_url() -> str | None:
    """Return the service's address of LUCID_API_URL; None when it is unset or empty."""
    return os.environ.get(API_URL) or None


def api_key() -> str | None:
    """Return the key of LUCID_API_KEY; None when it is unset or empty."""
    return os.environ.get(API_KEY) or None


def profile() -> str | None:
    """Return the profile's name of LUCID_PROFILE; None when it is unset or empty."""
    return os.environ.get(PROFILE) or None


def config_dir() -> Path | None:
    """Return the user's folder for configuration: XDG_CONFIG_HOME, else `.config` at home; None without a home."""
    if (folder := os.environ.get("XDG_CONFIG_HOME")) and Path(folder).is_absolute():
        return Path(folder)
    home = os.environ.get("HOME")
    return Path(home, ".config") if home else None


def database_url() -> str | None:
    """Return the database of LUCID_DATABASE_URL; None when it is unset or empty."""
    return os.environ.get(DATABASE_URL) or None


def data_dir() -> Path:
    """Return the data folder of a `lucid serve` that was started here: LUCID_DATA_DIR, else `data`."""
    return Path(os.environ.get(DATA_DIR) or "data")


def variables() -> dict[str, str]:
    """Return the whole environment, for programs that connect by variables of Postgres, such as PGPASSWORD."""
    return dict(os.environ)


def postgres_user() -> str:
    """Return the system user of a new embedded Postgres, if root makes it; the default is that of `Settings`."""
    return os.environ.get(POSTGRES_USER) or "nobody"


def unknown(known: Collection[str]) -> set[str]:
    """Return our variables that are not among the known ones."""
    ours = {name for name in os.environ if name.startswith("LUCID_") and not name.startswith("LUCID_TEST_")}
    return ours - set(known)


def mistyped(known: Collection[str]) -> list[tuple[str, str]]:
    """Return variables that nothing reads but that resemble a known one, each with that one."""
    near = ((name, get_close_matches(name, known, n=1, cutoff=0.85)) for name in unknown(known))
    return sorted((name, meant[0]) for name, meant in near if meant)


def is_set(variable: str) -> bool:
    """Return whether the variable is set to a text that is not empty."""
    return bool(os.environ.get(variable))
