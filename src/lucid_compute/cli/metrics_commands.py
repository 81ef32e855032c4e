"""`lucid metrics` and `lucid uptime`: figures over time, of a node or of all one's own, and what is left of budgets."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer

from lucid_compute.cli.completion import complete_model, complete_node
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import refuse_both, write
from lucid_compute.cli.instants import read_past
from lucid_compute.cli.metrics_tables import SHOWN_SERIES, fleet_uptime_parts, series_parts, uptime_table
from lucid_compute.cli.names import get_node
from lucid_compute.cli.output import JsonOption, show, show_json
from lucid_compute.timeline import STEPS

MOST_LINES = 31
HOUR = timedelta(hours=1)


def _read_moment(text: str) -> datetime:
    """Answer the instant; `-7d`, as the API says it, is `7d`."""
    return datetime.now(UTC) if text == "now" else read_past(text.removeprefix("-"))


_WHEN = "an RFC 3339 instant, or so long ago: 90m, 7d, 4w."
OptionalNode = Annotated[
    str | None,
    typer.Argument(metavar="[NODE]", help="Id or name; all nodes together if unset.", autocompletion=complete_node),
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
    """Show what happened step by step: requests, failures, latency, tokens, revenue, load, GPUs; times are UTC."""
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
    """Show uptime over 1, 7 and 30 days, without outages of the registry, and what is left of the error budget."""
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
    """Answer the shortest step that a screen has room for."""
    until = to or datetime.now(UTC)
    length = until - (from_ or datetime.now(UTC) - HOUR)
    return next((name for name, step in STEPS.items() if length <= step * MOST_LINES), "1d")
