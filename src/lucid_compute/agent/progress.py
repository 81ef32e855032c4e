"""Whether a server that says it works does: requests run, and nothing moves."""

from __future__ import annotations

from lucid_compute.agent.runtimes.reading import ServerReading

WEDGED_AFTER_SECONDS = 60.0


class ProgressWatch:
    """Compares readings. What a reading does not tell changes nothing: a wedged server may stop answering /metrics."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._progress: tuple[float, ...] | None = None
        self._still_since: float | None = None

    def note(self, reading: ServerReading, now: float) -> None:
        """Take a reading into account, made at `now`."""
        if reading.running == 0:
            self._still_since = None
        elif reading.progress is not None and reading.progress != self._progress:
            self._progress, self._still_since = reading.progress, now if reading.running else None
        elif reading.running and reading.progress is not None and self._still_since is None:
            self._still_since = now

    def still_seconds(self, now: float) -> float:
        """Answer for how long requests have been running without any progress."""
        return 0.0 if self._still_since is None else now - self._still_since

    def is_wedged(self, now: float) -> bool:
        """Whether that has been too long."""
        return self.still_seconds(now) >= WEDGED_AFTER_SECONDS
