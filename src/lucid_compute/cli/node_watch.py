"""`lucid nodes --watch`: the table of nodes, kept up to date through outages of the service until Ctrl-C."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

from rich.console import Console, Group, RenderableType
from rich.live import Live

from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.node_tables import node_summary, node_table
from lucid_compute.cli.output import console_for, sentence
from lucid_compute.wire.compute import NodeView

LINES_BESIDE_ROWS = 6  # titles, "and 12 more", the footer of two lines and their distance
PASSING = {ExitStatus.UNREACHABLE}


def watch(read: Callable[[], list[NodeView]], interval_seconds: float) -> None:
    """Show what `read` answers every `interval_seconds`; what fails to pass is raised, an outage is shown below."""
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
            live.update(_picture(console, nodes, read_at, trouble), refresh=True)
            time.sleep(interval_seconds)


def _picture(console: Console, nodes: list[NodeView], read_at: datetime | None, trouble: str) -> Group:
    """Answer the table and the footer, as many rows as the terminal has."""
    at = f"{read_at:%H:%M:%SZ}" if read_at else "never"
    parts: list[RenderableType] = [node_table(nodes, max(1, console.height - LINES_BESIDE_ROWS)), sentence("")]
    if read_at:
        parts.append(sentence(f"{node_summary(nodes)}. As of {at}; Ctrl-C ends.", style="dim"))
    if trouble:
        parts.append(sentence(trouble, style="red"))
    return Group(*parts)
