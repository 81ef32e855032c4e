"""`lucid events` and `lucid jobs`: what happened to nodes, and the attempts on them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import islice
from typing import Annotated, Any

import typer

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.shapes import JobView
from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import refuse_both
from lucid_compute.cli.formatting import UNKNOWN, instant, or_unknown, took
from lucid_compute.cli.lookup import complete_model, complete_node, get_node, node_names
from lucid_compute.cli.output import Column, JsonOption, Listing, sentence, show, show_json
from lucid_compute.cli.time_arguments import read_past
from lucid_compute.registry.shapes import EventView, FleetEventView

MOST_SHOWN = 50
LimitOption = Annotated[
    int | None, typer.Option(min=1, help=f"How many at most, newest first; {MOST_SHOWN} if unset; all with --json.")
]
SinceOption = Annotated[
    datetime | None,
    typer.Option(parser=read_past, metavar="WHEN", help="Since when: an RFC 3339 instant, or how long ago: 90m, 7d."),
]


def events(
    node: Annotated[
        str | None, typer.Argument(metavar="NODE", help="Id or name; all nodes if unset.", autocompletion=complete_node)
    ] = None,
    since: SinceOption = None,
    event_type: Annotated[str | None, typer.Option("--type", help="Only these, such as `unhealthy`.")] = None,
    owner: Annotated[str | None, typer.Option(help="Of another owner's nodes; for admins.")] = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List what happened to nodes, newest first; the events of an ended node stay readable.

    Without NODE and without --since it lists the last seven days of all nodes.
    """
    refuse_both("NODE", node, "--owner", owner)
    with connected(api, key) as lucid:
        listed: Iterable[EventView]
        if node is None:
            name, listed = "a node", lucid.compute.fleet_events(since=since, type=event_type, owner=owner)
        else:
            passport = get_node(lucid, node, also_ended=True)
            name, listed = passport.name, lucid.compute.events(passport.id, since=since, type=event_type)
        found = list(islice(listed, _most(limit, as_json)))
    if as_json:
        show_json({"events": found})
    else:
        show(event_table(found) if found else sentence(f"Nothing of the kind happened to {name}."))


def jobs(
    node: Annotated[
        str | None, typer.Option(metavar="NODE", help="Of this node: id or name.", autocompletion=complete_node)
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Of this model: id or name.", autocompletion=complete_model)
    ] = None,
    outcome: Annotated[Outcome | None, typer.Option(help="Only those that ended so.")] = None,
    since: SinceOption = None,
    owner: Annotated[str | None, typer.Option(help="On another owner's nodes; for admins.")] = None,
    consumer: Annotated[
        str | None, typer.Option(help="Of the requests that this owner's keys sent; another's for admins.")
    ] = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """List the attempts of requests on nodes and their outcomes, newest first. Each attempt of a request is a job."""
    with connected(api, key) as lucid:
        passport_id = None if node is None else get_node(lucid, node, also_ended=True).id
        listed = lucid.compute.jobs(
            passport_id=passport_id, model=model, outcome=outcome, since=since, owner=owner, consumer=consumer
        )
        found = list(islice(listed, _most(limit, as_json)))
        names = {} if as_json else node_names(lucid, (job.passport_id for job in found))
    if as_json:
        show_json({"jobs": found})
    else:
        show(job_table(found, names) if found else sentence("No such jobs."))


def _most(limit: int | None, as_json: bool) -> int | None:
    """Return how many to read. A person gets a screenful; a script gets all."""
    return limit if limit is not None or as_json else MOST_SHOWN


JOB_COLUMNS = (
    Column("STARTED"),
    Column("MODEL", shortest=12),
    Column("NODE", rank=2, shortest=8),
    Column("OUTCOME"),
    Column("REASON", rank=3, shortest=10),
    Column("TOKENS", rank=1, right=True),
    Column("FIRST", rank=4, right=True),
    Column("TOOK", rank=1, right=True),
    Column("USD", rank=5, right=True),
    Column("ID", rank=6),
)


def job_table(jobs: Iterable[JobView], names: Mapping[str, str]) -> Listing:
    """Return a table of jobs, in their order. `names` has the nodes' names by their ids, as far as they are known."""
    return Listing(JOB_COLUMNS, [_job(job, names) for job in jobs])


def _job(job: JobView, names: Mapping[str, str]) -> tuple[str, ...]:
    tokens = "-" if job.tokens_out is None else f"{job.tokens_in or 0:,}+{job.tokens_out:,}"
    return (
        instant(job.started_at),
        job.model,
        or_unknown(names.get(job.passport_id or "", job.passport_id)),
        job.outcome.value,
        or_unknown(job.reason),
        tokens,
        took(job.first_byte_ms),
        took(job.latency_ms),
        or_unknown(job.price_usd),
        job.id,
    )


EVENT_COLUMNS = (Column("AT"), Column("EVENT"), Column("REASON", shortest=10), Column("DETAILS", rank=1, shortest=20))


def event_table(events: Iterable[EventView]) -> Listing:
    """Return a table of events, in their order; with the node's name if they are of several nodes."""
    listed = list(events)
    columns = [*EVENT_COLUMNS[:1], Column("NODE", shortest=8), *EVENT_COLUMNS[1:]]
    if not any(isinstance(event, FleetEventView) for event in listed):
        return Listing(EVENT_COLUMNS, [_event(event) for event in listed])
    rows = [(_event(event), event.name if isinstance(event, FleetEventView) else UNKNOWN) for event in listed]
    return Listing(columns, [(at, name, *rest) for (at, *rest), name in rows])


def _event(event: EventView) -> tuple[str, ...]:
    return instant(event.at), event.type, or_unknown(event.reason), _pairs(event.details)


def _pairs(details: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in details.items()) or UNKNOWN
