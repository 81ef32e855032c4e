"""How often a node may beat, be probed, and a key may ask: one instant for each, in this replica's memory."""

from __future__ import annotations

import math
import random
import time
from typing import NamedTuple

from lucid_compute.errors import RateLimited
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.replicas import Replicas


def rate_limit_headers(allowances: list[Allowance]) -> list[tuple[bytes, bytes]]:
    """Return what a key has left, as OpenAI's clients and as the IETF's draft read it.

    `remaining` is what may be used at once: a twentieth of a minute's share at most, and more comes all the time.
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
MAX_HOSTS = 1000  # remembered beyond their ten seconds
RETRY_JITTER = 0.25
_ROUNDING = 1e-6


class Throttle:
    """Lets each name through a burst of times and then once every so many seconds (the generic cell rate algorithm).

    What it remembers of a name is the instant at which its allowance is full again.
    """

    def __init__(self) -> None:
        self._full_at: dict[str, float] = {}

    def wait_seconds(self, name: str, interval_seconds: float, burst: float) -> float:
        """Take one off the allowance and answer 0; or answer how long to wait, when there is none left."""
        now = time.monotonic()
        full_at = max(self._full_at.get(name, 0.0), now) + interval_seconds
        if (wait := full_at - now - interval_seconds * burst) > 0:
            return wait
        self._full_at[name] = full_at
        return 0.0

    def forget_full(self, *, above: int) -> None:
        """Forget the names whose allowance is full, once more than `above` are known."""
        if len(self._full_at) > above:
            now = time.monotonic()
            self._full_at = {name: full_at for name, full_at in self._full_at.items() if full_at > now}

    def charge(self, name: str, interval_seconds: float, count: float) -> None:
        """Take `count` off the allowance, whether it is there or not."""
        self._full_at[name] = max(self._full_at.get(name, 0.0), time.monotonic()) + interval_seconds * count

    def used(self, name: str, interval_seconds: float) -> float:
        """Return how many have been taken off and not yet come back."""
        return max(0.0, self._full_at.get(name, 0.0) - time.monotonic()) / interval_seconds


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


class ProbeRate:
    """Allows a probe of each host every ten seconds, over all replicas in the long run.

    Each replica counts for itself: of n of them each lets one through in n times ten seconds, so n may come at once.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._throttle = Throttle()

    def spend(self, host: str) -> None:
        """Take the host's probe.

        Raises:
            RateLimited: it was taken already.
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
    """Allows each key that has limits its share of requests and tokens: the limit over the live replicas.

    The burst is a twentieth of a minute's share, so that no minute sees over 5 % more than the limit. Heartbeats are
    exempt. Tokens are known only when a request has ended, so a key may begin while it owes none, and then owes.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas
        self._throttles = {"requests": Throttle(), "tokens": Throttle()}

    def spend_request(self, principal: Principal) -> None:
        """Take one request off the key's allowance.

        Raises:
            RateLimited: it has none left.
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
            RateLimited: it does.
        """
        limit = principal.limits.tokens_per_minute if principal.limits else None
        if limit is None:
            return
        interval_seconds, burst = self._pace(limit)
        owed = self._throttles["tokens"].used(principal.key_id, interval_seconds) - burst + 1
        if owed > 0:
            raise _limited(principal, limit, "tokens", owed * interval_seconds)

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Take the tokens that a request has cost off the key's allowance, below nothing if need be."""
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
        """Return how many seconds apart one may come here, and how many at once."""
        share = limit / self._replicas.count()
        return 60 / share, max(1.0, share * BURST_SHARE)


def _limited(principal: Principal, limit: int, unit: str, wait_seconds: float) -> RateLimited:
    message = f"This key may use {limit} {unit} a minute. Come again after Retry-After seconds."
    jitter = 1 + random.random() * RETRY_JITTER  # noqa: S311 - jitter, not a secret
    error = RateLimited(message, retry_after_seconds=max(1, math.ceil(wait_seconds * jitter)))
    error.details = {"unit": unit, "limitPerMinute": limit}
    return error
