"""Rollups in memory: the sums of jobs, heartbeats and states of a span, which can be added to others. Pure."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal

FIRST_MS = 0.1
GROWTH = 1.1
BUCKETS = 256


def estimate_ms(bucket: int) -> float:
    """Return the duration in milliseconds that represents a bucket of a histogram."""
    return FIRST_MS * GROWTH**bucket * 2 / (1 + GROWTH) if bucket else FIRST_MS


def percentile_ms(counts: Mapping[int, int], share: float) -> float | None:
    """Return the percentile `share` (0 to 1) of a histogram in milliseconds, by nearest rank; None if it is empty."""
    total = sum(counts.values())
    if not total:
        return None
    rank = max(math.ceil(share * total), 1)
    for bucket in sorted(counts):
        rank -= counts[bucket]
        if rank <= 0:
            return estimate_ms(bucket)
    return None


def _plus(one: int | None, other: int | None) -> int | None:
    """Return the sum of what is known; None is unknown."""
    return one + other if one is not None and other is not None else other if one is None else one


@dataclass(slots=True)
class JobRollup:
    """The jobs that started in a span and have ended; None is unknown. Latencies are of completed jobs.

    `spread` is two histograms: it counts latencies by bucket, and times to the first byte by bucket plus `BUCKETS`.
    `faults` counts jobs that were not completed by outcome and reason, such as `failed:http_503`. `priced` is the
    number of jobs with a price.
    """

    completed: int = 0
    failed: int = 0
    rejected: int = 0
    cancelled: int = 0
    priced: int = 0
    latency_us: int | None = None
    first_byte_us: int | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    revenue_usd: Decimal | None = None
    spread: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)

    @property
    def ended(self) -> int:
        """Return the number of jobs."""
        return self.completed + self.failed + self.rejected + self.cancelled

    @property
    def latencies(self) -> dict[int, int]:
        """The histogram of latencies."""
        return {bucket: count for bucket, count in self.spread.items() if bucket < BUCKETS}

    @property
    def first_bytes(self) -> dict[int, int]:
        """The histogram of times to the first byte."""
        return {bucket - BUCKETS: count for bucket, count in self.spread.items() if bucket >= BUCKETS}

    def latency_ms(self, share: float) -> float | None:
        """Return a percentile of latency, within 5 %; None without any."""
        return percentile_ms(self.latencies, share)

    def first_byte_ms(self, share: float) -> float | None:
        """Return a percentile of the time to the first byte, within 5 %; None without any."""
        return percentile_ms(self.first_bytes, share)

    def add(self, other: JobRollup) -> None:
        """Add the jobs of another span."""
        self.completed += other.completed
        self.failed += other.failed
        self.rejected += other.rejected
        self.cancelled += other.cancelled
        self.priced += other.priced
        self.latency_us = _plus(self.latency_us, other.latency_us)
        self.first_byte_us = _plus(self.first_byte_us, other.first_byte_us)
        self.tokens_in = _plus(self.tokens_in, other.tokens_in)
        self.tokens_out = _plus(self.tokens_out, other.tokens_out)
        if other.revenue_usd is not None:
            self.revenue_usd = (self.revenue_usd or Decimal(0)) + other.revenue_usd
        self.spread.update(other.spread)
        self.faults.update(other.faults)


@dataclass(slots=True)
class Gauge:
    """The samples of one gauge: their number, sum and highest value."""

    count: int = 0
    total: float = 0.0
    highest: float | None = None

    @property
    def average(self) -> float | None:
        """The average; None without samples."""
        return self.total / self.count if self.count else None

    def add(self, other: Gauge) -> None:
        """Add further samples."""
        self.count += other.count
        self.total += other.total
        if other.highest is not None and (self.highest is None or other.highest > self.highest):
            self.highest = other.highest


@dataclass(slots=True)
class GaugeRollup:
    """The number of heartbeats of a span, and their gauges by name."""

    samples: int = 0
    gauges: dict[str, Gauge] = field(default_factory=dict)

    def gauge(self, name: str) -> Gauge:
        """Return a gauge; one without samples when no heartbeat reported it."""
        return self.gauges.get(name) or Gauge()

    def add(self, other: GaugeRollup) -> None:
        """Add the heartbeats of another span."""
        self.samples += other.samples
        for name, gauge in other.gauges.items():
            self.gauges.setdefault(name, Gauge()).add(gauge)


STOPPED = "stopped"
"""The state of a node that drained and is silent since: unhealthy, and left out of its uptime as its drain is."""


@dataclass(slots=True)
class StateRollup:
    """How long nodes were in each state, in seconds of one node each, without outages of the registry.

    `outage_seconds` is how much of the span was such an outage, `known_seconds` for how much of it states are known.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    outage_seconds: float = 0.0
    known_seconds: float = 0.0

    @property
    def uptime(self) -> float | None:
        """The share of time that nodes were healthy, without drains; None when nothing is known."""
        known = self.judged_seconds
        return self.seconds["healthy"] / known if known else None

    @property
    def judged_seconds(self) -> float:
        """Return how long nodes were healthy or unhealthy, in seconds."""
        return self.seconds["healthy"] + self.seconds["unhealthy"]

    def add(self, other: StateRollup) -> None:
        """Add another span."""
        for state, seconds in other.seconds.items():
            self.seconds[state] += seconds
        self.outage_seconds += other.outage_seconds
        self.known_seconds += other.known_seconds


@dataclass(slots=True)
class SpanMetrics:
    """The rollups of one span, of which `seconds` have passed; None where nothing was measured."""

    seconds: float = 0.0
    jobs: JobRollup | None = None
    gauges: GaugeRollup | None = None
    states: StateRollup = field(default_factory=StateRollup)

    def add(self, other: SpanMetrics) -> None:
        """Add another span."""
        self.seconds += other.seconds
        self.states.add(other.states)
        if other.jobs is not None:
            self.jobs = self.jobs or JobRollup()
            self.jobs.add(other.jobs)
        if other.gauges is not None:
            self.gauges = self.gauges or GaugeRollup()
            self.gauges.add(other.gauges)


def read_faults(faults: Mapping[str, int], outcome: str) -> dict[str, int]:
    """Return how many jobs had each reason of one outcome."""
    start = f"{outcome}:"
    return {fault.removeprefix(start): count for fault, count in faults.items() if fault.startswith(start)}
