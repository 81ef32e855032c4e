"""Names that a shell completes: asked of the service within a moment, and none when it does not answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import typer

from lucid_compute.cli.connection import connected
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.client import Lucid

SECONDS_TO_ANSWER = 1.0
MOST_NAMES = 200


def complete_node(context: typer.Context, incomplete: str) -> list[str]:
    """Answer names of nodes."""
    return _names(context, incomplete, lambda lucid: lucid.compute.list(search=incomplete or None))


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Answer names of models."""
    return _names(context, incomplete, lambda lucid: lucid.models.list(search=incomplete or None))


def complete_passport(context: typer.Context, incomplete: str) -> list[str]:
    """Answer names of passports."""
    return _names(context, incomplete, lambda lucid: lucid.passports.list(search=incomplete or None))


def complete_key(context: typer.Context, incomplete: str) -> list[str]:
    """Answer names of keys."""
    return _names(context, incomplete, lambda lucid: lucid.keys.list())


def _names(context: typer.Context, incomplete: str, ask: Callable[[Lucid], Iterable[Any]]) -> list[str]:
    """Answer what begins so, sorted. A person at a prompt wants no error between their words."""
    names: set[str] = set()
    said = context.params
    with (
        suppress(CommandFailed),
        connected(said.get("api"), said.get("key"), timeout_seconds=SECONDS_TO_ANSWER, retries=0) as lucid,
    ):
        for thing in ask(lucid):
            if thing.name.startswith(incomplete) and thing.name.isprintable():
                names.add(thing.name)
            if len(names) == MOST_NAMES:
                break
    return sorted(names)
