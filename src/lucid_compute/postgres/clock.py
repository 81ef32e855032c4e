"""The database's clock, continued between reads by this process's monotonic clock. The machine's date never counts."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta


class DatabaseClock:
    """The current time of the database. Each read of the database sets it; in between the monotonic clock runs."""

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        """Start at this machine's date, until the database is first read."""
        self._monotonic = monotonic
        self._set_at = monotonic()
        self._then = datetime.now(UTC)

    def set(self, database_now: datetime) -> None:
        """Set the clock to the database's time, as just read."""
        self._set_at = self._monotonic()
        self._then = database_now

    def now(self) -> datetime:
        """Return the database's current time."""
        return self._then + timedelta(seconds=self._monotonic() - self._set_at)
