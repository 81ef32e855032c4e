"""The database's clock, read between queries by this process's monotonic one: the machine's own date never counts."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta


class DatabaseClock:
    """Tells the database's now. Each look at the database sets it; in between it runs on the monotonic clock."""

    def __init__(self) -> None:
        """Start at this machine's date, until the first look at the database."""
        self._set_at = time.monotonic()
        self._then = datetime.now(UTC)

    def set(self, database_now: datetime) -> None:
        """Follow the database's clock, as just read."""
        self._set_at = time.monotonic()
        self._then = database_now

    def now(self) -> datetime:
        """Return the database's now."""
        return self._then + timedelta(seconds=time.monotonic() - self._set_at)
