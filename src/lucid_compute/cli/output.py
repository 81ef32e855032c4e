"""What commands print: JSON as on the wire, tables that fit the terminal, and complete lines for pipes."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import typer
from pydantic import BaseModel
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from lucid_compute.cli.failures import write
from lucid_compute.cli.formatting import UNKNOWN, plain

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON as on the wire, for scripts.")]
ENDLESS_COLUMNS = 100_000  # for a pipe: nothing is cut off, one line is one row
GAP = 2
NARROWEST = 6
STYLES = {
    "healthy": "green",
    "stale": "yellow",
    "draining": "yellow",
    "stopped": "yellow",
    "unhealthy": "red",
    "deregistered": "dim",
    "active": "green",
    "deprecated": "yellow",
    "revoked": "dim",
    "yes": "green",
    "no": "red",
    "completed": "green",
    "failed": "red",
    "lost": "red",
}


class Column(NamedTuple):
    """A column. `rank` 0 is always shown, the highest is dropped first. With `shortest` its cells may be cut off."""

    title: str
    rank: int = 0
    right: bool = False
    shortest: int | None = None


class Listing:
    """A table that shows the columns which the terminal has room for. It writes out control characters in its cells."""

    def __init__(self, columns: Sequence[Column], rows: Iterable[Sequence[str]], most_rows: int | None = None) -> None:
        """Keep the cells. `most_rows` limits the rows to the room of a live view."""
        cells = [[plain(cell) for cell in row] for row in rows]
        self._left_out = 0 if most_rows is None else max(0, len(cells) - most_rows)
        self._rows = cells[: len(cells) - self._left_out]
        self._columns = columns

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the columns that fit."""
        table = Table(box=None, pad_edge=False, padding=(0, GAP, 0, 0), header_style="bold")
        widths = self._widths(options.max_width)
        for index, width in widths.items():
            column = self._columns[index]
            justify: Literal["left", "right"] = "right" if column.right else "left"
            table.add_column(column.title, justify=justify, no_wrap=True, overflow="ellipsis", width=width)
        for row in self._rows:
            table.add_row(*(Text(row[index], style=STYLES.get(row[index], "")) for index in widths))
        yield table
        if self._left_out:
            yield Text(f"and {self._left_out} more", style="dim")

    def _widths(self, room: int) -> dict[int, int]:
        """Return the columns to show and their widths. The least important are dropped until the rest fits.

        The remaining room goes to columns that are cut off, the most important first.
        """
        full = {index: self._full_width(index) for index in range(len(self._columns))}
        widths = {index: min(width, self._columns[index].shortest or width) for index, width in full.items()}
        while (over := _room_for(widths) - room) > 0:
            dropped = max(widths, key=self._drop_order)
            if self._columns[dropped].rank > 0:
                del widths[dropped]
                continue
            widest = max(widths, key=lambda index: widths[index])
            if widths[widest] <= NARROWEST:
                break
            widths[widest] = max(NARROWEST, widths[widest] - over)
        for index in sorted(widths, key=lambda index: self._columns[index].rank):
            widths[index] += max(0, min(full[index] - widths[index], room - _room_for(widths)))
        return widths

    def _drop_order(self, index: int) -> tuple[bool, int, int]:
        """Return a sort key: columns without any known value are dropped first, then those with a high rank."""
        rank = self._columns[index].rank
        return rank > 0 and all(row[index] == UNKNOWN for row in self._rows), rank, index

    def _full_width(self, index: int) -> int:
        """Return the width that cuts nothing off."""
        return max([len(self._columns[index].title), *(cell_len(row[index]) for row in self._rows)])


def _room_for(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def console_for(stream: Any = None) -> Console:
    """Return a console for stdout or `stream` that prints text unchanged: no markup, no highlighting."""
    file = sys.stdout if stream is None else stream
    console = Console(file=file, markup=False, highlight=False, emoji=False, legacy_windows=False)
    if not console.is_terminal:
        console = Console(file=file, markup=False, highlight=False, emoji=False, width=ENDLESS_COLUMNS)
    return console


def show(*parts: RenderableType) -> None:
    """Print the parts to stdout. Where it is no terminal, lines have no trailing spaces."""
    console = console_for()
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    text = capture.get()
    if not console.is_terminal:
        text = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
    write(text)


def show_json(answer: Any) -> None:
    """Print one JSON document in ASCII, camelCase as on the wire."""
    write(json.dumps(as_on_the_wire(answer), indent=2) + "\n")


def show_done(text: str, answer: Any, *, as_json: bool) -> None:
    """Print the result of an action: the sentence for a person, the response for a script."""
    if as_json:
        show_json(answer)
    else:
        show(sentence(text))


def show_secret(secret: str, remark: str, created: Any, *, as_json: bool) -> None:
    """Print a secret that is shown only once: alone on stdout, for scripts; `remark` goes to stderr."""
    if as_json:
        show_json(created)
        return
    show(sentence(secret))
    note(remark)


_BEGIN_FORMULAS = frozenset("=+-@\t\r\n＝＋－＠")  # noqa: RUF001 - spreadsheets of East Asia accept the wide ones as well


def write_csv(head: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    """Write CSV to stdout. No spreadsheet reads a cell as a formula: names and details are free text."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(head)
    writer.writerows([f"'{cell}" if cell[:1] in _BEGIN_FORMULAS else cell for cell in line] for line in lines)
    write(text.getvalue())


def as_on_the_wire(answer: Any) -> Any:
    """Return wire shapes, and lists and mappings of them, as plain JSON values."""
    if isinstance(answer, BaseModel):
        return answer.model_dump(mode="json", by_alias=True)
    if isinstance(answer, Mapping):
        return {name: as_on_the_wire(value) for name, value in answer.items()}
    if isinstance(answer, list | tuple):
        return [as_on_the_wire(value) for value in answer]
    return answer


def facts(pairs: Iterable[tuple[str, object]]) -> Table:
    """Return names with their values, one per line, to show one thing in full."""
    grid = Table.grid(padding=(0, GAP, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        word = plain(value)
        grid.add_row(Text(name), Text(word, style=STYLES.get(word, "")))
    return grid


def sentence(text: str, style: str = "") -> Text:
    """Return a line of text that wraps between words."""
    return Text(plain(text), style=style)


def note(text: str) -> None:
    """Write a remark for a person to stderr, so that stdout has only the result."""
    print(plain(text), file=sys.stderr)
