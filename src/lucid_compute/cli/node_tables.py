"""Nodes as a person reads them: the fleet as a table, one node whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import RenderableType

from lucid_compute.cli.connection import in_commands
from lucid_compute.cli.output import Column, Listing, facts, sentence
from lucid_compute.cli.plain_text import UNKNOWN, counted, instant, listed, number, or_unknown, share, span
from lucid_compute.wire.compute import EventView, NodeHealth, NodeView

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
EVENT_COLUMNS = (Column("AT"), Column("EVENT"), Column("REASON", shortest=10), Column("DETAILS", rank=1, shortest=20))


def node_table(nodes: Iterable[NodeView], most_rows: int | None = None) -> Listing:
    """Answer nodes in the order of their names."""
    ordered = sorted(nodes, key=lambda node: (node.name, node.id))
    return Listing(NODE_COLUMNS, [_row(node) for node in ordered], most_rows)


def node_summary(nodes: Sequence[NodeView]) -> str:
    """Answer how many nodes there are of each status."""
    counts = Counter(shown_status(node.health) for node in nodes)
    parts = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return f"{counted(len(nodes), 'node')}: {parts}" if nodes else "No nodes."


def shown_status(health: NodeHealth) -> str:
    """Answer the status, and `stale` for a node that is healthy by the long window and silent by the short one."""
    return "stale" if health.status == "healthy" and not health.fresh else health.status.value


def node_facts(node: NodeView) -> list[RenderableType]:
    """Answer one node: who it is, how it does, and why it counts for nothing if it does not."""
    health = node.health
    parts: list[RenderableType] = [facts([*_identity(node), *_condition(health), *_reported(health)])]
    if health.reasons:
        parts += [sentence(""), sentence("It counts for no model now:", style="bold")]
        parts += [sentence(f"  {reason.code}: {in_commands(reason.message)}", style="red") for reason in health.reasons]
    return parts


def event_table(events: Iterable[EventView]) -> Listing:
    """Answer what happened to a node, as it was listed."""
    return Listing(
        EVENT_COLUMNS,
        [(instant(event.at), event.type, or_unknown(event.reason), _pairs(event.details)) for event in events],
    )


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
        number(health.avg_latency_ms, "ms"),
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
    ]  # fmt: skip


def _condition(health: NodeHealth) -> list[tuple[str, object]]:
    return [
        ("status", shown_status(health)),
        ("last beat", f"{span(health.heartbeat_age_seconds)} ago" if health.last_heartbeat_at else "none yet"),
        ("up for", span(health.uptime_seconds)),
        ("in flight", health.in_flight),
        ("queue", number(health.queue_depth)),
        ("load", share(health.load)),
        ("jobs", f"{number(health.jobs_completed)} completed, {share(health.error_rate)} errors in the last hour"),
        ("latency", number(health.avg_latency_ms, "ms")),
        ("models", listed(health.available_models)),
    ]


def _reported(health: NodeHealth) -> list[tuple[str, object]]:
    if (reported := health.reported) is None:
        return []
    runtime = " ".join(filter(None, (reported.runtime.name, reported.runtime.version))) if reported.runtime else UNKNOWN
    said: list[tuple[str, object]] = [("runtime", runtime)]
    if reported.clock_offset_seconds is not None:
        said.append(("clock", f"{reported.clock_offset_seconds:+.1f} s beside the service's"))
    if reported.detail:
        said.append(("it says", reported.detail))
    return said


def _pairs(details: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in details.items()) or UNKNOWN
