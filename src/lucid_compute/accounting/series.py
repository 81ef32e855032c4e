"""The named series of the metrics routes, each computed from the rollups of a span. None is unknown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lucid_compute.accounting.measured import STOPPED, JobRollup, SpanMetrics, read_faults
from lucid_compute.wire import write_money

Figure = int | float | str | None
"""A value of a series."""

FAILURES = "failures"
"""A name for several series: one for each reason of failure."""

_PERCENTILES = {"P50": 0.5, "P95": 0.95, "P99": 0.99}
_GAUGES = {
    "load": "load",
    "queueDepth": "queue_depth",
    "inFlight": "in_flight",
    "reportedInFlight": "reported_in_flight",
    "gpuUtilization": "gpu_utilization",
    "gpuMemoryUsedMb": "gpu_memory_used_mb",
    "gpuMemoryTotalMb": "gpu_memory_total_mb",
}


def figures_of(names: tuple[str, ...], metrics: SpanMetrics) -> dict[str, Figure]:
    """Return the values of the named series, without `failures`."""
    return {name: SERIES[name](metrics) for name in names if name != FAILURES}


def failures_of(metrics: SpanMetrics) -> Mapping[str, int] | None:
    """Return how many jobs nodes failed, by reason; None if jobs are unknown."""
    return None if metrics.jobs is None else read_faults(metrics.jobs.faults, "failed")


def _of_jobs(figure: Callable[[JobRollup], Figure]) -> Callable[[SpanMetrics], Figure]:
    return lambda metrics: None if metrics.jobs is None else figure(metrics.jobs)


def _count(name: str) -> Callable[[SpanMetrics], Figure]:
    return _of_jobs(lambda jobs: int(getattr(jobs, name)))


def _tokens(name: str) -> Callable[[SpanMetrics], Figure]:
    def figure(jobs: JobRollup) -> Figure:
        tokens: int | None = getattr(jobs, name)
        return 0 if tokens is None and not jobs.ended else tokens

    return _of_jobs(figure)


def _average(name: str) -> Callable[[SpanMetrics], Figure]:
    def figure(jobs: JobRollup) -> Figure:
        total: int | None = getattr(jobs, f"{name}_us")
        count = sum((jobs.latencies if name == "latency" else jobs.first_bytes).values())
        return None if total is None or not count else round(total / count / 1000, 3)

    return _of_jobs(figure)


def _percentile(name: str, share: float) -> Callable[[SpanMetrics], Figure]:
    def figure(jobs: JobRollup) -> Figure:
        found = jobs.latency_ms(share) if name == "latency" else jobs.first_byte_ms(share)
        return None if found is None else round(found, 3)

    return _of_jobs(figure)


def _per_second(figure: Callable[[SpanMetrics], Figure]) -> Callable[[SpanMetrics], Figure]:
    def rate(metrics: SpanMetrics) -> Figure:
        value = figure(metrics)
        return round(value / metrics.seconds, 6) if isinstance(value, int) and metrics.seconds > 0 else None

    return rate


def _error_rate(jobs: JobRollup) -> Figure:
    judged = jobs.completed + jobs.failed
    return round(jobs.failed / judged, 6) if judged else None


def _revenue(jobs: JobRollup) -> Figure:
    if jobs.revenue_usd is None:
        return None if jobs.ended else "0"
    return write_money(jobs.revenue_usd)


def _gauge(name: str, *, highest: bool) -> Callable[[SpanMetrics], Figure]:
    def figure(metrics: SpanMetrics) -> Figure:
        if metrics.gauges is None:
            return None
        gauge = metrics.gauges.gauge(name)
        value = gauge.highest if highest else gauge.average
        return None if value is None else round(value, 4)

    return figure


def _nodes(*states: str) -> Callable[[SpanMetrics], Figure]:
    def figure(metrics: SpanMetrics) -> Figure:
        judged = metrics.states.known_seconds - metrics.states.outage_seconds
        known = sum(metrics.states.seconds.values())
        found = sum(metrics.states.seconds[state] for state in states)
        return round(found / judged, 4) if known and judged > 0 else None

    return figure


def _uptime(metrics: SpanMetrics) -> Figure:
    uptime = metrics.states.uptime
    return None if uptime is None else round(uptime, 6)


SERIES: Mapping[str, Callable[[SpanMetrics], Figure]] = {
    "requests": _count("ended"),
    "completed": _count("completed"),
    "failed": _count("failed"),
    "rejected": _count("rejected"),
    "cancelled": _count("cancelled"),
    "requestsPerSecond": _per_second(_count("ended")),
    "errorRate": _of_jobs(_error_rate),
    "latencyAvgMs": _average("latency"),
    **{f"latency{name}Ms": _percentile("latency", share) for name, share in _PERCENTILES.items()},
    "firstByteAvgMs": _average("first_byte"),
    **{f"firstByte{name}Ms": _percentile("first_byte", share) for name, share in _PERCENTILES.items()},
    "tokensIn": _tokens("tokens_in"),
    "tokensOut": _tokens("tokens_out"),
    "tokensOutPerSecond": _per_second(_tokens("tokens_out")),
    "revenueUsd": _of_jobs(_revenue),
    "heartbeats": lambda metrics: None if metrics.gauges is None else metrics.gauges.samples,
    **{name: _gauge(gauge, highest=False) for name, gauge in _GAUGES.items()},
    **{f"{name}Max": _gauge(gauge, highest=True) for name, gauge in _GAUGES.items()},
    "uptime": _uptime,
    "nodesHealthy": _nodes("healthy"),
    "nodesUnhealthy": _nodes("unhealthy", STOPPED),
    "nodesDraining": _nodes("draining"),
    "registryOutageSeconds": lambda metrics: round(metrics.states.outage_seconds, 3),
}
SERIES_NAMES = (*SERIES, FAILURES)
