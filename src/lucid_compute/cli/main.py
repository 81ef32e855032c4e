"""The command line, `lucid`: one command per thing that an operator does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from lucid_compute import __version__
from lucid_compute.api.settings import Settings
from lucid_compute.cli.agent_commands import app as agent_app

app = typer.Typer(
    name="lucid",
    help="Compute registry and inference router for networks of GPU providers.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)
database_app = typer.Typer(help="Look at the database's schema and change it by hand.", no_args_is_help=True)
app.add_typer(database_app, name="db")
app.add_typer(agent_app, name="agent")

UrlOption = Annotated[
    str, typer.Option("--database-url", envvar="LUCID_DATABASE_URL", help="postgresql://user:password@host/database")
]


def main() -> None:
    """Run `lucid`."""
    app()


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="TCP port to listen on; 0 takes a free one.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the embedded Postgres and of admin.key.")] = None,
    workers: Annotated[int | None, typer.Option(help="Processes that serve; each is a replica.")] = None,
) -> None:
    """Run the service until SIGTERM: on LUCID_DATABASE_URL when it is set, else on an embedded Postgres."""
    from lucid_compute.cli.serve import run_service  # noqa: PLC0415 - the other commands start without the service

    flags = {"host": host, "port": port, "data_dir": data_dir, "workers": workers}
    settings = _read_settings(**{name: value for name, value in flags.items() if value is not None})
    raise typer.Exit(run_service(settings))


@app.command("settings")
def show_settings(
    as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False,
) -> None:
    """List every setting: its variable, its default, what it means, and what it is set to now."""
    rows = [
        {
            "variable": f"LUCID_{name.upper()}",
            "default": _shown(field.default),
            "set": f"LUCID_{name.upper()}" in os.environ,
            "meaning": field.description or "",
        }
        for name, field in Settings.model_fields.items()
    ]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        mark = " (set)" if row["set"] else ""
        print(f"{row['variable']}{mark}\n    default: {row['default']}\n    {row['meaning']}\n")


@app.callback(invoke_without_command=True)
def show_version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    """Compute registry and inference router for networks of GPU providers."""
    if version:
        print(__version__)
        raise typer.Exit


@database_app.command("upgrade")
def upgrade_database(url: UrlOption, revision: str = "head") -> None:
    """Bring the schema up; the service does this by itself at start."""
    _migrate(url, lambda schema: schema.upgrade(url, revision))


@database_app.command("downgrade")
def downgrade_database(url: UrlOption, revision: str) -> None:
    """Take the schema back to a revision; `base` drops every table with what it holds."""
    _migrate(url, lambda schema: schema.downgrade(url, revision))


@database_app.command("current")
def show_revision(url: UrlOption) -> None:
    """Print the schema's revision, and the one that this version needs."""
    _migrate(url, None)


@database_app.command("revise", hidden=True)
def revise_database(url: UrlOption, message: str) -> None:
    """Write the next migration from what the tables say beyond the database: for people who change the tables."""
    _migrate(url, lambda schema: schema.revise(url, message))


def _migrate(url: str, step: Callable[[ModuleType], Coroutine[Any, Any, None]] | None) -> None:
    """Take a step with the schema and say where it stands then; a failure is one sentence."""
    from lucid_compute.storage import database, schema  # noqa: PLC0415 - the other commands start without it

    try:
        asyncio.run(database.check_usable(url))
        if step is not None:
            asyncio.run(step(schema))
        revision = asyncio.run(schema.current_revision(url)) or "empty"
    except database.DatabaseNotUsable as error:
        print(f"lucid: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    print(f"The schema is at {revision}; this version needs {schema.head_revision()}.")


def _read_settings(**flags: Any) -> Settings:
    try:
        return Settings(**flags)
    except ValidationError as error:
        for fault in error.errors():
            variable = f"LUCID_{fault['loc'][0]}".upper()
            sentence = str(fault["msg"]).removeprefix("Value error, ").removeprefix(f"{variable}: ").rstrip(".")
            print(f"lucid: {variable}: {sentence}. See: lucid settings", file=sys.stderr)
        raise typer.Exit(2) from None


def _shown(value: Any) -> str:
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if value != () else "none"
