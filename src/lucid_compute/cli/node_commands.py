"""`lucid nodes`, `lucid events` and `lucid resume`: how nodes do, what happened to them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from lucid_compute.cli.command_groups import ListsByDefault
from lucid_compute.cli.completion import complete_model, complete_node
from lucid_compute.cli.connection import ApiOption, Connection, KeyOption, connected
from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.names import get_node
from lucid_compute.cli.node_tables import node_facts, node_summary, node_table
from lucid_compute.cli.node_watch import watch
from lucid_compute.cli.output import JsonOption, sentence, show, show_json
from lucid_compute.client import Lucid
from lucid_compute.node_state import NodeStatus
from lucid_compute.wire.compute import NodeView

app = typer.Typer(
    cls=ListsByDefault,
    help="See how nodes do: as a table, live with --watch, or one node whole.",
    epilog="`lucid nodes` alone is `lucid nodes list`, with the same options.",
)
NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="Id or name.", autocompletion=complete_node)]


@app.command("list")
def list_nodes(
    status: Annotated[NodeStatus | None, typer.Option(help="Ended nodes are shown only by `deregistered`.")] = None,
    region: Annotated[str | None, typer.Option(help="Nodes of this region.")] = None,
    runtime: Annotated[str | None, typer.Option(help="Nodes that run this runtime.")] = None,
    min_vram: Annotated[float | None, typer.Option(min=0, help="GB at least.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Part of the GPU's name.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Nodes that declare or report this model.", autocompletion=complete_model)
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Another owner's nodes; for admins.")] = None,
    search: Annotated[str | None, typer.Option(help="Part of the name or the description.")] = None,
    is_watched: Annotated[bool, typer.Option("--watch", "-w", help="Keep the table up to date until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks of --watch.")] = 2.0,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List nodes with their health; `stale` is healthy, but silent for more than 30 s."""
    if is_watched and (as_json or not sys.stdout.isatty()):
        raise CommandFailed("--watch needs a terminal. For scripts: lucid nodes --json.", ExitStatus.USAGE)
    wanted: Any = {
        "status": status, "region": region, "runtime": runtime, "min_vram": min_vram,
        "gpu": gpu, "model": model, "owner": owner, "search": search,
    }  # fmt: skip

    with Connection(api, key) as connection:

        def read() -> list[NodeView]:
            with connection.asked() as lucid:
                return list(lucid.compute.list(**wanted))

        if is_watched:
            watch(read, interval)
        nodes = read()
    if as_json:
        show_json({"nodes": nodes})
    elif nodes:
        show(node_table(nodes), sentence(""), sentence(node_summary(nodes)))
    else:
        show(sentence("No nodes. `lucid agent run` registers one, or `lucid passports create`."))


@app.command("show")
def show_node(node: NodeArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """Show one node whole, and why it counts for nothing if it does not."""
    with connected(api, key) as lucid:
        view = view_node(lucid, node)
    if as_json:
        show_json(view)
    else:
        show(*node_facts(view))


def view_node(lucid: Lucid, id_or_name: str) -> NodeView:
    """Answer a node with its health."""
    passport = get_node(lucid, id_or_name)
    if isinstance(passport, NodeView):
        return passport
    return NodeView(**passport.model_dump(), health=lucid.compute.health(passport.id))
