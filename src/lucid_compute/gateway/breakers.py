"""Circuit breakers keep requests from failing nodes; a retry budget keeps retries from making an outage worse.

Source: the reliability page: five consecutive failures open a node's breaker for 30 s, doubled each time, with one
trial; never for more than half of a model's nodes; retries are a tenth of a minute's requests, and never under ten.
"""

from __future__ import annotations

from collections.abc import Callable

from lucid_compute.wire import backoff_seconds

FAILURES_TO_OPEN = 5
OPEN_SECONDS = 30.0
MAX_OPEN_SECONDS = 600.0
RETRY_SHARE = 0.1
RETRIES_ALWAYS = 10  # of one key
RETRIES_ALWAYS_IN_ALL = 100  # of all keys: a few keys that use up their own leave enough to the others
MAX_KEYS = 1000  # with a budget at a time
_WINDOW_SECONDS = 60


class Breaker:
    """The circuit breaker of one node. `now` is an instant of `time.monotonic`.

    `start` gives each request a number. A trial belongs to one request. The failure of a request sent before the
    breaker opened is no evidence about the node since then. While the breaker is closed, all requests have the same
    number, `newest`.
    """

    __slots__ = (
        "_opened_after",
        "_opened_times",
        "_responds",
        "_trial",
        "_trial_until",
        "failures",
        "newest",
        "open_until",
        "opened_at",
    )

    def __init__(self) -> None:
        self.failures = 0
        self.open_until = 0.0
        self.opened_at = 0.0  # when it opened, if it did not close since
        self.newest = 0
        self._opened_times = 0
        self._opened_after = 0  # the newest request when the breaker last opened
        self._trial = 0
        self._trial_until = 0.0
        self._responds = False  # whether the node began a response since the breaker opened

    def blocked_seconds(self, now: float) -> float:
        """Return for how many seconds no request may be sent; 0 when one may, perhaps as a trial."""
        return max(self.open_until, self._trial_until) - now if max(self.open_until, self._trial_until) > now else 0.0

    def start(self, now: float, trial_seconds: float) -> int:
        """Record that a request is sent; return its number.

        After the breaker opened the request is a trial: no other is sent until it ends or the node begins to respond.
        """
        if self._opened_times:
            self.newest += 1
            if now >= self.open_until and not self._responds:
                self._trial, self._trial_until = self.newest, now + trial_seconds
        return self.newest

    def begin_response(self) -> None:
        """Record that the node began to respond: other requests may be sent, even while a long stream runs.

        Failures count until a response is complete: if the node fails now, the breaker opens at once.
        """
        self._responds = True
        self.open_until = self._trial_until = 0.0

    def succeed(self) -> None:
        """Close the breaker: the node completed a request."""
        self.failures = self._opened_times = 0
        self.open_until = self._trial_until = 0.0

    def withdraw(self, number: int) -> None:
        """Record that a request ended without evidence about the node."""
        if number == self._trial:
            self._trial_until = 0.0

    def fail(self, now: float, may_open: Callable[[], bool], number: int) -> bool:
        """Count a failure; open after enough of them if `may_open` agrees. Return whether the breaker opened."""
        if self._opened_times and number <= self._opened_after:
            return False
        self.failures += 1
        self.withdraw(number)
        was_open = self._opened_times > 0
        if now < self.open_until or not (was_open or self.failures >= FAILURES_TO_OPEN) or not may_open():
            return False
        if not was_open:
            self.opened_at = now
        self._opened_times += 1
        self.open_until = now + backoff_seconds(
            self._opened_times, first_seconds=OPEN_SECONDS, longest_seconds=MAX_OPEN_SECONDS
        )
        self._opened_after = self.newest
        self._trial_until = 0.0
        self._responds = False
        return True


class RetryBudget:
    """Retries: at most a tenth of the requests of the last minute, and never fewer than `always`."""

    __slots__ = ("_always", "_seconds")

    def __init__(self, always: int = RETRIES_ALWAYS) -> None:
        self._always = always
        self._seconds: list[list[int]] = []  # each: the second, its requests, its retries

    def count_request(self, now: float) -> None:
        """Count a request."""
        seconds = self._seconds
        if seconds and seconds[-1][0] == int(now):
            seconds[-1][1] += 1
        else:
            self._begin_second(now)[1] += 1

    def spend(self, now: float) -> bool:
        """Spend one retry; return False when none is left."""
        if not self.has_left(now):
            return False
        self._this_second(now)[2] += 1
        return True

    def has_left(self, now: float) -> bool:
        """Return whether a retry is left."""
        this = self._this_second(now)
        recent = [second for second in self._seconds if second[0] > this[0] - _WINDOW_SECONDS]
        allowed = max(self._always, RETRY_SHARE * sum(second[1] for second in recent))
        return sum(second[2] for second in recent) + 1 <= allowed

    def _this_second(self, now: float) -> list[int]:
        seconds = self._seconds
        return seconds[-1] if seconds and seconds[-1][0] == int(now) else self._begin_second(now)

    def _begin_second(self, now: float) -> list[int]:
        second = [int(now), 0, 0]
        self._seconds.append(second)
        del self._seconds[:-_WINDOW_SECONDS]
        return second


class RetryBudgets:
    """Retries of one replica: each key has a budget of its own, within one of all keys.

    So a client whose requests make nodes fail uses up its own retries and leaves the others theirs.
    """

    def __init__(self) -> None:
        self._in_all = RetryBudget(RETRIES_ALWAYS_IN_ALL)
        self._by_key: dict[str, RetryBudget] = {}

    def count_request(self, key_id: str, now: float) -> None:
        """Count a request of a key."""
        self._in_all.count_request(now)
        self._of(key_id).count_request(now)

    def spend(self, key_id: str, now: float) -> bool:
        """Spend one retry of a key; return False when it or all keys together have none left."""
        own = self._of(key_id)
        return own.has_left(now) and self._in_all.spend(now) and own.spend(now)

    def _of(self, key_id: str) -> RetryBudget:
        budget = self._by_key.get(key_id)
        if budget is None:
            if len(self._by_key) >= MAX_KEYS:
                del self._by_key[next(iter(self._by_key))]
            budget = self._by_key[key_id] = RetryBudget()
        return budget
