"""What the command line itself reads from the environment; the SDK's and the service's settings are their own."""

from __future__ import annotations

import os
from pathlib import Path

DATA_DIR = "LUCID_DATA_DIR"


def data_dir() -> Path:
    """Answer the data folder of a `lucid serve` that was started here: LUCID_DATA_DIR, else `data`."""
    return Path(os.environ.get(DATA_DIR) or "data")


def is_set(variable: str) -> bool:
    """Whether the environment holds the variable, and not as an empty text."""
    return bool(os.environ.get(variable))
