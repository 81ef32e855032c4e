"""The command line, `lucid`: where each command is, in the order of the help."""

from __future__ import annotations

import sys
from typing import Annotated, ClassVar

import typer

from lucid_compute import __version__
from lucid_compute.cli.command_groups import LazyCommands
from lucid_compute.cli.failures import run

_HERE = "lucid_compute.cli"


class Commands(LazyCommands):
    """The commands in the order of the help, each with its module."""

    PLACES: ClassVar[dict[str, str]] = {
        "serve": f"{_HERE}.serve_command:serve",
        "agent": f"{_HERE}.agent_commands:app",
        "doctor": f"{_HERE}.doctor_command:doctor",
        "nodes": f"{_HERE}.node_commands:app",
        "models": f"{_HERE}.model_commands:app",
        "match": f"{_HERE}.model_commands:match",
        "drain": f"{_HERE}.lifecycle_commands:drain",
        "resume": f"{_HERE}.lifecycle_commands:resume",
        "deregister": f"{_HERE}.lifecycle_commands:deregister",
        "events": f"{_HERE}.history_commands:events",
        "jobs": f"{_HERE}.history_commands:jobs",
        "metrics": f"{_HERE}.metrics_commands:metrics",
        "uptime": f"{_HERE}.metrics_commands:uptime",
        "usage": f"{_HERE}.usage_command:usage",
        "payouts": f"{_HERE}.payout_commands:app",
        "passports": f"{_HERE}.passport_commands:app",
        "keys": f"{_HERE}.key_commands:app",
        "webhooks": f"{_HERE}.webhook_commands:app",
        "settings": f"{_HERE}.settings_command:settings",
        "db": f"{_HERE}.database_commands:app",
    }


app = typer.Typer(
    name="lucid",
    cls=Commands,
    help="Compute registry and inference router for networks of GPU providers.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run `lucid` and exit with a status of docs/cli.md."""
    sys.exit(run(app))


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Compute registry and inference router for networks of GPU providers."""
    if version:
        print(__version__)
        raise typer.Exit
