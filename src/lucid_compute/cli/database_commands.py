"""`lucid db`: the database's schema, its backups and their way back. The service migrates the schema at start."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import typer

from lucid_compute.cli.command_groups import SuggestingGroup
from lucid_compute.cli.failures import CommandFailed, ExitStatus, YesOption, confirm
from lucid_compute.cli.output import JsonOption, note, show_done
from lucid_compute.cli.settings import DATABASE_URL, data_dir, postgres_user, variables

app = typer.Typer(
    cls=SuggestingGroup, help="Back up and restore the database, and look at its schema.", no_args_is_help=True
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
Result = TypeVar("Result")
Step = Callable[[ModuleType, str], Coroutine[Any, Any, None]]
MEGABYTE = 1_000_000


@app.command("backup")
def back_up_database(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The file to write.")],
    url: UrlOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if it is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the database to FILE, completely or not at all. Services may run meanwhile."""
    from lucid_compute.postgres import backup, schema  # noqa: PLC0415 - help needs no SQLAlchemy

    if str(file) == "-":
        raise CommandFailed("Name a file. A pipe can't be complete or not at all.", ExitStatus.USAGE)
    with _sentences(), schema.open_database(url, data_dir()) as there:
        made = _run(backup.back_up(backup.Place(there, variables()), file, _reporter("written"), overwrite=overwrite))
    size = file.stat().st_size
    sentence = (
        f"{file} has the whole database ({size / MEGABYTE:.1f} MB, revision {made.revision}). It contains the keys of "
        "nodes: keep it private. admin.key and your settings are not in it."
    )
    show_done(sentence, {"file": str(file), "bytes": size, "revision": made.revision}, as_json=as_json)


@app.command("restore")
def restore_database(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file that `lucid db backup` wrote.")],
    url: UrlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Restore FILE into an empty database, or into a new data folder, and migrate it to this version."""
    from lucid_compute.postgres import backup, embedded, revisions, schema  # noqa: PLC0415 - help needs no SQLAlchemy

    with _sentences():
        made = _run(backup.read_backup(file))
        backup.refuse_newer(made)
        opened = (
            schema.open_database(url, data_dir())
            if url
            else embedded.fill_embedded_database(data_dir(), postgres_user())
        )
        with opened as there:
            _run(backup.restore(backup.Place(there, variables()), made, _reporter("restored")))
            _run(schema.upgrade(there))
    where = "the database" if url else f"the data folder {data_dir()}"
    needed = revisions.head_revision()
    sentence = (
        f"{file} is restored into {where} (revision {needed}). The keys of the backup are valid again, "
        "also those that were revoked after it."
    )
    answer = {"file": str(file), "backupRevision": made.revision, "revision": needed}
    show_done(sentence, answer, as_json=as_json)


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
    from lucid_compute.postgres import revisions, schema  # noqa: PLC0415 - help needs no SQLAlchemy

    with _sentences(), schema.open_database(url, data_dir()) as there:
        if step is not None:
            _run(step(schema, there))
        revision = _run(revisions.current_revision(there))
    sentence = _standing(revision, revisions.head_revision(), revisions.known_revisions())
    show_done(sentence, {"revision": revision, "neededRevision": revisions.head_revision()}, as_json=as_json)


def _standing(revision: str | None, needed: str, known: list[str]) -> str:
    """Return where the schema stands, in words."""
    if revision is None:
        return f"The database has no schema yet. `lucid db upgrade` or `lucid serve` makes it (revision {needed})."
    if revision == needed:
        return f"The schema is up to date (revision {revision})."
    if revision in known:
        return f"The schema is at revision {revision}, and this version needs {needed}. Run: lucid db upgrade"
    return f"A newer version has migrated the schema to revision {revision}; this version needs {needed}."


@contextmanager
def _sentences() -> Iterator[None]:
    """Turn what the database's parts raise into one sentence."""
    from lucid_compute.postgres import backup, database, embedded  # noqa: PLC0415 - help needs no SQLAlchemy

    try:
        yield
    except (backup.BackupFailed, database.DatabaseNotUsable, embedded.EmbeddedPostgresError) as error:
        raise CommandFailed(str(error)) from None
    except asyncio.CancelledError:
        raise CommandFailed("Stopped; nothing was changed.", ExitStatus.INTERRUPTED) from None


def _run(step: Coroutine[Any, Any, Result]) -> Result:
    """Run a step to its end; SIGTERM and the end of a terminal cancel it, so that it leaves nothing behind."""

    async def cancellable() -> Result:
        task = asyncio.current_task()
        for number in (signal.SIGTERM, signal.SIGHUP):
            if task is not None:
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await step

    return asyncio.run(cancellable())


def _reporter(done: str) -> Callable[[int], None]:
    """Return a function that says on stderr how much is done."""
    return lambda size: note(f"{size / MEGABYTE:.0f} MB {done}")
