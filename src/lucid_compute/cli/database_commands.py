"""`lucid db`: look at the database's schema and change it by hand. The service migrates it automatically at start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import ModuleType
from typing import Annotated, Any

import typer

from lucid_compute.cli.command_groups import SuggestingGroup
from lucid_compute.cli.failures import CommandFailed, YesOption, confirm
from lucid_compute.cli.output import JsonOption, show_done
from lucid_compute.cli.settings import DATABASE_URL, data_dir

app = typer.Typer(
    cls=SuggestingGroup, help="Look at the database's schema and change it by hand.", no_args_is_help=True
)
UrlOption = Annotated[
    str | None,
    typer.Option(
        "--database-url",
        envvar=DATABASE_URL,
        metavar="URL",
        help="postgresql://user:password@host/database; unset, the embedded Postgres of the data folder here.",
    ),
]
Step = Callable[[ModuleType, str], Coroutine[Any, Any, None]]


@app.command("upgrade")
def upgrade_database(url: UrlOption = None, revision: str = "head", as_json: JsonOption = False) -> None:
    """Migrate the schema to a revision; the service does this automatically at start."""
    _migrate(url, lambda schema, there: schema.upgrade(there, revision), as_json=as_json)


@app.command("downgrade")
def downgrade_database(
    revision: str, url: UrlOption = None, yes: YesOption = False, as_json: JsonOption = False
) -> None:
    """Take the schema back to a revision; `base` drops every table with its data."""
    confirm(f"Take the schema back to {revision}, and drop what came after it with its data?", is_agreed=yes)
    _migrate(url, lambda schema, there: schema.downgrade(there, revision), as_json=as_json)


@app.command("current")
def show_revision(url: UrlOption = None, as_json: JsonOption = False) -> None:
    """Print the schema's revision, and the revision that this version needs."""
    _migrate(url, None, as_json=as_json)


def _migrate(url: str | None, step: Step | None, *, as_json: bool) -> None:
    """Run a step on the schema and print the revision afterwards. A failure is one sentence."""
    from lucid_compute.postgres import database, embedded, schema  # noqa: PLC0415 - help needs no SQLAlchemy

    try:
        with schema.open_database(url, data_dir()) as there:
            if step is not None:
                asyncio.run(step(schema, there))
            revision = asyncio.run(schema.current_revision(there))
        needed = schema.head_revision()
    except (database.DatabaseNotUsable, embedded.EmbeddedPostgresError) as error:
        raise CommandFailed(str(error)) from None
    sentence = f"The schema is at {revision or 'empty'}; this version needs {needed}."
    show_done(sentence, {"revision": revision, "neededRevision": needed}, as_json=as_json)
