"""Waiting for a drain: looks at the node until it is safe to stop, and tells how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from lucid_compute.cli.exit_status import ExitStatus
from lucid_compute.cli.failures import CommandFailed
from lucid_compute.cli.output import console_for
from lucid_compute.cli.plain_text import counted, plain
from lucid_compute.node_state import NodeStatus
from lucid_compute.wire.compute import DrainAnswer, NodeHealth

LOOKS_EVERY_SECONDS = 0.5
AGREE_SECONDS = 5.0  # a replica that has not heard of the drain yet calls the node healthy; all hear of it within 2 s
Tell = Callable[[DrainAnswer, str], None]


def wait_until_drained(
    begun: DrainAnswer, look: Callable[[], NodeHealth], tell: Tell, deadline: float | None
) -> tuple[DrainAnswer, CommandFailed | None]:
    """Look until the node is drained; answer its last state, and what is wrong with it if it is not.

    An outage of the service is told and waited through: a drain outlives it.
    """
    state = begun
    agree_at = time.monotonic() + AGREE_SECONDS
    tell(state, "")
    while not state.drained:
        if deadline is not None and time.monotonic() >= deadline:
            still = counted(state.in_flight, "request")
            sentence = f"Not drained in time: {still} in flight. The drain goes on; wait again with lucid drain."
            return state, CommandFailed(sentence, ExitStatus.TIMED_OUT)
        time.sleep(_pause(deadline))
        try:
            health = look()
        except CommandFailed as failure:
            if failure.status is not ExitStatus.UNREACHABLE:
                raise
            tell(state, failure.sentence)
            continue
        if health.status is not NodeStatus.DRAINING and time.monotonic() < agree_at:
            continue
        state = _state_in(health)
        if state.status is not NodeStatus.DRAINING:
            return state, CommandFailed(f"The drain was ended: the node is {state.status}, and may be sent requests.")
        tell(state, "")
    return state, None


@contextmanager
def progress_on_terminal(name: str) -> Iterator[Tell]:
    """Show a bar over the requests that were in flight; where stderr is no terminal, a line at each change."""
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

        def tell(state: DrainAnswer, trouble: str) -> None:
            nonlocal most
            most = max(most, state.in_flight)
            left = plain(trouble) or _left(state)
            progress.update(task, total=most or None, completed=most - state.in_flight, left=left)

        yield tell


def _left(state: DrainAnswer) -> str:
    """Answer what is waited for: requests, and then every replica's word that it starts none."""
    if state.in_flight == 0 and not state.drained:
        return "every replica is told"
    return f"{counted(state.in_flight, 'request')} in flight"


def _state_in(health: NodeHealth) -> DrainAnswer:
    return DrainAnswer(
        passport_id=health.passport_id, status=health.status, in_flight=health.in_flight, drained=health.drained
    )


def _line_by_line(name: str) -> Tell:
    said = ""

    def tell(state: DrainAnswer, trouble: str) -> None:
        nonlocal said
        line = trouble or f"Draining {name}: {_left(state)}."
        if line != said:
            print(plain(line), file=sys.stderr)
            said = line

    return tell


def _pause(deadline: float | None) -> float:
    left = LOOKS_EVERY_SECONDS if deadline is None else deadline - time.monotonic()
    return max(0.0, min(LOOKS_EVERY_SECONDS, left))
