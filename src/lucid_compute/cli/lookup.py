"""Find nodes, passports and keys by id or name, and complete their names in a shell."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from shlex import quote
from typing import Any, Protocol, TypeVar
from uuid import UUID

import typer

from lucid_compute.cli.connection import connected
from lucid_compute.cli.failures import CommandFailed, ExitStatus
from lucid_compute.client import Lucid
from lucid_compute.client.errors import Forbidden, InvalidRequest, NotFound
from lucid_compute.registry.domain.passports import PassportType
from lucid_compute.registry.keys.shapes import KeyView
from lucid_compute.registry.shapes import PassportView


class Named(Protocol):
    """A thing with an id, a name and an owner."""

    @property
    def id(self) -> str:
        """Its permanent id."""

    @property
    def name(self) -> str:
        """Its owner's name for it."""

    @property
    def owner(self) -> str:
        """Its owner."""


Thing = TypeVar("Thing", bound=Named)


def get_node(lucid: Lucid, id_or_name: str, *, also_ended: bool = False) -> PassportView:
    """Return the node with that id or exact name. An ended node is found by its id, or if no other has its name.

    Raises:
        CommandFailed: there is none, or several have the name.
    """
    if (found := _find_passport(lucid, id_or_name)) is not None and found.type is PassportType.COMPUTE:
        return found
    named = _exactly(lucid.compute.list(search=id_or_name), id_or_name)
    if named:
        return _only(named, id_or_name, "node", "nodes")
    ended = _exactly(lucid.compute.list(status="deregistered", search=id_or_name), id_or_name)
    if ended and not also_ended:
        sentence = f"{id_or_name} was deregistered, for good. What happened to it: lucid events {quote(id_or_name)}"
        raise CommandFailed(sentence, ExitStatus.NOT_FOUND)
    return _only(ended, id_or_name, "node", "nodes")


def get_passport(lucid: Lucid, id_or_name: str) -> PassportView:
    """Return the passport with that id or exact name. A revoked one is found by its id, or if no other has its name.

    Raises:
        CommandFailed: there is none, or several have the name.
    """
    if (found := _find_passport(lucid, id_or_name)) is not None:
        return found
    named = _exactly(lucid.passports.list(search=id_or_name), id_or_name)
    standing = [passport for passport in named if passport.status != "revoked"]
    return _only(standing or named, id_or_name, "passport", "passports")


def get_key(lucid: Lucid, id_or_name: str) -> KeyView:
    """Return the key with that id or exact name.

    Raises:
        CommandFailed: there is none, or several have the name.
    """
    keys = list(lucid.keys.list())
    by_id = [key for key in keys if key.id == id_or_name]
    return _only(by_id or _exactly(keys, id_or_name), id_or_name, "key", "keys")


FEW = 10


def node_names(lucid: Lucid, ids: Iterable[str | None]) -> dict[str, str]:
    """Return the names of nodes by their ids, as far as this key may see them.

    A few are read one by one, more of them from the lists of nodes.
    """
    wanted = {each for each in ids if each is not None}
    names: dict[str, str] = {}
    try:
        if len(wanted) <= FEW:
            for node_id in wanted:
                with suppress(NotFound):
                    names[node_id] = lucid.passports.get(node_id).name
            return names
        for status in (None, "deregistered"):
            if wanted - names.keys():
                listed = lucid.compute.list(status=status)
                names |= {node.id: node.name for node in listed if node.id in wanted}
    except (Forbidden, InvalidRequest):  # a key that only sends requests sees no nodes
        pass
    return names


def _find_passport(lucid: Lucid, text: str) -> PassportView | None:
    """Return the passport with that id. Only a UUID is an id, so a name costs no request here."""
    try:
        return lucid.passports.get(str(UUID(text)))
    except (ValueError, NotFound):
        return None


def _exactly(things: Iterable[Thing], name: str) -> list[Thing]:
    return [thing for thing in things if thing.name == name]


def _only(found: list[Thing], text: str, noun: str, command: str) -> Thing:
    if not found:
        sentence = f"No {noun} has the id or name {text!r}. `lucid {command}` lists the ones this key can see."
        raise CommandFailed(sentence, ExitStatus.NOT_FOUND)
    if len(found) > 1:
        which = ", ".join(f"{thing.id} of {thing.owner}" for thing in found)
        raise CommandFailed(
            f"{len(found)} {noun}s have the name {text!r}. Choose one by its id: {which}.", ExitStatus.USAGE
        )
    return found[0]


SECONDS_TO_ANSWER = 1.0
MOST_NAMES = 200


def complete_node(context: typer.Context, incomplete: str) -> list[str]:
    """Return names of nodes."""
    return _names(context, incomplete, lambda lucid: lucid.compute.list(search=incomplete or None))


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return names of models."""
    return _names(context, incomplete, lambda lucid: lucid.models.list(search=incomplete or None))


def complete_passport(context: typer.Context, incomplete: str) -> list[str]:
    """Return names of passports."""
    return _names(context, incomplete, lambda lucid: lucid.passports.list(search=incomplete or None))


def complete_key(context: typer.Context, incomplete: str) -> list[str]:
    """Return names of keys."""
    return _names(context, incomplete, lambda lucid: lucid.keys.list())


def _names(context: typer.Context, incomplete: str, ask: Callable[[Lucid], Iterable[Any]]) -> list[str]:
    """Return the names that begin like this, sorted. No error may appear between a person's words at the prompt."""
    names: set[str] = set()
    parameters = context.params
    with (
        suppress(CommandFailed),
        connected(parameters.get("api"), parameters.get("key"), timeout_seconds=SECONDS_TO_ANSWER, retries=0) as lucid,
    ):
        for thing in ask(lucid):
            if thing.name.startswith(incomplete) and thing.name.isprintable():
                names.add(thing.name)
            if len(names) == MOST_NAMES:
                break
    return sorted(names)
