"""The command line, `lucid`: where each command is, in the order of the help."""

from __future__ import annotations

import sys
from typing import Annotated, ClassVar

import typer

from lucid_compute import __version__
from lucid_compute.cli.command_groups import HELP_FLAGS, LazyCommands
from lucid_compute.cli.failures import run
from lucid_compute.cli.profiles import ProfileOption

_HERE = "lucid_compute.cli"


class Commands(LazyCommands):
    """The commands in the order of the help, each with its module."""

    GROUPS: ClassVar[dict[str, dict[str, str]]] = {
        "Run": {
            "serve": f"{_HERE}.serve_command:serve",
            "agent": f"{_HERE}.agent_commands:app",
            "doctor": f"{_HERE}.doctor_command:doctor",
            "db": f"{_HERE}.database_commands:app",
        },
        "Look": {
            "status": f"{_HERE}.status_command:status",
            "nodes": f"{_HERE}.node_commands:app",
            "models": f"{_HERE}.model_commands:app",
            "events": f"{_HERE}.history_commands:events",
            "jobs": f"{_HERE}.history_commands:jobs",
            "metrics": f"{_HERE}.metrics_commands:metrics",
            "uptime": f"{_HERE}.metrics_commands:uptime",
        },
        "Send requests": {
            "chat": f"{_HERE}.chat_command:chat",
            "match": f"{_HERE}.model_commands:match",
            "usage": f"{_HERE}.usage_command:usage",
        },
        "Change nodes and models": {
            "drain": f"{_HERE}.lifecycle_commands:drain",
            "resume": f"{_HERE}.lifecycle_commands:resume",
            "deregister": f"{_HERE}.lifecycle_commands:deregister",
            "passports": f"{_HERE}.passport_commands:app",
        },
        "Administer": {
            "keys": f"{_HERE}.key_commands:app",
            "audit": f"{_HERE}.audit_command:audit",
            "payouts": f"{_HERE}.payout_commands:app",
            "webhooks": f"{_HERE}.webhook_commands:app",
        },
        "Set up": {
            "profiles": f"{_HERE}.profile_commands:app",
            "settings": f"{_HERE}.settings_command:settings",
        },
    }


app = typer.Typer(
    name="lucid",
    cls=Commands,
    help="Compute registry and inference router for networks of GPU providers.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": HELP_FLAGS},
)


def main() -> None:
    """Run `lucid` and exit with a status of docs/cli.md."""
    sys.exit(run(app))


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
    profile: ProfileOption = None,
) -> None:
    """Compute registry and inference router for networks of GPU providers."""
    if version:
        print(__version__)
        raise typer.Exit
