"""Records: what was measured in a span of time, as sums that can be added to others. Pure."""

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
    """Return the duration that stands for a bucket."""
    return FIRST_MS * GROWTH**bucket * 2 / (1 + GROWTH) if bucket else FIRST_MS


def percentile_ms(counts: Mapping[int, int], share: float) -> float | None:
    """Return the duration that `share` (0 to 1) of all are not above, by nearest rank; None without any."""
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
    """Return the sum; None is unknown and gives way."""
    return one + other if one is not None and other is not None else other if one is None else one


@dataclass(slots=True)
class JobRecord:
    """The jobs that started in a span and have ended; None is unknown. Latencies are of completed jobs.

    `spread` counts durations by their bucket of `latency_histogram`: latencies by the bucket itself, first bytes by
    that plus `BUCKETS`. `faults` counts the jobs that were not completed by outcome and reason, `failed:http_503`.
    `priced` is how many of all had a price.
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
        """Return how many there are."""
        return self.completed + self.failed + self.rejected + self.cancelled

    @property
    def latencies(self) -> dict[int, int]:
        """The histogram of latencies."""
        return {place: count for place, count in self.spread.items() if place < BUCKETS}

    @property
    def first_bytes(self) -> dict[int, int]:
        """The histogram of times to the first byte."""
        return {place - BUCKETS: count for place, count in self.spread.items() if place >= BUCKETS}

    def latency_ms(self, share: float) -> float | None:
        """Return a percentile of latency, within 5 %; None without any."""
        return percentile_ms(self.latencies, share)

    def first_byte_ms(self, share: float) -> float | None:
        """Return a percentile of the time to the first byte, within 5 %; None without any."""
        return percentile_ms(self.first_bytes, share)

    def add(self, other: JobRecord) -> None:
        """Take in the jobs of another span."""
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
    """Samples of one thing: how many told of it, their sum and the highest."""

    count: int = 0
    total: float = 0.0
    highest: float | None = None

    @property
    def average(self) -> float | None:
        """The average; None when no sample told of it."""
        return self.total / self.count if self.count else None

    def add(self, other: Gauge) -> None:
        """Take in further samples."""
        self.count += other.count
        self.total += other.total
        if other.highest is not None and (self.highest is None or other.highest > self.highest):
            self.highest = other.highest


@dataclass(slots=True)
class GaugeRecord:
    """The heartbeats of a span, and what they told, by the gauge's name."""

    samples: int = 0
    gauges: dict[str, Gauge] = field(default_factory=dict)

    def gauge(self, name: str) -> Gauge:
        """Return a gauge; one without samples when no heartbeat told of it."""
        return self.gauges.get(name) or Gauge()

    def add(self, other: GaugeRecord) -> None:
        """Take in the heartbeats of another span."""
        self.samples += other.samples
        for name, gauge in other.gauges.items():
            self.gauges.setdefault(name, Gauge()).add(gauge)


@dataclass(slots=True)
class StateRecord:
    """How long nodes were in each state, in seconds of one node, outages of the registry left out.

    `outage_seconds` is how long of the span such outages were, `known_seconds` of how much of it states are kept.
    """

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    outage_seconds: float = 0.0
    known_seconds: float = 0.0

    @property
    def uptime(self) -> float | None:
        """The share of time that nodes were healthy; drains are left out. None when nothing is known."""
        judged = self.judged_seconds
        return self.seconds["healthy"] / judged if judged else None

    @property
    def judged_seconds(self) -> float:
        """Return how long nodes were healthy or unhealthy."""
        return self.seconds["healthy"] + self.seconds["unhealthy"]

    def add(self, other: StateRecord) -> None:
        """Take in another span."""
        for state, seconds in other.seconds.items():
            self.seconds[state] += seconds
        self.outage_seconds += other.outage_seconds
        self.known_seconds += other.known_seconds


@dataclass(slots=True)
class Measured:
    """All that is known of one span, of which `seconds` have passed; None where nothing was measured."""

    seconds: float = 0.0
    jobs: JobRecord | None = None
    gauges: GaugeRecord | None = None
    states: StateRecord = field(default_factory=StateRecord)

    def add(self, other: Measured) -> None:
        """Take in another span."""
        self.seconds += other.seconds
        self.states.add(other.states)
        if other.jobs is not None:
            self.jobs = self.jobs or JobRecord()
            self.jobs.add(other.jobs)
        if other.gauges is not None:
            self.gauges = self.gauges or GaugeRecord()
            self.gauges.add(other.gauges)


def read_faults(faults: Mapping[str, int], outcome: str) -> dict[str, int]:
    """Return the reasons of one outcome, with how many there were of each."""
    start = f"{outcome}:"
    return {fault.removeprefix(start): count for fault, count in faults.items() if fault.startswith(start)}
