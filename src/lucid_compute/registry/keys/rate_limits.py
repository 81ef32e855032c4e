"""Rate limits in memory: per node (heartbeats), per host (probes) and per key (requests and tokens)."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from typing import NamedTuple

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.replicas import Replicas


def rate_limit_headers(allowances: list[Allowance]) -> list[tuple[bytes, bytes]]:
    """Return a key's allowances as headers, in the form of OpenAI's clients and in that of the IETF's draft.

    `remaining` is what may be used at once: at most a twentieth of a minute's share. It is restored continuously.
    """
    headers = []
    for unit, limit, remaining, reset_seconds in allowances:
        values = (("limit", str(limit)), ("remaining", str(remaining)), ("reset", f"{reset_seconds:.3f}s"))
        headers += [(f"x-ratelimit-{name}-{unit}", value) for name, value in values]
        headers.append(("ratelimit-policy", f'"{unit}";q={limit};w=60'))
        headers.append(("ratelimit", f'"{unit}";r={remaining};t={math.ceil(reset_seconds)}'))
    return [(name.encode(), value.encode()) for name, value in headers]


HEARTBEAT_BURST = 6
BURST_SHARE = 0.05
PROBE_SECONDS = 10.0
MAX_HOSTS = 1000  # above this, hosts that may be probed again are forgotten
RETRY_JITTER = 0.25
_ROUNDING = 1e-6
Clock = Callable[[], float]
"""A monotonic clock, in seconds."""


class Throttle:
    """Allows each name a burst, and then one use per interval (the generic cell rate algorithm).

    It keeps one instant per name: when the allowance is full again.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._full_at: dict[str, float] = {}

    def wait_seconds(self, name: str, interval_seconds: float, burst: float) -> float:
        """Use one of the allowance and return 0, or return how long to wait when none is left."""
        now = self._clock()
        full_at = max(self._full_at.get(name, 0.0), now) + interval_seconds
        if (wait := full_at - now - interval_seconds * burst) > 0:
            return wait
        self._full_at[name] = full_at
        return 0.0

    def forget_full(self, *, above: int) -> None:
        """Forget the names whose allowance is full, once more than `above` are known."""
        if len(self._full_at) > above:
            now = self._clock()
            self._full_at = {name: full_at for name, full_at in self._full_at.items() if full_at > now}

    def charge(self, name: str, interval_seconds: float, count: float) -> None:
        """Use `count` of the allowance, even if less is left."""
        self._full_at[name] = max(self._full_at.get(name, 0.0), self._clock()) + interval_seconds * count

    def used(self, name: str, interval_seconds: float) -> float:
        """Return how many uses have not yet been restored."""
        return max(0.0, self._full_at.get(name, 0.0) - self._clock()) / interval_seconds


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
            message = "This node sends heartbeats faster than it may. Send the next one after nextHeartbeatInSeconds."
            raise RateLimited(message, retry_after_seconds=max(1, round(wait)))


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
            message = "The service probes a host once in ten seconds. Ask again after Retry-After seconds."
            raise RateLimited(message, retry_after_seconds=math.ceil(wait))
        self._throttle.forget_full(above=MAX_HOSTS)


class Allowance(NamedTuple):
    """What a key has left of one kind: `limit` a minute over all replicas, `remaining` here and now.

    `reset_seconds` is when the allowance is full again.
    """

    unit: str
    limit: int
    remaining: int
    reset_seconds: float


class KeyRates:
    """Allows each key with limits its share of requests and tokens: the limit divided by the number of live replicas.

    The burst is a twentieth of a minute's share, so no minute exceeds the limit by more than 5 %. Heartbeats are
    exempt. The tokens of a request are known only when it ends. So a key that owes none may begin a request, and the
    allowance may become negative afterwards.
    """

    def __init__(self, replicas: Replicas, clock: Clock = time.monotonic) -> None:
        self._replicas = replicas
        self._throttles = {"requests": Throttle(clock), "tokens": Throttle(clock)}

    def spend_request(self, principal: Principal) -> None:
        """Count one request of the key.

        Raises:
            RateLimited: the key's allowance is used up.
        """
        limit = principal.limits.requests_per_minute if principal.limits else None
        if limit is None:
            return
        interval_seconds, burst = self._pace(limit)
        if wait := self._throttles["requests"].wait_seconds(principal.key_id, interval_seconds, burst):
            raise _limited(principal, limit, "requests", wait)

    def require_tokens(self, principal: Principal) -> None:
        """Refuse a key that owes tokens.

        Raises:
            RateLimited: earlier requests used more tokens than the key is allowed by now.
        """
        limit = principal.limits.tokens_per_minute if principal.limits else None
        if limit is None:
            return
        interval_seconds, burst = self._pace(limit)
        owed = self._throttles["tokens"].used(principal.key_id, interval_seconds) - burst + 1
        if owed > 0:
            raise _limited(principal, limit, "tokens", owed * interval_seconds)

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Count the tokens that a request used; the allowance may become negative."""
        limit = principal.limits.tokens_per_minute if principal.limits else None
        if limit is not None and tokens:
            self._throttles["tokens"].charge(principal.key_id, self._pace(limit)[0], tokens)

    def allowances(self, principal: Principal) -> list[Allowance]:
        """Return what the key has left; nothing for a key without limits."""
        if principal.limits is None:
            return []
        limits = {"requests": principal.limits.requests_per_minute, "tokens": principal.limits.tokens_per_minute}
        return [self._allowance(principal, unit, limit) for unit, limit in limits.items() if limit is not None]

    def _allowance(self, principal: Principal, unit: str, limit: int) -> Allowance:
        interval_seconds, burst = self._pace(limit)
        used = self._throttles[unit].used(principal.key_id, interval_seconds)
        return Allowance(unit, limit, max(0, int(burst - used + _ROUNDING)), used * interval_seconds)

    def _pace(self, limit: int) -> tuple[float, float]:
        """Return the interval in seconds between two uses on this replica, and how many may come at once."""
        share = limit / self._replicas.count()
        return 60 / share, max(1.0, share * BURST_SHARE)


def _limited(principal: Principal, limit: int, unit: str, wait_seconds: float) -> RateLimited:
    jitter = 1 + random.random() * RETRY_JITTER  # noqa: S311 - jitter, not a secret
    seconds = max(1, math.ceil(wait_seconds * jitter))
    message = f"This key's limit of {limit} {unit} a minute is reached. Retry in {seconds} s."
    error = RateLimited(message, retry_after_seconds=seconds)
    error.details = {"unit": unit, "limitPerMinute": limit}
    return error
