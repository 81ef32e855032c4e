"""Rate limits in memory: per node (heartbeats), per host (probes), per key and owner (changes, unknown nodes)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.replicas import Replicas

HEARTBEAT_BURST = 6
PROBE_SECONDS = 10.0
UNKNOWN_PER_SECOND = 5
UNKNOWN_BURST = 2000
LEAST_REMEMBERED = 1000
_ROUNDING = 1e-6
Clock = Callable[[], float]
"""A monotonic clock, in seconds."""


class Throttle:
    """Allows each name a burst, and then one use per interval (the generic cell rate algorithm).

    It keeps one instant per name: when the allowance is full again. Names with a full allowance are forgotten.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}
        self._forget_above = LEAST_REMEMBERED

    def wait_seconds(self, name: str, interval_seconds: float, burst: float) -> float:
        """Use one of the allowance and return 0, or return how long to wait when none is left."""
        now = self._clock()
        full_at = max(self._full_at.get(name, 0.0), now) + interval_seconds
        if (wait := full_at - now - interval_seconds * burst) > _ROUNDING:
            return wait
        self._full_at[name] = full_at
        if len(self._full_at) > self._forget_above:
            self._forget_full(now)
        return 0.0

    def charge(self, name: str, interval_seconds: float, count: float) -> None:
        """Use `count` of the allowance, even if less is left."""
        self._full_at[name] = max(self._full_at.get(name, 0.0), self._clock()) + interval_seconds * count

    def _forget_full(self, now: float) -> None:
        """Forget the names whose allowance is full. It is called when as many names are known again as were kept."""
        self._full_at = {name: full_at for name, full_at in self._full_at.items() if full_at > now}
        self._forget_above = LEAST_REMEMBERED + 2 * len(self._full_at)


class HeartbeatRate:
    """Allows each node a burst of six heartbeats and then `per_second`; 0 allows any number."""

    def __init__(self, per_second: float, clock: Clock = time.monotonic) -> None:
        self._interval_seconds = 1 / per_second if per_second else 0.0
        self._throttle = Throttle(clock)

    def spend(self, passport_id: str) -> None:
        """Count one heartbeat of the node.

        Raises:
            RateLimited: the node's allowance is used up.
        """
        if not self._interval_seconds:
            return
        if wait := self._throttle.wait_seconds(passport_id, self._interval_seconds, HEARTBEAT_BURST):
            seconds = max(1, round(wait))
            message = (
                f"This node's limit of {1 / self._interval_seconds:g} heartbeats a second is reached, and the "
                f"{HEARTBEAT_BURST} that may come at once are spent. Send the next one in {seconds} s."
            )
            raise RateLimited(message, retry_after_seconds=seconds)


class ProbeRate:
    """Allows one probe of each host every ten seconds on average, over all replicas.

    Replicas do not share counts: each of n replicas allows one probe in n times ten seconds, so n may come at once.
    """

    def __init__(self, replicas: Replicas, clock: Clock = time.monotonic) -> None:
        self._replicas = replicas
        self._throttle = Throttle(clock)

    def spend(self, host: str) -> None:
        """Count one probe of the host.

        Raises:
            RateLimited: the host was probed within the interval.
        """
        if wait := self._throttle.wait_seconds(host, PROBE_SECONDS * self._replicas.count(), 1):
            seconds = math.ceil(wait)
            message = f"The service probes a host once in ten seconds, and just did. Retry in {seconds} s."
            raise RateLimited(message, retry_after_seconds=seconds)


class WriteRates:
    """Allows each key and each owner a burst of changes, and then so many a second; 0 a second allows any number."""

    def __init__(
        self, *, key_per_second: float, owner_per_second: float, burst: int, clock: Clock = time.monotonic
    ) -> None:
        self._burst = burst
        self._limits = [
            (name, per_second, Throttle(clock))
            for name, per_second in (("key", key_per_second), ("owner", owner_per_second))
            if per_second
        ]

    def spend(self, principal: Principal) -> None:
        """Count one change that the key asks for.

        Raises:
            RateLimited: the allowance of the key, or of its owner, is used up.
        """
        for name, per_second, throttle in self._limits:
            who = principal.key_id if name == "key" else principal.owner
            if wait := throttle.wait_seconds(who, 1 / per_second, self._burst):
                seconds = max(1, math.ceil(wait))
                message = (
                    f"This {name}'s limit of {per_second:g} changes a second is reached, and the {self._burst:,} that "
                    f"may come at once are spent. Retry in {seconds} s."
                )
                raise RateLimited(message, retry_after_seconds=seconds)

    def charge(self, principal: Principal, count: float) -> None:
        """Count so many further changes, even if less is left: the next change then waits for them."""
        for name, per_second, throttle in self._limits:
            throttle.charge(principal.key_id if name == "key" else principal.owner, 1 / per_second, count)


class UnknownNodeRate:
    """Limits how many heartbeats of unknown nodes a key may send: each is looked up in the database.

    A node that another replica has just registered is unknown for a moment, so one that is found is not counted.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._throttle = Throttle(clock)

    def spend(self, key_id: str) -> None:
        """Count one look-up.

        Raises:
            RateLimited: the key's allowance is used up.
        """
        if wait := self._throttle.wait_seconds(key_id, 1 / UNKNOWN_PER_SECOND, UNKNOWN_BURST):
            seconds = max(1, math.ceil(wait))
            message = (
                f"This key's limit of {UNKNOWN_PER_SECOND} heartbeats a second from nodes that are unknown or have "
                f"ended is reached, and the {UNKNOWN_BURST:,} that may come at once are spent. Retry in {seconds} s, "
                "with the id that POST /passports returned."
            )
            raise RateLimited(message, retry_after_seconds=seconds)

    def take_back(self, key_id: str) -> None:
        """Stop counting a look-up that found the node."""
        self._throttle.charge(key_id, 1 / UNKNOWN_PER_SECOND, -1)
