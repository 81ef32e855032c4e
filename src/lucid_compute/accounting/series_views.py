"""Builds the responses of the metrics routes from rollups, as JSON shapes and as CSV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import timedelta

from fastapi import Response

from lucid_compute.accounting.measured import STOPPED, SpanMetrics, StateRollup
from lucid_compute.accounting.rollup_reader import TimelineMetrics
from lucid_compute.accounting.series import FAILURES, SERIES_NAMES, Figure, failures_of, figures_of
from lucid_compute.accounting.shapes import ErrorBudget, NodeUptime, OutageView, SeriesAnswer, UptimeWindow
from lucid_compute.accounting.timeline import STEPS, Timeline
from lucid_compute.web.csv import write_csv
from lucid_compute.wire import write_instant

WINDOWS = (1, 7, 30)
VERDICT_SECONDS = 3600  # a budget of less than an hour is a fraction of a second or a few
WINDOW_LENGTHS = [timedelta(days=days) for days in WINDOWS]


def view_series(
    timeline: Timeline,
    metrics: TimelineMetrics,
    names: tuple[str, ...],
    *,
    passport_id: str | None = None,
    owner: str | None = None,
    model: str | None = None,
) -> SeriesAnswer:
    """Return the named series over a timeline, with their totals."""
    steps = metrics.steps
    whole = SpanMetrics()
    for step in steps:
        whole.add(step)
    shown = [name for name in names if name != FAILURES]
    figures = [figures_of(names, step) for step in steps]
    return SeriesAnswer(
        passport_id=passport_id,
        owner=owner,
        model=model,
        from_=timeline.since,
        to=timeline.until,
        step=next(name for name, length in STEPS.items() if length == timeline.step),
        step_seconds=int(timeline.step.total_seconds()),
        times=timeline.starts(),
        series={name: [of_step[name] for of_step in figures] for name in shown},
        failures=_view_failures(steps, whole) if FAILURES in names else None,
        totals=figures_of(names, whole),
        failure_totals=dict(failures_of(whole) or {}) if FAILURES in names else None,
        outages=[OutageView(started_at=outage.started_at, ended_at=outage.ended_at) for outage in metrics.outages],
    )


def _view_failures(steps: Iterable[SpanMetrics], whole: SpanMetrics) -> dict[str, list[int | None]]:
    of_steps = [failures_of(step) for step in steps]
    reasons = sorted(failures_of(whole) or ())
    return {reason: [None if found is None else found.get(reason, 0) for found in of_steps] for reason in reasons}


def view_windows(rollups: Sequence[StateRollup], target: float) -> list[UptimeWindow]:
    """Return the uptime of each of `WINDOWS`."""
    return [_view_window(days, rollup, target) for days, rollup in zip(WINDOWS, rollups, strict=True)]


def _view_window(days: int, rollup: StateRollup, target: float) -> UptimeWindow:
    judged, unhealthy = rollup.judged_seconds, rollup.seconds.get("unhealthy", 0.0)
    allowed = (1 - target) * judged
    budget = ErrorBudget(
        allowed_seconds=round(allowed, 3),
        used_seconds=round(unhealthy, 3),
        remaining=round(max(1 - unhealthy / allowed, 0.0), 6) if allowed else None,
    )
    return UptimeWindow(
        days=days,
        uptime=None if rollup.uptime is None else round(rollup.uptime, 6),
        healthy_seconds=round(rollup.seconds.get("healthy", 0.0), 3),
        unhealthy_seconds=round(unhealthy, 3),
        draining_seconds=round(rollup.seconds.get("draining", 0.0) + rollup.seconds.get(STOPPED, 0.0), 3),
        registry_outage_seconds=round(rollup.outage_seconds, 3),
        error_budget=budget if judged >= VERDICT_SECONDS else None,
    )


def write_series_csv(report: SeriesAnswer) -> Response:
    """Return the series as CSV: a line for each step, a column for each series and each reason of failure."""
    columns: dict[str, Sequence[Figure]] = {name: report.series[name] for name in SERIES_NAMES if name in report.series}
    columns |= {f"{FAILURES}.{reason}": counts for reason, counts in (report.failures or {}).items()}
    lines = zip(map(write_instant, report.times), *columns.values(), strict=True)
    return write_csv(["time", *columns], lines)


def write_uptime_csv(nodes: Iterable[NodeUptime]) -> Response:
    """Return uptimes as CSV: a line for each node and window."""
    head = ["passportId", "name", "days", "uptime", "healthySeconds", "unhealthySeconds", "drainingSeconds"]
    head += ["registryOutageSeconds", "target", "errorBudgetRemaining"]
    lines = [
        [
            *(node.passport_id, node.name, window.days, window.uptime, window.healthy_seconds),
            *(window.unhealthy_seconds, window.draining_seconds, window.registry_outage_seconds, node.target),
            window.error_budget and window.error_budget.remaining,
        ]
        for node in nodes
        for window in node.windows
    ]
    return write_csv(head, lines)
