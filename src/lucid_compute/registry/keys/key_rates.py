"""The limits of keys over all replicas: requests and tokens a minute, and requests at once.

A replica that is alone counts in memory. Replicas that are several hold shares of each limit (`limit_shares`), and
exchange them in the background, many limits at a time. While Postgres is away, each allows an equal part.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from lucid_compute.errors import RateLimited
from lucid_compute.postgres.database import is_transient
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.fleet.replicas import Replicas
from lucid_compute.registry.keys.limit_shares import MAX_ASKS, Ask, Grant, LimitShares
from lucid_compute.registry.keys.sliding_window import WINDOW_SECONDS, SlidingWindow

REQUESTS, TOKENS, CONCURRENCY = "requests", "tokens", "concurrency"
CHUNK_SHARE = 20  # a replica asks for a twentieth of a limit beyond what it needs now
TICK_SECONDS = 1.0
IDLE_SECONDS = 1.0  # what was not used for as long is returned
CONFIRM_SECONDS = 20.0
ASK_AGAIN_SECONDS = 0.25  # after a limit was found to be spent
LATE_SECONDS = 3.0  # exchanges may be late for as long before requests at once no longer keep to the last share
RETRY_JITTER = 0.05
RETURN_SECONDS = 0.1  # what requests at once did not use for as long is returned
BEGIN_TRIES = 7  # of a request that finds all places taken, so that it gets one that another replica returns
BEGIN_PAUSE_SECONDS = 0.05
_log = logging.getLogger(__name__)


class Allowance(NamedTuple):
    """What a key has left of one kind: `remaining` of `limit`; `reset_seconds` is when nothing of it will be spent."""

    unit: str
    limit: int
    remaining: int
    reset_seconds: float


def rate_limit_headers(allowances: list[Allowance]) -> list[tuple[bytes, bytes]]:
    """Return a key's allowances as headers, in the form of OpenAI's clients and in that of the IETF's draft."""
    headers = []
    for unit, limit, remaining, reset_seconds in allowances:
        values = (("limit", str(limit)), ("remaining", str(remaining)), ("reset", f"{reset_seconds:.3f}s"))
        headers += [(f"x-ratelimit-{name}-{unit}", value) for name, value in values]
        headers.append(("ratelimit-policy", f'"{unit}";q={limit};w=60'))
        headers.append(("ratelimit", f'"{unit}";r={remaining};t={math.ceil(reset_seconds)}'))
    return [(name.encode(), value.encode()) for name, value in headers]


class _Running:
    """Requests that run now, counted as a `SlidingWindow` counts those of a minute."""

    __slots__ = ("_count",)

    def __init__(self) -> None:
        self._count = 0

    def add(self, count: int, _now: float) -> None:
        """Count requests that begin, or with a negative number requests that end."""
        self._count = max(self._count + count, 0)

    def used_at(self, _now: float) -> int:
        """Return how many run."""
        return self._count

    def seconds_until_free(self, _count: int, _now: float) -> float:
        """Return when it is worth asking again: how long requests run is not known."""
        return 1.0


class _Meter:
    """One limit of a key: what was used of it here, the share that this replica holds, and what others hold.

    Of requests at once, `peak` is the most that ran since the share was looked at, which is next due at `return_at`.
    """

    __slots__ = (
        "ask_again_seconds", "confirmed_at", "elsewhere", "free_elsewhere_at", "key_id", "limit", "peak",
        "refused_until", "return_at", "share", "spent_at", "unit", "waiting", "window",
    )  # fmt: skip

    def __init__(self, key_id: str, unit: str, limit: int) -> None:
        self.key_id, self.unit, self.limit = key_id, unit, limit
        is_concurrency = unit == CONCURRENCY
        self.window: SlidingWindow | _Running = _Running() if is_concurrency else SlidingWindow(limit)
        self.ask_again_seconds = BEGIN_PAUSE_SECONDS / 2 if is_concurrency else ASK_AGAIN_SECONDS
        self.share = self.elsewhere = self.waiting = self.peak = 0
        self.refused_until = self.spent_at = self.confirmed_at = self.free_elsewhere_at = self.return_at = 0.0

    def ask(self, now: float) -> Ask:
        """Return what to ask for: what is used, and a chunk more if requests wait. The rest is given up."""
        used = self.window.used_at(now)
        wanted = used + self.waiting + max(1, self.limit // CHUNK_SHARE) if self.waiting else max(used, self.share)
        self.share = min(self.share, wanted)
        free_in = self.window.seconds_until_free(1, now) if used else None
        return Ask(self.key_id, self.unit, self.limit, used, wanted, free_in)

    def apply(self, ask: Ask, grant: Grant, now: float) -> None:
        """Hold what was granted."""
        self.share, self.elsewhere = grant.share, grant.elsewhere
        self.free_elsewhere_at = 0.0 if grant.free_in_seconds is None else now + grant.free_in_seconds
        self.confirmed_at = now
        if grant.share < ask.wanted:
            self.refused_until = now + self.ask_again_seconds


class KeyRates:
    """Counts the requests and tokens of keys with limits. Heartbeats are exempt.

    The tokens of a request are known only when it ends. So a key that has one token left may begin a request, and what
    it then exceeds its limit by is subtracted from the minutes that follow.
    """

    def __init__(
        self, replicas: Replicas, shares: LimitShares | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Without `shares`, each of several replicas allows an equal part. `clock` is monotonic, in seconds."""
        self._replicas = replicas
        self._shares = shares
        self._clock = clock
        self._meters: dict[tuple[str, str], _Meter] = {}
        self._due: dict[_Meter, None] = {}
        self._returning: dict[_Meter, None] = {}
        self._wake = asyncio.Event()
        self._exchanged = asyncio.Event()
        self._is_cut_off = shares is None
        self._late_until = 0.0
        self._parts = 1
        self._accompanied_until = self._tidy_at = 0.0

    # --- what requests call

    def spend(self, principal: Principal, *, minds_tokens: bool = True) -> bool:
        """Count one request of the key. Return False if `ask` must be awaited before this is called again.

        Raises:
            RateLimited: the key's limit of requests is spent, or with `minds_tokens` that of tokens.
        """
        limits = principal.limits
        if limits is None:
            return True
        now = self._clock()
        if minds_tokens and limits.tokens_per_minute is not None:
            tokens = self._meter(principal.key_id, TOKENS, limits.tokens_per_minute)
            if not self._has_room(tokens, now):
                return False
        if limits.requests_per_minute is not None:
            requests = self._meter(principal.key_id, REQUESTS, limits.requests_per_minute)
            if not self._has_room(requests, now):
                return False
            requests.window.add(1, now)
            requests.spent_at = now
        return True

    async def ask(self, principal: Principal) -> None:
        """Get a larger share of the key's limits, or learn that they are spent. Simultaneous callers share a query."""
        await self._ask([*self._meters_of(principal)])

    async def _ask(self, meters: list[_Meter]) -> None:
        for meter in meters:
            meter.waiting += 1
            self._due[meter] = None
        exchanged = self._exchanged  # of the next exchange: one under way has not heard of this
        self._wake.set()
        await exchanged.wait()

    def charge_tokens(self, principal: Principal, tokens: int) -> None:
        """Count the tokens that a request used, even if more than are left."""
        limit = principal.limits.tokens_per_minute if principal.limits else None
        if limit is None or not tokens:
            return
        meter, now = self._meter(principal.key_id, TOKENS, limit), self._clock()
        meter.window.add(tokens, now)
        meter.spent_at = now
        if meter.window.used_at(now) > meter.share and not self._is_alone(now):
            self._due[meter] = None
            self._wake.set()

    def allowances(self, principal: Principal) -> list[Allowance]:
        """Return what the key has left; nothing for a key without limits."""
        now = self._clock()
        return [self._allowance(meter, now) for meter in self._meters_of(principal)]

    # --- requests at once

    def begin(self, principal: Principal) -> bool:
        """Count a request as running until `end`. Return False if `wait` must be awaited instead, which counts it.

        Raises:
            RateLimited: as many requests of the key run as may run at once.
        """
        if (meter := self._concurrency_of(principal)) is None:
            return True
        now = self._clock()
        running = meter.window.used_at(now)
        if running < self._held(meter, now):
            meter.window.add(1, now)
            meter.spent_at, meter.peak = now, max(meter.peak, running + 1)
            return True
        if self._is_cut_off_of(meter, now) or self._is_alone(now):
            raise self._full(meter, now)
        return False

    async def wait(self, principal: Principal) -> None:
        """Count a request as running when another replica has returned a place, which takes it a moment.

        Raises:
            RateLimited: as many requests of the key run as may run at once.
        """
        for attempt in range(BEGIN_TRIES):
            if attempt:
                await asyncio.sleep(BEGIN_PAUSE_SECONDS)
            meter = self._concurrency_of(principal)
            if meter is not None and self._clock() >= meter.refused_until:
                await self._ask([meter])
            if self.begin(principal):
                return
        if meter is not None:
            raise self._full(meter, self._clock())

    def end(self, principal: Principal) -> None:
        """Stop counting a request that `begin` or `wait` has counted."""
        if (meter := self._concurrency_of(principal)) is None:
            return
        now = self._clock()
        meter.window.add(-1, now)
        if not self._is_alone(now) and meter not in self._returning:
            meter.return_at = now + RETURN_SECONDS
            self._returning[meter] = None
            self._wake.set()

    def _concurrency_of(self, principal: Principal) -> _Meter | None:
        limit = principal.limits.concurrency if principal.limits else None
        return None if limit is None else self._meter(principal.key_id, CONCURRENCY, limit)

    def _full(self, meter: _Meter, now: float) -> RateLimited:
        running = meter.window.used_at(now) + (0 if self._is_alone(now) else meter.elsewhere)
        message = (
            f"This key's limit of {meter.limit:,} requests at once is reached: {running:,} run. Retry in 1 s, or when "
            "one of them has ended."
        )
        error = RateLimited(message, retry_after_seconds=1)
        error.details = {"unit": meter.unit, "limit": meter.limit}
        return error

    def _return_unused(self, now: float) -> None:
        """Give up the places that no request has used for a moment, so that another replica gets them."""
        for meter in [meter for meter in self._returning if now >= meter.return_at]:
            used = meter.window.used_at(now)
            if (kept := max(meter.peak, used)) < meter.share:
                meter.share = kept
                self._due[meter] = None
            meter.peak, meter.return_at = used, now + RETURN_SECONDS
            if meter.share <= used:
                del self._returning[meter]

    # --- the background task

    async def run(self) -> None:
        """Exchange shares until this task is cancelled: when a request waits, and once a second what changed."""
        try:
            while True:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETURN_SECONDS if self._returning else TICK_SECONDS):
                        await self._wake.wait()
                self._wake.clear()
                try:
                    await self.exchange()
                except Exception:  # noqa: BLE001 - requests wait for this task; its trace is logged
                    self._is_cut_off = True
                    _log.exception("the limits of keys could not be shared")
        finally:
            self._is_cut_off = True
            self._exchanged.set()
            if self._shares is not None:
                self._shares.close()

    async def exchange(self) -> None:
        """Return what is not used, confirm what is held, ask for what is wanted, and let waiting requests go on."""
        exchanged, self._exchanged = self._exchanged, asyncio.Event()
        try:
            now = self._clock()
            if now >= self._tidy_at:
                self._tidy_at = now + TICK_SECONDS
                self._tidy(now)
            self._return_unused(now)
            due, self._due = [*self._due], {}
            if self._shares is not None and due:
                await self._exchange(self._shares, sorted(due, key=lambda meter: (meter.key_id, meter.unit)))
        finally:
            exchanged.set()

    async def _exchange(self, shares: LimitShares, due: list[_Meter]) -> None:
        for start in range(0, len(due), MAX_ASKS):
            meters = due[start : start + MAX_ASKS]
            asked_at = self._clock()
            asks = [meter.ask(asked_at) for meter in meters]
            for meter in meters:
                meter.waiting = 0
            try:
                grants = await shares.exchange(asks)
            except Exception as error:  # noqa: BLE001 - requests go on with an equal part each, and the task goes on
                if not is_transient(error):
                    _log.exception("the limits of keys could not be shared")
                self._fail(error, due[start:], asked_at)
                return
            self._is_cut_off = False
            for meter, ask, grant in zip(meters, asks, grants, strict=True):
                meter.apply(ask, grant, asked_at)

    def _fail(self, error: Exception, unasked: list[_Meter], asked_at: float) -> None:
        """Allow an equal part from now on. Ask again, since Postgres may have granted what was asked for."""
        if not self._is_cut_off:
            self._late_until = asked_at + LATE_SECONDS if isinstance(error, TimeoutError) else 0.0
        self._is_cut_off = True
        for meter in unasked:
            meter.waiting = 0
            self._due[meter] = None

    def _tidy(self, now: float) -> None:
        """Forget limits of which nothing is used or held, and find those whose share changes or is confirmed."""
        is_alone = self._is_alone(now)
        for key, meter in [*self._meters.items()]:
            used = meter.window.used_at(now)
            is_settled = not meter.share and meter not in self._due
            if not used and not meter.waiting and (is_alone or self._is_cut_off_of(meter, now) or is_settled):
                del self._meters[key]
                self._due.pop(meter, None)
                self._returning.pop(meter, None)
                continue
            room = meter.share - used
            is_much = room > 0 and (not used or room > meter.limit // 100)
            is_idle = is_much and now - meter.spent_at >= IDLE_SECONDS and not meter.waiting
            if is_idle:
                meter.share = used
            is_old = now - meter.confirmed_at >= CONFIRM_SECONDS
            if not is_alone and (is_idle or is_old or self._is_cut_off or used > meter.share):
                self._due[meter] = None

    # --- inside

    def _meter(self, key_id: str, unit: str, limit: int) -> _Meter:
        meter = self._meters.get((key_id, unit))
        if meter is None or meter.limit != limit:
            meter = self._meters[key_id, unit] = _Meter(key_id, unit, limit)
        return meter

    def _meters_of(self, principal: Principal) -> Iterator[_Meter]:
        if principal.limits is not None:
            limits = {REQUESTS: principal.limits.requests_per_minute, TOKENS: principal.limits.tokens_per_minute}
            for unit, limit in limits.items():
                if limit is not None:
                    yield self._meter(principal.key_id, unit, limit)

    def _has_room(self, meter: _Meter, now: float) -> bool:
        """Return whether one more may be used; False if a larger share may be had.

        Raises:
            RateLimited: the limit is spent.
        """
        used, held = meter.window.used_at(now), self._held(meter, now)
        if used < held:
            return True
        if self._is_cut_off or now < meter.refused_until or self._is_alone(now):
            raise self._limited(meter, used, held, now)
        return False

    def _held(self, meter: _Meter, now: float) -> int:
        """Return how many uses a minute this replica may allow."""
        if self._is_alone(now):
            return meter.limit
        return max(1, meter.limit // self._parts) if self._is_cut_off_of(meter, now) else meter.share

    def _is_cut_off_of(self, meter: _Meter, now: float) -> bool:
        """Return whether nothing is known of what others hold of the limit.

        A request may wait for a place, so a few late exchanges do not count: the others hold their places still.
        """
        return self._is_cut_off and (meter.unit != CONCURRENCY or now >= self._late_until)

    def _is_alone(self, now: float) -> bool:
        """Return whether no other replica has lived for a minute: what it spent counts as long."""
        if (count := self._replicas.count()) > 1:
            self._parts, self._accompanied_until = count, now + WINDOW_SECONDS
        return now >= self._accompanied_until

    def _allowance(self, meter: _Meter, now: float) -> Allowance:
        used = meter.window.used_at(now)
        remaining = max(0, meter.limit - used - (0 if self._is_alone(now) else meter.elsewhere))
        return Allowance(
            meter.unit, meter.limit, remaining, meter.window.seconds_until_free(used, now) if used else 0.0
        )

    def _limited(self, meter: _Meter, used: int, held: int, now: float) -> RateLimited:
        waits = []
        if 0 <= used - held < used:
            waits.append(meter.window.seconds_until_free(used - held + 1, now))
        if meter.free_elsewhere_at > now and not self._is_alone(now):
            waits.append(meter.free_elsewhere_at - now + IDLE_SECONDS + TICK_SECONDS)
        jitter = 1 + random.random() * RETRY_JITTER  # noqa: S311 - jitter, not a secret
        seconds = max(1, math.ceil(min(waits, default=1.0) * jitter))
        spent = used + (0 if self._is_alone(now) else meter.elsewhere)
        message = (
            f"This key's limit of {meter.limit:,} {meter.unit} a minute is reached: {spent:,} are spent. "
            f"Retry in {seconds} s."
        )
        error = RateLimited(message, retry_after_seconds=seconds)
        error.details = {"unit": meter.unit, "limitPerMinute": meter.limit}
        return error
