"""The series that can be asked for by name, each a figure of what was measured in a span; None is unknown. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lucid_compute.accounting.measured import JobRecord, Measured, read_faults
from lucid_compute.wire import write_money

Figure = int | float | str | None
FAILURES = "failures"
"""Not one series but one for each reason that occurred."""

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


def figures_of(names: tuple[str, ...], measured: Measured) -> dict[str, Figure]:
    """Return the named series' figures, `failures` left out."""
    return {name: SERIES[name](measured) for name in names if name != FAILURES}


def failures_of(measured: Measured) -> Mapping[str, int] | None:
    """Return how many jobs the nodes failed, by reason."""
    return None if measured.jobs is None else read_faults(measured.jobs.faults, "failed")


def _of_jobs(figure: Callable[[JobRecord], Figure]) -> Callable[[Measured], Figure]:
    return lambda measured: None if measured.jobs is None else figure(measured.jobs)


def _count(name: str) -> Callable[[Measured], Figure]:
    return _of_jobs(lambda jobs: int(getattr(jobs, name)))


def _tokens(name: str) -> Callable[[Measured], Figure]:
    def figure(jobs: JobRecord) -> Figure:
        tokens: int | None = getattr(jobs, name)
        return 0 if tokens is None and not jobs.ended else tokens

    return _of_jobs(figure)


def _average(name: str) -> Callable[[Measured], Figure]:
    def figure(jobs: JobRecord) -> Figure:
        total: int | None = getattr(jobs, f"{name}_us")
        count = sum((jobs.latencies if name == "latency" else jobs.first_bytes).values())
        return None if total is None or not count else round(total / count / 1000, 3)

    return _of_jobs(figure)


def _percentile(name: str, share: float) -> Callable[[Measured], Figure]:
    def figure(jobs: JobRecord) -> Figure:
        found = jobs.latency_ms(share) if name == "latency" else jobs.first_byte_ms(share)
        return None if found is None else round(found, 3)

    return _of_jobs(figure)


def _per_second(figure: Callable[[Measured], Figure]) -> Callable[[Measured], Figure]:
    def rate(measured: Measured) -> Figure:
        value = figure(measured)
        return round(value / measured.seconds, 6) if isinstance(value, int) and measured.seconds > 0 else None

    return rate


def _error_rate(jobs: JobRecord) -> Figure:
    judged = jobs.completed + jobs.failed
    return round(jobs.failed / judged, 6) if judged else None


def _revenue(jobs: JobRecord) -> Figure:
    if jobs.revenue_usd is None:
        return None if jobs.ended else "0"
    return write_money(jobs.revenue_usd)


def _gauge(name: str, *, highest: bool) -> Callable[[Measured], Figure]:
    def figure(measured: Measured) -> Figure:
        if measured.gauges is None:
            return None
        gauge = measured.gauges.gauge(name)
        value = gauge.highest if highest else gauge.average
        return None if value is None else round(value, 4)

    return figure


def _nodes(state: str) -> Callable[[Measured], Figure]:
    def figure(measured: Measured) -> Figure:
        judged = measured.states.known_seconds - measured.states.outage_seconds
        known = sum(measured.states.seconds.values())
        return round(measured.states.seconds[state] / judged, 4) if known and judged > 0 else None

    return figure


def _uptime(measured: Measured) -> Figure:
    uptime = measured.states.uptime
    return None if uptime is None else round(uptime, 6)


SERIES: Mapping[str, Callable[[Measured], Figure]] = {
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
    "heartbeats": lambda measured: None if measured.gauges is None else measured.gauges.samples,
    **{name: _gauge(gauge, highest=False) for name, gauge in _GAUGES.items()},
    **{f"{name}Max": _gauge(gauge, highest=True) for name, gauge in _GAUGES.items()},
    "uptime": _uptime,
    "nodesHealthy": _nodes("healthy"),
    "nodesUnhealthy": _nodes("unhealthy"),
    "nodesDraining": _nodes("draining"),
    "registryOutageSeconds": lambda measured: round(measured.states.outage_seconds, 3),
}
SERIES_NAMES = (*SERIES, FAILURES)
