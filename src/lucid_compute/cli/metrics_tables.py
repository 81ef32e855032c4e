"""Series over time and uptimes, as a person reads them. Unknown is a dash, never 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

from rich.console import RenderableType

from lucid_compute.cli.output import Column, Listing, sentence
from lucid_compute.cli.plain_text import UNKNOWN, counted, instant, number, or_unknown, span
from lucid_compute.metric_series import FAILURES
from lucid_compute.wire.metrics import FleetUptime, NodeUptime, SeriesAnswer, UptimeWindow

SHOWN_SERIES = (
    "requests",
    "failed",
    "errorRate",
    "latencyP50Ms",
    "latencyP95Ms",
    "tokensOut",
    "revenueUsd",
    "load",
    "queueDepth",
    "gpuUtilization",
    FAILURES,
)
_SHARES = {"errorRate", "load", "loadMax", "gpuUtilization", "gpuUtilizationMax", "uptime"}
_RANKS = {"queueDepth": 4, "gpuUtilization": 3, "load": 3, "tokensOut": 2, "latencyP50Ms": 2, "revenueUsd": 1}
UPTIME_COLUMNS = (
    Column("DAYS", right=True),
    Column("UPTIME", right=True),
    Column("UNHEALTHY", right=True),
    Column("DRAINING", rank=2, right=True),
    Column("OURS", rank=1, right=True),
    Column("BUDGET", rank=1, right=True),
    Column("LEFT", right=True),
)
NODE_COLUMNS = (
    Column("NODE", shortest=12),
    *(Column(title, right=True) for title in ("1 DAY", "7 DAYS", "30 DAYS")),
    Column("LEFT OF 30", right=True),
    Column("ID", rank=1),
)


def series_parts(answer: SeriesAnswer) -> list[RenderableType]:
    """Answer a line for each step and one for all of them, the reasons of failures, and when the registry was away."""
    parts: list[RenderableType] = []
    if answer.series:
        columns = [Column(f"FROM, {answer.step} EACH"), *(_column(name) for name in answer.series)]
        lines = zip(answer.times, *answer.series.values(), strict=True)
        rows = [(_minute(at), *map(_figure, answer.series, figures)) for at, *figures in lines]
        in_all = ("in all", *(_figure(name, answer.totals[name]) for name in answer.series))
        parts.append(Listing(columns, [*rows, in_all]))
    if answer.failure_totals is not None:
        reasons = sorted(answer.failure_totals.items(), key=lambda each: (-each[1], each[0]))
        said = ", ".join(f"{reason} {count:,}" for reason, count in reasons) or "none"
        parts += [sentence(""), sentence(f"Failures: {said}.")]
    for outage in answer.outages:
        seconds = (outage.ended_at - outage.started_at).total_seconds()
        said = (
            f"The registry itself was away for {span(seconds)} from {instant(outage.started_at)}: that is in no uptime."
        )
        parts.append(sentence(said, style="yellow"))
    return parts


def uptime_table(windows: Iterable[UptimeWindow]) -> Listing:
    """Answer uptimes over windows that end now, and what is left of each one's error budget."""
    return Listing(UPTIME_COLUMNS, map(_window, windows))


def fleet_uptime_parts(together: FleetUptime, nodes: Sequence[NodeUptime]) -> list[RenderableType]:
    """Answer the windows of all nodes together, and those of each."""
    if not nodes:
        return [sentence("No nodes.")]
    rows = (
        (each.name, *(_percent(window.uptime) for window in each.windows), _left(each.windows[-1]), each.passport_id)
        for each in nodes
    )
    return [
        sentence(f"{counted(len(nodes), 'node')} together, by the time of each, against {_percent(together.target)}:"),
        uptime_table(together.windows),
        sentence(""),
        Listing(NODE_COLUMNS, rows),
    ]


def _window(window: UptimeWindow) -> tuple[str, ...]:
    budget = window.error_budget
    return (
        str(window.days),
        _percent(window.uptime),
        span(window.unhealthy_seconds),
        span(window.draining_seconds),
        span(window.registry_outage_seconds),
        span(None if budget is None else budget.allowed_seconds),
        _left(window),
    )


def _left(window: UptimeWindow) -> str:
    budget = window.error_budget
    return UNKNOWN if budget is None or budget.remaining is None else f"{budget.remaining * 100:,.1f} %"


def _percent(fraction: float | None) -> str:
    """Answer 0.99861 as `99.861 %`: between 99 and 100 lies all that matters."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.3f} %"


def _column(name: str) -> Column:
    return Column(name, rank=_RANKS.get(name, 0), right=True)


def _figure(name: str, figure: object) -> str:
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return or_unknown(figure)
    return f"{figure * 100:.1f} %" if name in _SHARES else number(figure)


def _minute(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")
