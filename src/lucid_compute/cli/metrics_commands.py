"""`lucid metrics` and `lucid uptime`: figures over time of a node or of all nodes. Unknown is a dash, never 0."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from lucid_compute.accounting.series import FAILURES
from lucid_compute.accounting.shapes import FleetUptime, NodeUptime, SeriesAnswer, UptimeWindow
from lucid_compute.accounting.timeline import STEPS
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import refuse_both, write
from lucid_compute.cli.formatting import UNKNOWN, counted, instant, number, or_unknown, span, took
from lucid_compute.cli.lookup import complete_model, complete_node, get_node
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_json
from lucid_compute.cli.time_arguments import read_past

_CHARGED = "revenueUsd"
SHOWN_SERIES = (
    "requests",
    "failed",
    "errorRate",
    "latencyP50Ms",
    "latencyP95Ms",
    "tokensOut",
    _CHARGED,
    "load",
    "queueDepth",
    "gpuUtilization",
    FAILURES,
)
_SHARES = {"errorRate", "load", "loadMax", "gpuUtilization", "gpuUtilizationMax", "uptime"}
# The titles for a person; a series without one keeps its name.
_TITLES = {
    "requests": "REQUESTS",
    "failed": "FAILED",
    "errorRate": "ERRORS",
    "latencyP50Ms": "P50",
    "latencyP95Ms": "P95",
    "tokensOut": "TOKENS",
    _CHARGED: "CHARGED",
    "load": "LOAD",
    "queueDepth": "QUEUE",
    "gpuUtilization": "GPU",
}
_RANKS = {"queueDepth": 4, "load": 3, "gpuUtilization": 2, "tokensOut": 3, "latencyP50Ms": 2, _CHARGED: 1}
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
    """Return a line for each step and one for the total, the reasons of failures, and the registry's outages."""
    parts: list[RenderableType] = []
    if answer.series:
        columns = [Column(f"FROM (EACH {answer.step})"), *(_column(name) for name in answer.series)]
        lines = zip(answer.times, *answer.series.values(), strict=True)
        rows = [(_minute(at), *map(_figure, answer.series, figures)) for at, *figures in lines]
        in_all = ("in all", *(_figure(name, answer.totals[name]) for name in answer.series))
        parts.append(Listing(columns, [*rows, in_all]))
        if answer.totals.get(_CHARGED):
            parts.append(
                sentence(
                    "CHARGED is what was charged, in US dollars. `lucid payouts` shows what each party gets of it."
                )
            )
    if answer.failure_totals is not None:
        reasons = sorted(answer.failure_totals.items(), key=lambda each: (-each[1], each[0]))
        text = ", ".join(f"{reason} {count:,}" for reason, count in reasons) or "none"
        parts += [sentence(""), sentence(f"Failures: {text}.")]
    for outage in answer.outages:
        seconds = (outage.ended_at - outage.started_at).total_seconds()
        text = (
            f"The registry itself was away for {span(seconds)} from {instant(outage.started_at)}: that is in no uptime."
        )
        parts.append(sentence(text, style="yellow"))
    return parts


def uptime_table(windows: Iterable[UptimeWindow]) -> Listing:
    """Return a table of uptimes over windows that end now, each with the rest of its error budget."""
    return Listing(UPTIME_COLUMNS, map(_window, windows))


def fleet_uptime_parts(together: FleetUptime, nodes: Sequence[NodeUptime]) -> list[RenderableType]:
    """Return the windows of all nodes together, and those of each node, the worst first."""
    if not nodes:
        return [sentence("No nodes.")]
    worst_first = sorted(nodes, key=lambda each: (_known_uptime(each), each.name))
    rows = (
        (each.name, *map(_verdict, each.windows), _left(each.windows[-1]), each.passport_id) for each in worst_first
    )
    return [
        sentence(f"{counted(len(nodes), 'node')} together, by the time of each, against {_percent(together.target)}:"),
        uptime_table(together.windows),
        sentence(""),
        Listing(NODE_COLUMNS, rows),
    ]


def _known_uptime(node: NodeUptime) -> float:
    """Return the uptime over the longest window; above every share when there is no verdict yet."""
    window = node.windows[-1]
    return 2.0 if window.error_budget is None or window.uptime is None else window.uptime


def _window(window: UptimeWindow) -> tuple[str, ...]:
    budget = window.error_budget
    return (
        str(window.days),
        _known_since(window) if budget is None else _percent(window.uptime),
        span(window.unhealthy_seconds),
        span(window.draining_seconds),
        span(window.registry_outage_seconds),
        span(None if budget is None else budget.allowed_seconds),
        _left(window),
    )


def _verdict(window: UptimeWindow) -> str:
    return _percent(None if window.error_budget is None else window.uptime)


def _left(window: UptimeWindow) -> str:
    budget = window.error_budget
    if budget is None or budget.remaining is None:
        return UNKNOWN
    return "overspent" if budget.used_seconds > budget.allowed_seconds else f"{budget.remaining * 100:,.1f} %"


def _known_since(window: UptimeWindow) -> str:
    """Return since when the node is known, instead of a share of so short a time; a dash when nothing is known."""
    seconds = window.healthy_seconds + window.unhealthy_seconds + window.draining_seconds
    if not seconds:
        return UNKNOWN
    since = datetime.now(UTC) - timedelta(seconds=seconds + window.registry_outage_seconds)
    return f"since {since:%H:%MZ} ({span(seconds)})"


def _percent(fraction: float | None) -> str:
    """Return 0.99861 as `99.861 %`. Three decimals, because the interesting values are between 99 and 100."""
    return UNKNOWN if fraction is None else f"{fraction * 100:.3f} %"


def _column(name: str) -> Column:
    return Column(_TITLES.get(name, name), rank=_RANKS.get(name, 0), right=True)


def _figure(name: str, figure: object) -> str:
    if isinstance(figure, bool) or not isinstance(figure, int | float):
        return or_unknown(figure)
    if name in _SHARES:
        return f"{figure * 100:.1f} %"
    return took(figure) if name.endswith("Ms") else number(figure)


def _minute(at: datetime) -> str:
    return at.astimezone(UTC).strftime("%Y-%m-%d %H:%MZ")


MOST_LINES = 31
HOUR = timedelta(hours=1)


def _read_moment(text: str) -> datetime:
    """Return the instant. `-7d`, as the API writes it, is `7d`."""
    return datetime.now(UTC) if text == "now" else read_past(text.removeprefix("-"))


_WHEN = "an RFC 3339 instant, or how long ago: 90m, 7d, 4w."
OptionalNode = Annotated[
    str | None,
    typer.Argument(metavar="NODE", help="Id or name; all nodes together if unset.", autocompletion=complete_node),
]
OwnerOption = Annotated[str | None, typer.Option(help="Another owner's nodes; for admins.")]
FromOption = Annotated[
    datetime | None,
    typer.Option("--from", parser=_read_moment, metavar="WHEN", help=f"Where to begin, an hour ago if unset: {_WHEN}"),
]
ToOption = Annotated[
    datetime | None,
    typer.Option("--to", parser=_read_moment, metavar="WHEN", help=f"Where to end, now if unset: {_WHEN}"),
]
StepOption = Annotated[str | None, typer.Option(metavar="STEP", help=f"{', '.join(STEPS)}; by the span if unset.")]
SeriesOption = Annotated[
    str | None, typer.Option(metavar="NAMES", help="Which, separated by commas; docs/monitoring.md lists them.")
]
ModelOption = Annotated[
    str | None, typer.Option(metavar="MODEL", help="Jobs of this model alone.", autocompletion=complete_model)
]
CsvOption = Annotated[bool, typer.Option("--csv", help="Write CSV, for spreadsheets: a line a step.")]


def metrics(
    node: OptionalNode = None,
    from_: FromOption = None,
    to: ToOption = None,
    step: StepOption = None,
    series: SeriesOption = None,
    model: ModelOption = None,
    owner: OwnerOption = None,
    as_csv: CsvOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show figures step by step: requests, failures, latency, tokens, revenue, load, GPUs. Times are UTC."""
    refuse_both("--csv", as_csv, "--json", as_json)
    refuse_both("NODE", node, "--owner", owner)
    wanted: dict[str, Any] = {"from_": from_, "to": to, "step": step, "model": model}
    wanted["series"] = series.split(",") if series else None
    if not as_csv and not as_json:
        wanted |= {"step": step or _step_for(from_, to), "series": wanted["series"] or SHOWN_SERIES}
    with connected(api, key) as lucid:
        if node is not None:
            passport_id = get_node(lucid, node, also_ended=True).id
            read, read_csv = lucid.metrics.node, lucid.metrics.node_csv
            answer = read_csv(passport_id, **wanted) if as_csv else read(passport_id, **wanted)
        elif as_csv:
            answer = lucid.metrics.fleet_csv(owner=owner, **wanted)
        else:
            answer = lucid.metrics.fleet(owner=owner, **wanted)
    if isinstance(answer, str):
        write(answer)
    elif as_json:
        show_json(answer)
    else:
        show(*series_parts(answer))


def uptime(
    node: OptionalNode = None,
    target: Annotated[
        float | None, typer.Option(help="The share of time to be healthy, such as 0.99; the service's if unset.")
    ] = None,
    owner: OwnerOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Show uptime over 1, 7 and 30 days, without outages of the registry, and the rest of the error budget."""
    refuse_both("NODE", node, "--owner", owner)
    with connected(api, key) as lucid:
        if node is not None:
            one = lucid.metrics.uptime(get_node(lucid, node, also_ended=True).id, target=target)
            return show_json(one) if as_json else show(uptime_table(one.windows))
        together = lucid.metrics.fleet_uptime(target=target, owner=owner)
        each = list(lucid.metrics.uptimes(target=target, owner=owner))
    if as_json:
        shown = {"owner": together.owner, "target": together.target, "windows": together.windows, "nodes": each}
        return show_json(shown)
    return show(*fleet_uptime_parts(together, each))


def _step_for(from_: datetime | None, to: datetime | None) -> str:
    """Return the shortest step whose table fits on a screen."""
    until = to or datetime.now(UTC)
    length = until - (from_ or datetime.now(UTC) - HOUR)
    return next((name for name, step in STEPS.items() if length <= step * MOST_LINES), "1d")
