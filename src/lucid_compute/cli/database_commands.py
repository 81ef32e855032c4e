"""`lucid db`: the database's schema, by hand; the service brings it up by itself at start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import Annotated, Any

import typer

from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.output import JsonOption, sentence, show, show_json

app = typer.Typer(help="Look at the database's schema and change it by hand.", no_args_is_help=True)
UrlOption = Annotated[
    str, typer.Option("--database-url", envvar="LUCID_DATABASE_URL", help="postgresql://user:password@host/database")
]
Step = Callable[[ModuleType], Coroutine[Any, Any, None]]


@app.command("upgrade")
def upgrade_database(url: UrlOption, revision: str = "head", as_json: JsonOption = False) -> None:
    """Bring the schema up; the service does this by itself at start."""
    _migrate(url, lambda schema: schema.upgrade(url, revision), as_json=as_json)


@app.command("downgrade")
def downgrade_database(url: UrlOption, revision: str, as_json: JsonOption = False) -> None:
    """Take the schema back to a revision; `base` drops every table with what it holds."""
    _migrate(url, lambda schema: schema.downgrade(url, revision), as_json=as_json)


@app.command("current")
def show_revision(url: UrlOption, as_json: JsonOption = False) -> None:
    """Print the schema's revision, and the one that this version needs."""
    _migrate(url, None, as_json=as_json)


@app.command("revise", hidden=True)
def revise_database(url: UrlOption, message: str, as_json: JsonOption = False) -> None:
    """Write the next migration from what the tables say beyond the database: for people who change the tables."""
    _migrate(url, lambda schema: schema.revise(url, message), as_json=as_json)


def _migrate(url: str, step: Step | None, *, as_json: bool) -> None:
    """Take a step with the schema and say where it stands then; a failure is one sentence."""
    from lucid_compute.storage import database, schema  # noqa: PLC0415 - `lucid --help` lists us without SQLAlchemy

    try:
        asyncio.run(database.check_usable(url))
        if step is not None:
            asyncio.run(step(schema))
        revision = asyncio.run(schema.current_revision(url))
    except database.DatabaseNotUsable as error:
        raise CommandFailed(str(error)) from None
    needed = schema.head_revision()
    if as_json:
        show_json({"revision": revision, "neededRevision": needed})
    else:
        show(sentence(f"The schema is at {revision or 'empty'}; this version needs {needed}."))
