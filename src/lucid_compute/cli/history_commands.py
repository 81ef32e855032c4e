"""`lucid events`, `lucid jobs` and `lucid match`: what happened to nodes, what they did, where a request would go."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import Annotated

import typer

from lucid_compute.cli.completion import complete_model, complete_node
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.instants import read_past
from lucid_compute.cli.match_tables import job_table, match_parts
from lucid_compute.cli.model_commands import ModelArgument
from lucid_compute.cli.names import get_node
from lucid_compute.cli.node_commands import NodeArgument
from lucid_compute.cli.node_tables import event_table
from lucid_compute.cli.output import JsonOption, sentence, show, show_json
from lucid_compute.jobs import Outcome

MOST_SHOWN = 50
LimitOption = Annotated[
    int | None, typer.Option(min=1, help=f"How many at most, newest first; {MOST_SHOWN} if unset, with --json all.")
]
SinceOption = Annotated[
    datetime | None,
    typer.Option(parser=read_past, metavar="WHEN", help="The oldest: an RFC 3339 instant, or so long ago: 90m, 7d."),
]


def events(
    node: NodeArgument,
    since: SinceOption = None,
    event_type: Annotated[str | None, typer.Option("--type", help="Only these, such as `unhealthy`.")] = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List what happened to a node, newest first; an ended node's events stay readable."""
    with connected(api, key) as lucid:
        passport = get_node(lucid, node, also_ended=True)
        found = list(islice(lucid.compute.events(passport.id, since=since, type=event_type), _most(limit, as_json)))
    if as_json:
        show_json({"events": found})
    else:
        show(event_table(found) if found else sentence(f"Nothing of the kind happened to {passport.name}."))


def jobs(
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Of this node: id or name.", autocompletion=complete_node)
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of this model: id or name.", autocompletion=complete_model)
    ] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="Only those that ended so.")] = None,
    since: SinceOption = None,
    owner: Annotated[str | None, typer.Option(help="Another owner's; for admins.")] = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List what was routed to nodes and what became of it, newest first: each attempt of a request is a job."""
    with connected(api, key) as lucid:
        passport_id = None if node is None else get_node(lucid, node, also_ended=True).id
        listed = lucid.compute.jobs(passport_id=passport_id, model=model, outcome=outcome, since=since, owner=owner)
        found = list(islice(listed, _most(limit, as_json)))
    if as_json:
        show_json({"jobs": found})
    else:
        show(job_table(found) if found else sentence("No such jobs."))


def match(
    model: ModelArgument,
    region: Annotated[list[str] | None, typer.Option(help="Allow this region; may be given again.")] = None,
    max_price: Annotated[str | None, typer.Option(help="US dollars for 1,000 tokens at most.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(min=0, help="To the first byte, at most.")] = None,
    user: Annotated[str | None, typer.Option(help="The session, as `user` in a request.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Ask where a request would go, without sending it; the exit status is 1 if no node may be sent it."""
    wants = {"allow_regions": region, "max_price_per_1k_tokens": max_price, "max_latency_ms": max_latency_ms}
    policy = {name: value for name, value in wants.items() if value is not None}
    with connected(api, key) as lucid:
        answer = lucid.match(model, user=user, lucid=policy)
    if as_json:
        show_json(answer)
    else:
        show(*match_parts(answer))
    if answer.chosen is None:
        raise typer.Exit(ExitStatus.REFUSED)


def _most(limit: int | None, as_json: bool) -> int | None:
    """Answer how many to read: a person is spared a ledger of millions, a script gets what it asks for."""
    return limit if limit is not None or as_json else MOST_SHOWN
