"""`lucid status`: whether the service can serve, what it has, and what needs attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import typer
from rich.console import RenderableType

from lucid_compute import __version__
from lucid_compute.accounting.shapes import HourTotals, Overview
from lucid_compute.cli.connection import ApiOption, Connection, KeyOption, with_commands
from lucid_compute.cli.failures import ExitStatus
from lucid_compute.cli.formatting import UNKNOWN, counted, instant, or_unknown, share, span, took
from lucid_compute.cli.node_commands import shown_status
from lucid_compute.cli.output import Column, JsonOption, Listing, facts, sentence, show, show_json
from lucid_compute.client import Lucid
from lucid_compute.client.errors import Forbidden, Unauthorized
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.shapes import NodeView
from lucid_compute.web.shapes import Readiness

MOST_NODES = 10
MOST_READ = 500
COLUMNS = (Column("NODE", shortest=12), Column("STATUS"), Column("LAST BEAT", right=True), Column("WHY", shortest=20))


def status(as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """Say whether the service is up, what it has, and what needs attention.

    Exit status: 0 all is well, 1 something needs attention, 3 the service can't be reached or is not ready.
    """
    with Connection(api, key) as connection, connection.session() as lucid:
        ready = lucid.ready()
        overview, sick = _read_fleet(lucid)
    service = connection.service
    faults = _faults(overview)
    if as_json:
        shown = {"url": lucid.base_url, "profile": service.profile, "readiness": ready, "overview": overview}
        show_json({**shown, "needsAttention": {"service": faults, "nodes": sick}, "ok": not (faults or sick)})
    else:
        name = f" (profile {service.profile})" if service.profile else ""
        show(facts([("service", f"{lucid.base_url}{name}"), *_state(ready), *_fleet(overview, ready)]))
        show(*_attention(faults, sick, knows=overview is not None))
    if faults or sick:
        raise typer.Exit(ExitStatus.REFUSED)


def _read_fleet(lucid: Lucid) -> tuple[Overview | None, list[NodeView]]:
    """Return the overview and the sick nodes, the worst first; None and no nodes if this key may not see them."""
    try:
        overview = lucid.compute.overview()
        found = islice(lucid.compute.list(status=NodeStatus.UNHEALTHY), MOST_READ) if overview.nodes.unhealthy else ()
        sick = [node for node in found if shown_status(node.health) != "stopped"]
    except (Forbidden, Unauthorized):
        return None, []
    return overview, sorted(sick, key=lambda node: (node.health.heartbeat_age_seconds or 0.0, node.name))


def _state(ready: Readiness) -> list[tuple[str, object]]:
    form = {True: ", compiled", False: "", None: ""}[ready.compiled]
    version = f"{or_unknown(ready.version)} on Python {or_unknown(ready.python)}{form}"
    if ready.version not in {None, __version__}:
        version += f"; this command line is {__version__}"
    return [("version", version), ("state", f"ready, {counted(ready.replicas, 'replica')}")]


def _fleet(overview: Overview | None, ready: Readiness) -> list[tuple[str, object]]:
    if overview is None:
        return [("nodes", ready.nodes), ("models", ready.models)]
    nodes, models = overview.nodes, overview.models
    late = f" ({nodes.healthy - nodes.fresh} late with a heartbeat)" if nodes.healthy > nodes.fresh else ""
    whose = f" of {overview.owner}" if overview.owner else ""
    states = f"{nodes.healthy} healthy{late}, {nodes.draining} draining, {nodes.unhealthy} unhealthy"
    return [
        ("nodes", f"{nodes.total}{whose}: {states}"),
        ("models", f"{models.total}: {models.available} available, {models.served} served"),
        ("in flight", counted(overview.in_flight, "request")),
        ("last hour", _hour(overview.last_hour)),
    ]


def _hour(hour: HourTotals | None) -> str:
    if hour is None:
        return UNKNOWN
    parts = [counted(hour.requests, "request")]
    if hour.error_rate is not None:
        parts.append(f"{share(hour.error_rate)} failed")
    if hour.latency_p50_ms is not None:
        parts.append(f"half within {took(hour.latency_p50_ms)}, 95 % within {took(hour.latency_p95_ms)}")
    if hour.revenue_usd is not None:
        parts.append(f"${hour.revenue_usd} charged")
    return ", ".join(parts)


def _faults(overview: Overview | None) -> list[str]:
    """Return what is wrong with the service itself."""
    faults = []
    if overview is not None and overview.outage_since is not None:
        faults.append(f"The service has received no heartbeats since {instant(overview.outage_since)}.")
    if overview is not None and overview.last_hour is None:
        faults.append("The database is unavailable: the last hour's figures can't be read.")
    return faults


def _attention(faults: Sequence[str], sick: Sequence[NodeView], *, knows: bool) -> list[RenderableType]:
    if not knows:
        return [sentence(""), sentence("This key can't see nodes, so whether they need attention is not known.")]
    if not (faults or sick):
        return [sentence(""), sentence("Nothing needs attention.", style="green")]
    parts: list[RenderableType] = [sentence(""), sentence("Needs attention:", style="bold")]
    parts += [sentence(fault, style="red") for fault in faults]
    if sick:
        parts.append(Listing(COLUMNS, [_row(node) for node in sick[:MOST_NODES]]))
        more = f"And {counted(len(sick) - MOST_NODES, 'node')} more: lucid nodes --status unhealthy. "
        parts += [
            sentence(""),
            sentence(f"{more if len(sick) > MOST_NODES else ''}To find out more: lucid doctor NODE"),
        ]
    return parts


def _row(node: NodeView) -> tuple[str, ...]:
    health: Any = node.health
    said = health.reported.detail if health.reported is not None else None
    reasons = [with_commands(reason.message) for reason in health.reasons]
    beat = f"{span(health.heartbeat_age_seconds)} ago" if health.last_heartbeat_at else "none yet"
    return node.name, shown_status(health), beat, said or next(iter(reasons), UNKNOWN)
