"""`lucid drain`, `lucid resume` and `lucid deregister`: take a node out of service, and back in."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lucid_compute.cli.connection import SECONDS_TO_ANSWER, ApiOption, Connection, KeyOption, connected
from lucid_compute.cli.failures import CommandFailed, ExitStatus, YesOption, confirm
from lucid_compute.cli.formatting import counted, plain, span
from lucid_compute.cli.lookup import get_node
from lucid_compute.cli.node_commands import NodeArgument, is_draining, shown_status
from lucid_compute.cli.output import JsonOption, console_for, sentence, show, show_done, show_json
from lucid_compute.client import Lucid
from lucid_compute.registry.domain.event_types import EventType
from lucid_compute.registry.domain.node_state import NodeStatus
from lucid_compute.registry.shapes import DrainAnswer, NodeHealth

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
    """Start no more requests on the node, let running ones finish, and say when it is safe to stop it.

    Ctrl-C ends the waiting, not the drain; `lucid resume` ends the drain.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with Connection(api, key) as connection:
        with connection.session() as lucid:
            passport = get_node(lucid, node)
            state, failure = lucid.compute.drain(passport.id), None

        def read_health() -> NodeHealth:
            with connection.session() as lucid:
                return lucid.compute.health(passport.id)

        if waits and not state.drained:
            with progress_on_terminal(passport.name) as report:
                state, failure = wait_until_drained(state, read_health, report, deadline)
    if as_json:
        show_json(state)
    elif failure is None:
        show(sentence(_drained_or_not(passport.name, state)))
    if failure is not None:
        raise failure


def resume(node: NodeArgument, as_json: JsonOption = False, api: ApiOption = None, key: KeyOption = None) -> None:
    """End a drain, so that the node gets requests again. Exit status 1: no operator drains the node.

    A drain that the node itself reports ends when the node reports otherwise: lucid agent run.
    """
    with connected(api, key) as lucid:
        passport = get_node(lucid, node)
        before = _last_resume(lucid, passport.id)
        health = lucid.compute.resume(passport.id)
        has_changed = _last_resume(lucid, passport.id) != before
    still = _still_out(passport.name, health)
    if as_json:
        show_json(health)
    elif has_changed:
        show(sentence(f"The operator's drain has ended. {still}" if is_draining(health) else still))
    if not has_changed:
        raise CommandFailed(f"Nothing changed: no operator drains {passport.name}. {still}")


def _last_resume(lucid: Lucid, node_id: str) -> str | None:
    """Return the id of the node's newest event of a drain that was ended; None when there is none."""
    newest = next(iter(lucid.compute.events(node_id, type=EventType.RESUMED)), None)
    return None if newest is None else newest.id


def _still_out(name: str, health: NodeHealth) -> str:
    """Return the node's status in a sentence, and what puts it back in service if it is silent or reports a drain."""
    status = shown_status(health)
    if status == "stopped":
        return f"{name} is stopped: it said so {span(health.heartbeat_age_seconds)} ago. Start it: lucid agent run"
    if is_draining(health):
        return f"{name} reports itself that it drains. Start its agent, which ends that: lucid agent run"
    return f"{name} is {status}."


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
    """Deregister a node; this is final. Its events and jobs stay readable, and its name becomes free."""
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


POLL_SECONDS = 0.5
AGREE_SECONDS = 5.0  # a replica reports the node as healthy until it knows of the drain, within 2 s
ReportProgress = Callable[[DrainAnswer, str], None]


def wait_until_drained(
    begun: DrainAnswer, read_health: Callable[[], NodeHealth], report: ReportProgress, deadline: float | None
) -> tuple[DrainAnswer, CommandFailed | None]:
    """Watch the node until it is drained. Return its last state, and the failure if it is not drained.

    An outage of the service is reported, and the wait continues: a drain outlives it.
    """
    state = begun
    agree_at = time.monotonic() + AGREE_SECONDS
    report(state, "")
    while not state.drained:
        if deadline is not None and time.monotonic() >= deadline:
            still = counted(state.in_flight, "request")
            sentence = f"Not drained in time: {still} in flight. The drain goes on; wait again with lucid drain."
            return state, CommandFailed(sentence, ExitStatus.TIMED_OUT)
        time.sleep(_pause(deadline))
        try:
            health = read_health()
        except CommandFailed as failure:
            if failure.status is not ExitStatus.UNREACHABLE:
                raise
            report(state, failure.sentence)
            continue
        if not is_draining(health) and time.monotonic() < agree_at:
            continue
        state = _state_in(health)
        if state.status is not NodeStatus.DRAINING:
            return state, CommandFailed(f"The drain was ended: the node is {state.status}, and may be sent requests.")
        report(state, "")
    return state, None


@contextmanager
def progress_on_terminal(name: str) -> Iterator[ReportProgress]:
    """Show a progress bar of the requests in flight; where stderr is no terminal, a line at each change."""
    if not sys.stderr.isatty():
        yield _line_by_line(name)
        return
    columns = (
        TextColumn("Draining {task.fields[name]}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console_for(sys.stderr), transient=True) as progress:
        task = progress.add_task("drain", total=None, name=plain(name), left="begins")
        most = 0

        def report(state: DrainAnswer, trouble: str) -> None:
            nonlocal most
            most = max(most, state.in_flight)
            left = plain(trouble) or _left(state)
            progress.update(task, total=most or None, completed=most - state.in_flight, left=left)

        yield report


def _left(state: DrainAnswer) -> str:
    """Return what is still awaited: requests, then the confirmation of every replica that it starts none."""
    if state.in_flight == 0 and not state.drained:
        return "waiting for every replica"
    return f"{counted(state.in_flight, 'request')} in flight"


def _state_in(health: NodeHealth) -> DrainAnswer:
    status = NodeStatus.DRAINING if is_draining(health) else health.status
    return DrainAnswer(
        passport_id=health.passport_id, status=status, in_flight=health.in_flight, drained=health.drained
    )


def _line_by_line(name: str) -> ReportProgress:
    printed = ""

    def report(state: DrainAnswer, trouble: str) -> None:
        nonlocal printed
        line = trouble or f"Draining {name}: {_left(state)}."
        if line != printed:
            print(plain(line), file=sys.stderr)
            printed = line

    return report


def _pause(deadline: float | None) -> float:
    left = POLL_SECONDS if deadline is None else deadline - time.monotonic()
    return max(0.0, min(POLL_SECONDS, left))
