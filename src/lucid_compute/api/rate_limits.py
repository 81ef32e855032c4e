"""How often a node may beat and a key may ask: one instant for each, in this replica's memory."""

from __future__ import annotations

import time

from lucid_compute.errors import RateLimited
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.fleet.replicas import Replicas

HEARTBEAT_BURST = 6
REQUEST_BURST_SHARE = 0.05


class Throttle:
    """Lets each name through a burst of times and then once every so many seconds (the generic cell rate algorithm).

    What it remembers of a name is the instant at which its allowance is full again.
    """

    def __init__(self) -> None:
        """Start with every allowance full."""
        self._full_at: dict[str, float] = {}

    def wait_seconds(self, name: str, interval_seconds: float, burst: float) -> float:
        """Take one off the allowance and answer 0; or answer how long to wait, when there is none left."""
        now = time.monotonic()
        full_at = max(self._full_at.get(name, 0.0), now) + interval_seconds
        if (wait := full_at - now - interval_seconds * burst) > 0:
            return wait
        self._full_at[name] = full_at
        return 0.0


class HeartbeatRate:
    """Allows each node a burst of six heartbeats and then so many a second."""

    def __init__(self, per_second: float) -> None:
        """Allow `per_second` in the long run; 0 allows any number."""
        self._interval_seconds = 1 / per_second if per_second else 0.0
        self._throttle = Throttle()

    def spend(self, passport_id: str) -> None:
        """Take one heartbeat off the node's allowance.

        Raises:
            RateLimited: it has none left.
        """
        if not self._interval_seconds:
            return
        if wait := self._throttle.wait_seconds(passport_id, self._interval_seconds, HEARTBEAT_BURST):
            message = "This node sends heartbeats faster than it may. Send the next one after nextHeartbeatInSeconds."
            raise RateLimited(message, retry_after_seconds=max(1, round(wait)))


class RequestRate:
    """Allows each key that has a limit its share of requests: the limit over the live replicas. Heartbeats are exempt.

    The burst is a twentieth of a minute's share, so that no minute sees over 5 % more than the limit.
    """

    def __init__(self, replicas: Replicas) -> None:
        """Share limits among `replicas`."""
        self._replicas = replicas
        self._throttle = Throttle()

    def spend(self, principal: Principal) -> None:
        """Take one request off the key's allowance.

        Raises:
            RateLimited: it has none left.
        """
        per_minute = principal.limits.requests_per_minute if principal.limits else None
        if per_minute is None:
            return
        share = per_minute / self._replicas.count()
        if wait := self._throttle.wait_seconds(principal.key_id, 60 / share, max(1.0, share * REQUEST_BURST_SHARE)):
            message = f"This key may make {per_minute} requests a minute. Come again after Retry-After seconds."
            raise RateLimited(message, retry_after_seconds=max(1, round(wait)))
