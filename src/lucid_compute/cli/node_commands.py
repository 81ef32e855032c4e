"""`lucid nodes`: the nodes as a table, live with `--watch`, and one node in full."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from math import inf
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.live import Live

from lucid_compute.cli.command_groups import ListByDefault
from lucid_compute.cli.connection import ApiOption, Connection, KeyOption, connected, with_commands
from lucid_compute.cli.failures import CommandFailed, ExitStatus
from lucid_compute.cli.formatting import UNKNOWN, counted, listed, number, or_unknown, share, span, took
from lucid_compute.cli.lookup import complete_model, complete_node, get_node
from lucid_compute.cli.output import Column, JsonOption, Listing, console_for, facts, sentence, show, show_json
from lucid_compute.client import Lucid
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.shapes import NodeHealth, NodeView

app = typer.Typer(
    cls=ListByDefault,
    help="See the state of nodes: as a table, live with --watch, or one node in full.",
    epilog="`lucid nodes` alone is `lucid nodes list`, with the same options.",
)
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Id or name.", autocompletion=complete_node)]


class NodeSort(StrEnum):
    """The orders of the table of nodes."""

    WORST = "worst"
    NAME = "name"
    LOAD = "load"
    ERRORS = "errors"
    QUEUE = "queue"


# From the worst to the best.
_STATUSES = ("unhealthy", "stale", "draining", "stopped", "healthy", "deregistered")


@app.command("list")
def list_nodes(
    status: Annotated[NodeStatus | None, typer.Option(help="In this state; all that have not ended if unset.")] = None,
    region: Annotated[str | None, typer.Option(help="Nodes of this region.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Nodes that run this runtime.")] = None,
    min_vram: Annotated[float | None, typer.Option(min=0, help="GB at least.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Part of the GPU's name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Nodes that declare or report this model.", autocompletion=complete_model)
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Another owner's nodes; for admins.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the name or the description.")] = None,
    sort: Annotated[NodeSort, typer.Option(help="In which order.")] = NodeSort.WORST,
    is_watched: Annotated[bool, typer.Option("--watch", "-w", help="Keep the table up to date until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two updates of --watch.")] = 2.0,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List nodes with their health. `stale`: healthy, no heartbeat for 30 s; `stopped`: it said so, and is silent."""
    _require_terminal(is_watched=is_watched, as_json=as_json)
    filters: Any = {
        "status": status, "region": region, "runtime": runtime, "min_vram": min_vram,
        "gpu": gpu, "model": model, "owner": owner, "search": search,
    }  # fmt: skip

    with Connection(api, key) as connection:

        def read() -> list[NodeView]:
            with connection.session() as lucid:
                return list(lucid.compute.list(**filters))

        if is_watched:
            watch(read, sort, interval)
        nodes = read()
    if as_json:
        show_json({"nodes": nodes})
    elif nodes:
        show(node_table(nodes, sort), sentence(""), sentence(node_summary(nodes)))
    else:
        show(sentence("No nodes. `lucid agent run` registers one, or `lucid passports create`."))


def _require_terminal(*, is_watched: bool, as_json: bool) -> None:
    if is_watched and (as_json or not sys.stdout.isatty()):
        raise CommandFailed("--watch needs a terminal. For scripts: lucid nodes --json.", ExitStatus.USAGE)


@app.command("show")
def show_node(node: NodeArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """Show one node in full, and why it counts for no model if it does not."""
    with connected(api, key) as lucid:
        view = view_node(lucid, node)
    if as_json:
        show_json(view)
    else:
        show(*node_facts(view))


def view_node(lucid: Lucid, id_or_name: str) -> NodeView:
    """Return a node with its health."""
    passport = get_node(lucid, id_or_name)
    if isinstance(passport, NodeView):
        return passport
    return NodeView(**passport.model_dump(), health=lucid.compute.health(passport.id))


NODE_COLUMNS = (
    Column("NAME", shortest=16),
    Column("STATUS"),
    Column("BEAT", right=True),
    Column("IN FLIGHT", rank=1, right=True),
    Column("QUEUE", rank=2, right=True),
    Column("LOAD", rank=2, right=True),
    Column("GPU", rank=4, shortest=12),
    Column("VRAM", rank=3, right=True),
    Column("MODELS", rank=5, shortest=16),
    Column("REGION", rank=6),
    Column("ERRORS", rank=7, right=True),
    Column("LATENCY", rank=8, right=True),
    Column("OWNER", rank=9, shortest=8),
    Column("ID", rank=10),
)


def node_table(nodes: Iterable[NodeView], sort: NodeSort, most_rows: int | None = None) -> Listing:
    """Return a table of nodes in that order; equal ones are sorted by name."""
    ordered = sorted(nodes, key=lambda node: (_rank(node.health, sort), node.name, node.id))
    return Listing(NODE_COLUMNS, [_row(node) for node in ordered], most_rows)


def _rank(health: NodeHealth, sort: NodeSort) -> float:
    """Return a sort key: the lowest is shown first. Of a figure that is the highest; unknown comes last."""
    if sort is NodeSort.NAME:
        return 0.0
    if sort is NodeSort.WORST:
        return _STATUSES.index(shown_status(health))
    figure = {NodeSort.LOAD: health.load, NodeSort.ERRORS: health.error_rate, NodeSort.QUEUE: health.queue_depth}[sort]
    return inf if figure is None else -figure


def node_summary(nodes: Sequence[NodeView]) -> str:
    """Return how many nodes there are of each status."""
    counts = Counter(shown_status(node.health) for node in nodes)
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{counted(len(nodes), 'node')}: {parts}" if nodes else "No nodes."


def shown_status(health: NodeHealth) -> str:
    """Return the status; `stale` for a healthy node that is not fresh, `stopped` for one that stopped as it said."""
    if health.stopped and health.status is NodeStatus.UNHEALTHY:
        return "stopped"
    return "stale" if health.status == "healthy" and not health.fresh else health.status.value


def is_draining(health: NodeHealth) -> bool:
    """Return whether the node drains, also when it is silent, and therefore unhealthy."""
    return any(reason.code == ReasonCode.DRAINING for reason in health.reasons)


def node_facts(node: NodeView) -> list[RenderableType]:
    """Return one node: its identity, its state, and why it counts for no model if it does not."""
    health = node.health
    parts: list[RenderableType] = [facts([*_identity(node), *_condition(health), *_reported(health)])]
    if health.reasons:
        parts += [sentence(""), sentence("It counts for no model now:", style="bold")]
        parts += [
            sentence(f"  {reason.code}: {with_commands(reason.message)}", style="red") for reason in health.reasons
        ]
    return parts


def _row(node: NodeView) -> tuple[str, ...]:
    health, metadata = node.health, node.metadata
    return (
        node.name,
        shown_status(health),
        span(health.heartbeat_age_seconds),
        number(health.in_flight),
        number(health.queue_depth),
        share(health.load),
        or_unknown(metadata.get("gpu")).removeprefix("NVIDIA "),
        number(metadata.get("vramGb"), "GB"),
        listed(health.available_models),
        or_unknown(metadata.get("region")),
        share(health.error_rate),
        took(health.avg_latency_ms),
        node.owner,
        node.id,
    )


def _identity(node: NodeView) -> list[tuple[str, object]]:
    metadata = node.metadata
    count = metadata.get("gpuCount")
    return [
        ("name", node.name),
        ("id", node.id),
        ("owner", node.owner),
        ("gpu", " x ".join(filter(None, [number(count) if count else "", or_unknown(metadata.get("gpu"))]))),
        ("vram", number(metadata.get("vramGb"), "GB")),
        ("region", or_unknown(metadata.get("region"))),
        ("url", or_unknown(metadata.get("inferenceUrl"))),
        ("takes", f"{counted(metadata['maxConcurrency'], 'request')} at a time" if metadata.get("maxConcurrency") else
         "any number of requests"),
        ("price", _price(metadata)),
    ]  # fmt: skip


def _price(metadata: Mapping[str, Any]) -> str:
    price, others = metadata.get("pricePer1kTokens"), metadata.get("prices") or {}
    text = "none" if price is None else f"${price} for 1,000 tokens"
    return f"{text}; {counted(len(others), 'model')} at a price of its own" if others else text


def _condition(health: NodeHealth) -> list[tuple[str, object]]:
    return [
        ("status", shown_status(health)),
        ("last beat", f"{span(health.heartbeat_age_seconds)} ago" if health.last_heartbeat_at else "none yet"),
        ("up for", span(health.uptime_seconds)),
        ("in flight", health.in_flight),
        ("queue", number(health.queue_depth)),
        ("load", share(health.load)),
        ("jobs", f"{number(health.jobs_completed)} completed, {share(health.error_rate)} errors in the last hour"),
        ("latency", took(health.avg_latency_ms)),
        ("models", listed(health.available_models)),
    ]


def _reported(health: NodeHealth) -> list[tuple[str, object]]:
    if (reported := health.reported) is None:
        return []
    runtime = " ".join(filter(None, (reported.runtime.name, reported.runtime.version))) if reported.runtime else UNKNOWN
    pairs: list[tuple[str, object]] = [("runtime", runtime)]
    if reported.clock_offset_seconds is not None:
        pairs.append(("clock", _clock(reported.clock_offset_seconds)))
    if reported.detail:
        pairs.append(("it says", reported.detail))
    return pairs


def _clock(offset_seconds: float) -> str:
    if abs(offset_seconds) < 0.05:  # noqa: PLR2004 - no tenth of a second
        return "agrees with the service's"
    return f"{span(abs(offset_seconds))} {'ahead of' if offset_seconds > 0 else 'behind'} the service's"


LINES_BESIDE_ROWS = 6  # titles, "and 12 more", the blank line and the footer
PASSING = {ExitStatus.UNREACHABLE}


def watch(read: Callable[[], list[NodeView]], sort: NodeSort, interval_seconds: float) -> None:
    """Show the result of `read` every `interval_seconds`. An outage is shown below the table; other failures raise."""
    console = console_for()
    nodes: list[NodeView] = []
    read_at: datetime | None = None
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            trouble = ""
            try:
                nodes, read_at = read(), datetime.now(UTC)
            except CommandFailed as failure:
                if failure.status not in PASSING:
                    raise
                trouble = failure.sentence
            room = max(1, console.height - LINES_BESIDE_ROWS)
            live.update(_picture(node_table(nodes, sort, room), nodes, read_at, trouble), refresh=True)
            time.sleep(interval_seconds)


def _picture(table: Listing, nodes: list[NodeView], read_at: datetime | None, trouble: str) -> Group:
    """Return the table and the footer."""
    at = f"{read_at:%H:%M:%SZ}" if read_at else "never"
    parts: list[RenderableType] = [table, sentence("")]
    if read_at:
        parts.append(sentence(f"{node_summary(nodes)}. As of {at}; Ctrl-C ends.", style="dim"))
    if trouble:
        parts.append(sentence(trouble, style="red"))
    return Group(*parts)
