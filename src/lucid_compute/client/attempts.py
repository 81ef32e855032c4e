"""Decide whether and when a call is sent again, and how long it may take. Pure: time and chance are arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lucid_compute.client.call import ApiCall
from lucid_compute.client.errors import LucidClientError, NotFound
from lucid_compute.wire import backoff_seconds

SHORTEST_ATTEMPT_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a call is repeated, and its time limits: for each attempt, and for all attempts with their pauses."""

    retries: int
    attempt_seconds: float
    total_seconds: float
    first_pause_seconds: float = 0.25
    longest_pause_seconds: float = 5.0

    def backoff_seconds(self, failures: int) -> float:
        """Return the longest pause after so many failures, from 1."""
        return backoff_seconds(
            failures, first_seconds=self.first_pause_seconds, longest_seconds=self.longest_pause_seconds
        )


class Attempts:
    """The attempts of one call."""

    def __init__(
        self, call: ApiCall[Any], policy: RetryPolicy, *, now_seconds: float, random: Callable[[], float]
    ) -> None:
        """Start at `now_seconds` of a monotonic clock. `random` returns 0 to 1."""
        self._call = call
        self._policy = policy
        self._random = random
        self._ends_at = now_seconds + policy.total_seconds + call.waits_seconds
        self._failures = 0

    def seconds_for_attempt(self, now_seconds: float) -> float:
        """Return how many seconds the attempt that begins now may take."""
        longest = self._policy.attempt_seconds + self._call.waits_seconds
        return max(min(longest, self._ends_at - now_seconds), SHORTEST_ATTEMPT_SECONDS)

    def find_pause_seconds(self, error: LucidClientError, now_seconds: float) -> float | None:
        """Return the seconds to wait before the call is sent again; None when it is not sent again.

        A call that is not safe to repeat is repeated only if the service certainly did nothing. A `Retry-After` is
        waited for in full, plus a random time. A pause that would outlast the call's time ends the call now.
        """
        self._failures += 1
        if self._failures > self._policy.retries or not error.is_transient:
            return None
        if not (self._call.is_repeatable or error.is_certainly_undone):
            return None
        jitter = self._random() * self._policy.backoff_seconds(self._failures)
        pause = jitter + (error.retry_after_seconds or 0.0)
        return pause if now_seconds + pause + SHORTEST_ATTEMPT_SECONDS <= self._ends_at else None

    def is_done_by(self, error: LucidClientError) -> bool:
        """Return whether the error shows that an earlier attempt, whose response was lost, did the work."""
        return self._call.is_done_when_missing and self._failures > 0 and isinstance(error, NotFound)
