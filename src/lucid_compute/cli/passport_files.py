"""Files of passports to register: JSON Lines, a JSON array, or CSV. Each passport is read with its line."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from lucid_compute.cli.failures import CommandFailed, ExitStatus
from lucid_compute.errors import InvalidRequest
from lucid_compute.web.strict_json import read_strictly

MAX_LINE_BYTES = 1024 * 1024  # the service takes no longer body
FIELDS = ("name", "type", "owner", "description", "version", "tags")
TEXT_KEYS = {"gpu", "region", "connectivity", "inferenceUrl", "inferenceKey", "format", "runtimeRecommended"}
LIST_KEYS = {"capabilities", "runtimes", "aliases"}
_SEPARATORS = ",;\t"
_BETWEEN = re.compile(r"[\s,]*")


class FileFormat(StrEnum):
    """How passports are written in a file."""

    JSONL = "jsonl"
    JSON = "json"
    CSV = "csv"


class Entry(NamedTuple):
    """One passport of a file, or the fault in its place. `end_bytes` is how far the file is read."""

    line: int
    passport: dict[str, Any]
    fault: str | None
    end_bytes: int


_BY_SUFFIX = {".jsonl": FileFormat.JSONL, ".ndjson": FileFormat.JSONL, ".json": FileFormat.JSON, ".csv": FileFormat.CSV}


def format_of(name: str) -> FileFormat:
    """Return the format that a file's name says.

    Raises:
        CommandFailed: it says none.
    """
    if (found := _BY_SUFFIX.get(Path(name).suffix.lower())) is None:
        message = f"The name {name} does not tell the format. Pass --format jsonl, json or csv."
        raise CommandFailed(message, ExitStatus.USAGE)
    return found


def read_entries(file: BinaryIO, form: FileFormat) -> Iterator[Entry]:
    """Yield the passports of a file in their order, also those that can't be read.

    Raises:
        CommandFailed: the file has no passports where its format wants them.
    """
    readers = {FileFormat.JSONL: _read_lines, FileFormat.JSON: _read_array, FileFormat.CSV: _read_table}
    return readers[form](file)


class _Lines:
    """The lines of a file, none of them longer than `MAX_LINE_BYTES`; of a longer one the beginning is returned."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0
        self.end_bytes = 0
        self.is_cut = False

    def __iter__(self) -> Iterator[bytes]:
        while line := self._file.readline(MAX_LINE_BYTES + 1):
            self.number += 1
            self.end_bytes += len(line)
            self.is_cut, rest = len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"), line
            while rest and not rest.endswith(b"\n"):
                rest = self._file.readline(MAX_LINE_BYTES)
                self.end_bytes += len(rest)
            yield line.removeprefix(b"\xef\xbb\xbf") if self.number == 1 else line


def _read_lines(file: BinaryIO) -> Iterator[Entry]:
    lines = _Lines(file)
    for line in lines:
        if lines.is_cut:
            yield Entry(lines.number, {}, "The line is over 1 MiB.", lines.end_bytes)
        elif line.strip():
            yield _check(line.strip(), lines.number, lines.end_bytes)


def _read_array(file: BinaryIO) -> Iterator[Entry]:
    """Yield the members of an array. What follows one that is not JSON can't be told apart, so it is the last."""
    content = file.read()
    text = content.decode("utf-8-sig", errors="surrogateescape").lstrip("\n\r\t ")
    line = 1 + content.count(b"\n") - text.count("\n")
    if not text.startswith("["):
        raise CommandFailed("The file is no JSON array. Write [{…}, {…}], or pass --format.", ExitStatus.USAGE)
    decoder, place = json.JSONDecoder(), 1
    while True:
        between = _BETWEEN.match(text, place)
        start = between.end() if between else place
        line += text.count("\n", place, start)
        if text[start : start + 1] == "]":
            return
        try:
            member, place = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            yield Entry(line, {}, "From here on the file is not JSON, and was not read.", len(content))
            return
        yield _check(_written(member), line, place)
        line += text.count("\n", start, place)


def _read_table(file: BinaryIO) -> Iterator[Entry]:
    lines = _Lines(file)
    texts = (line.decode(errors="surrogateescape") for line in lines)
    header = next(texts, "")
    separator = max(_SEPARATORS, key=header.count)
    names = [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
    if "name" not in names or len(set(names)) < len(names) or "" in names:
        message = "The first line of a CSV file names its columns: name, type, and keys of the metadata, each once."
        raise CommandFailed(message, ExitStatus.USAGE)
    rows = csv.reader(texts, delimiter=separator)
    while True:
        line = lines.number + 1
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield Entry(line, {}, f"The row can't be read: {error}.", lines.end_bytes)
            continue
        if len(cells) > len(names):
            fault = f"The row has {len(cells)} cells, and the first line names {len(names)}."
            yield Entry(line, {}, fault, lines.end_bytes)
        elif any(cells):
            yield _check(_written(_from_cells(dict(zip(names, cells, strict=False)))), line, lines.end_bytes)


def _from_cells(cells: dict[str, str]) -> dict[str, Any]:
    """Return the passport of a row. Other columns than `FIELDS` are keys of its metadata; empty cells are left out."""
    passport: dict[str, Any] = {}
    metadata: dict[str, Any] = {}
    for name, cell in cells.items():
        if cell == "":
            continue
        if name == "tags":
            passport[name] = _listed(cell)
        elif name in FIELDS:
            passport[name] = cell
        else:
            _put(metadata, name.removeprefix("metadata.").split("."), cell)
    return {**passport, "metadata": metadata}


def _put(metadata: dict[str, Any], path: list[str], cell: str) -> None:
    for name in path[:-1]:
        inside = metadata.setdefault(name, {})
        metadata = inside if isinstance(inside, dict) else {}
    metadata[path[-1]] = _value(path[-1], cell)


def _value(key: str, cell: str) -> Any:
    """Return a cell as JSON if it can be read so; some keys are always texts, and some lists."""
    if key in TEXT_KEYS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return _listed(cell) if key in LIST_KEYS else cell


def _listed(cell: str) -> list[str]:
    return [word.strip() for word in re.split("[,;]", cell) if word.strip()]


def _written(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode(errors="surrogatepass")


def _check(written: bytes, line: int, end_bytes: int) -> Entry:
    """Return the entry of one passport's JSON, which is checked as the service checks a body."""
    try:
        passport = read_strictly(written)
    except InvalidRequest as error:
        return Entry(line, {}, error.message.replace("The body", "The passport"), end_bytes)
    if not isinstance(passport, dict):
        return Entry(line, {}, "A passport is a JSON object. Write one with name, type and metadata.", end_bytes)
    return Entry(line, passport, None, end_bytes)
