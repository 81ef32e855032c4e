"""`lucid passports import`: register the passports of a file, in batches, and say what became of each line."""

from __future__ import annotations

import os
import stat
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, BinaryIO, NamedTuple
from uuid import uuid4

import typer
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from lucid_compute.cli.connection import ApiOption, KeyOption, connected
from lucid_compute.cli.failures import ExitStatus
from lucid_compute.cli.output import JsonOption, console_for, note, sentence, show, show_json
from lucid_compute.cli.passport_files import Entry, FileFormat, format_of, read_entries
from lucid_compute.client import Lucid, LucidClientError, split_batches
from lucid_compute.errors import PassportExists
from lucid_compute.registry.domain.passports import PassportType
from lucid_compute.registry.shapes import BatchFault, BatchResult

ANSWER_SECONDS = 30.0
PATIENCE_SECONDS = 60.0
RESENDS = 5
AT_A_TIME = 2
FAULTS_SHOWN = 100
UNAVAILABLE = 503


class Fault(NamedTuple):
    """Why the passport of a line was not registered."""

    line: int
    code: str
    message: str


@dataclass(slots=True)
class Tally:
    """What became of the passports so far."""

    registered: int = 0
    there_already: int = 0
    faults: list[Fault] = field(default_factory=list)

    def add(self, line: int, result: BatchResult) -> None:
        """Count the result of a passport."""
        if result.error is None:
            self.registered += 1
        elif result.error.code == PassportExists.code:
            self.there_already += 1
        else:
            self.refuse(line, result.error.code, _each_fault(result.error))

    def refuse(self, line: int, code: str, message: str) -> None:
        """Count a passport that was not registered; say why, on stderr."""
        self.faults.append(Fault(line, code, message))
        if len(self.faults) <= FAULTS_SHOWN:
            note(f"line {line}: {message}")

    def __str__(self) -> str:
        """Return the counts in words."""
        text = f"{self.registered:,} registered, {self.there_already:,} there already"
        return f"{text}, {len(self.faults):,} refused" if self.faults else text


def import_passports(
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSON Lines, a JSON array or CSV; - is stdin.")],
    file_format: Annotated[
        FileFormat | None, typer.Option("--format", help="Unset: by the file's name; of stdin jsonl.")
    ] = None,
    passport_type: Annotated[
        PassportType, typer.Option("--type", help="Of those that name no type.")
    ] = PassportType.COMPUTE,
    owner: Annotated[str | None, typer.Option(help="Of those that name no owner; for admins.")] = None,
    as_json: JsonOption = False,
    api: ApiOption = None,
    key: KeyOption = None,
) -> None:
    """Register the passports of a file. A second run skips those that are there, so it goes on where one stopped."""
    form = file_format or (FileFormat.JSONL if file == "-" else format_of(file))
    defaults = {"type": passport_type.value, **({} if owner is None else {"owner": owner})}
    tally = Tally()
    with _opened(file) as source, _progress(source, tally) as entries_seen:
        entries = entries_seen(read_entries(source, form))
        try:
            with connected(api, key, timeout_seconds=ANSWER_SECONDS) as lucid:
                lucid.healthz()  # an address where nothing listens is no outage to wait for
                _register(lucid, _valid(entries, defaults, tally), tally)
        except BaseException:
            note(f"Stopped: {tally}. Run it again to go on.")
            raise
    _finish(tally, as_json=as_json)


def _valid(entries: Iterable[Entry], defaults: dict[str, Any], tally: Tally) -> Iterator[Entry]:
    for entry in entries:
        if entry.fault is not None:
            tally.refuse(entry.line, "INVALID_REQUEST", entry.fault)
        else:
            yield entry._replace(passport={**defaults, **entry.passport})


def _register(lucid: Lucid, entries: Iterable[Entry], tally: Tally) -> None:
    """Send the passports, two batches at a time: the next one is read and checked while the service writes."""
    running: deque[Future[list[tuple[int, BatchResult]]]] = deque()

    def count_first() -> None:
        for line, result in running.popleft().result():
            tally.add(line, result)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for batch in split_batches(entries, lambda entry: entry.passport):
            if len(running) == AT_A_TIME:
                count_first()
            running.append(pool.submit(_register_batch, lucid, batch))
        while running:
            count_first()


def _register_batch(lucid: Lucid, batch: Sequence[Entry]) -> list[tuple[int, BatchResult]]:
    """Return the result of each line; those that the service could not decide on are sent again."""
    found: list[tuple[int, BatchResult]] = []
    for left in reversed(range(RESENDS)):
        results = list(zip(batch, _send(lucid, batch), strict=True))
        found += [(entry.line, result) for entry, result in results if result.status != UNAVAILABLE or not left]
        batch = [entry for entry, result in results if result.status == UNAVAILABLE]
        if not batch:
            break
        time.sleep(1.0)
    return found


def _send(lucid: Lucid, batch: Sequence[Entry]) -> list[BatchResult]:
    """Register a batch, however often it has to be sent; the service registers each passport once.

    Raises:
        LucidClientError: it was refused, or `PATIENCE_SECONDS` have passed without a response.
    """
    key, give_up_at = uuid4().hex, time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            return lucid.passports.create_many([entry.passport for entry in batch], idempotency_key=key).results
        except LucidClientError as error:
            pause = error.retry_after_seconds or 1.0
            if not error.is_transient or time.monotonic() + pause > give_up_at:
                raise
        time.sleep(pause)


def _each_fault(error: BatchFault) -> str:
    faults = error.details.get("fields") or ()
    return " ".join(f"{fault['path']}: {fault['message']}" for fault in faults if fault["path"]) or error.message


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    if name == "-":
        yield sys.stdin.buffer
        return
    with open(name, "rb") as file:  # noqa: PTH123 - a name that is no path says so in the error
        yield file


@contextmanager
def _progress(source: BinaryIO, tally: Tally) -> Iterator[Any]:
    """Yield a function that passes entries on and shows how far the file is read, where stderr is a terminal."""
    console = console_for(sys.stderr)
    if not console.is_terminal:
        yield iter
        return
    status = os.fstat(source.fileno())
    total = status.st_size if stat.S_ISREG(status.st_mode) else None
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        task = progress.add_task("", total=total)
        yield lambda entries: _shown(entries, progress, task, tally)


def _shown(entries: Iterable[Entry], progress: Progress, task: TaskID, tally: Tally) -> Iterator[Entry]:
    for entry in entries:
        progress.update(task, completed=entry.end_bytes, description=str(tally))
        yield entry


def _finish(tally: Tally, *, as_json: bool) -> None:
    if (more := len(tally.faults) - FAULTS_SHOWN) > 0:
        note(f"and {more:,} more; --json lists all")
    if as_json:
        faults = [fault._asdict() for fault in tally.faults]
        show_json({"registered": tally.registered, "thereAlready": tally.there_already, "refused": faults})
    else:
        show(sentence(f"{tally}."))
    if tally.faults:
        raise typer.Exit(ExitStatus.REFUSED)
