"""`lucid drain`, `lucid resume` and `lucid deregister`: taking a node out, and back in."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from lucid_compute.cli.confirmation import YesOption, confirm
from lucid_compute.cli.connection import SECONDS_TO_ANSWER, ApiOption, Connection, KeyOption, connected
from lucid_compute.cli.drain_watch import progress_on_terminal, wait_until_drained
from lucid_compute.cli.names import get_node
from lucid_compute.cli.node_commands import NodeArgument
from lucid_compute.cli.node_tables import shown_status
from lucid_compute.cli.output import JsonOption, sentence, show, show_done, show_json
from lucid_compute.wire.compute import DrainAnswer, NodeHealth

LONGEST_WAIT_SECONDS = 3600


def drain(
    node: NodeArgument,
    waits: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is safe to stop the node.")] = True,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Longest wait; 6 is the exit status after it.")
    ] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Start no request on the node from here on, let running ones finish, and say when it is safe to stop it.

    Ctrl-C ends the waiting, not the drain; `lucid resume` ends the drain.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with Connection(api, key) as connection:
        with connection.asked() as lucid:
            passport = get_node(lucid, node)
            state, failure = lucid.compute.drain(passport.id), None

        def look() -> NodeHealth:
            with connection.asked() as lucid:
                return lucid.compute.health(passport.id)

        if waits and not state.drained:
            with progress_on_terminal(passport.name) as tell:
                state, failure = wait_until_drained(state, look, tell, deadline)
    if as_json:
        show_json(state)
    elif failure is None:
        show(sentence(_drained_or_not(passport.name, state)))
    if failure is not None:
        raise failure


def resume(node: NodeArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """End a drain, so that the node is sent requests again; one that the node began itself is the node's to end."""
    with connected(api, key) as lucid:
        passport = get_node(lucid, node)
        health = lucid.compute.resume(passport.id)
    status = shown_status(health)
    stands = f"{passport.name} is {status}." + (" It says so itself." if status == "draining" else "")
    show_done(stands, health, as_json=as_json)


def deregister(
    node: NodeArgument,
    wait_seconds: Annotated[
        float | None,
        typer.Option(min=0, max=LONGEST_WAIT_SECONDS, metavar="SECONDS", help="Wait so long for requests in flight."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Cut requests in flight off.")] = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """End a node for good. Its events and jobs stay readable, and its name can be registered again."""
    with connected(api, key) as lucid:
        passport = get_node(lucid, node)
    confirm(f"Deregister {passport.name} ({passport.id}) for good?", is_agreed=yes)
    with connected(api, key, timeout_seconds=SECONDS_TO_ANSWER + (wait_seconds or 0)) as lucid:
        answer = lucid.compute.deregister(passport.id, force=force, wait_seconds=wait_seconds)
    show_done(f"{passport.name} is deregistered.", answer, as_json=as_json)


def _drained_or_not(name: str, state: DrainAnswer) -> str:
    if state.drained:
        return f"{name} is drained: safe to stop."
    return f"{name} is draining, {state.in_flight} in flight; lucid drain says when it is safe to stop."
