"""How long to wait after failures: longer each time, up to a bound, and never at the same time as everybody else."""

from __future__ import annotations

import random

from lucid_compute.field_types import backoff_seconds

FIRST_SECONDS = 2.0
LONGEST_SECONDS = 20.0  # below the 30 s after which a node is stale: the first beat after an outage comes in time


class Backoff:
    """Counts failures in a row."""

    def __init__(self) -> None:
        """Begin without any."""
        self.failures = 0

    def succeed(self) -> None:
        """Forget the failures."""
        self.failures = 0

    def fail(self, *, at_least_seconds: float = 0.0) -> float:
        """Count a failure; answer the seconds to wait, at least those that were asked for."""
        self.failures += 1
        jitter = 0.5 + random.random() / 2  # noqa: S311 - not a secret
        pause = backoff_seconds(
            self.failures, first_seconds=FIRST_SECONDS, longest_seconds=LONGEST_SECONDS, jitter=jitter
        )
        return at_least_seconds + pause
