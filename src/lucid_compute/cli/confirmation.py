"""Asking before what can't be undone: a person on a terminal is asked, a script has to say --yes."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.plain_text import plain

YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def confirm(question: str, *, is_agreed: bool) -> None:
    """Return if the person agrees; the question goes to stderr.

    Raises:
        CommandFailed: they do not, or nobody can be asked.
    """
    if is_agreed:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CommandFailed(f"{question} Nobody is here to ask: say --yes.", ExitStatus.USAGE)
    if not typer.confirm(plain(question), err=True):
        raise CommandFailed("Nothing was changed.")
