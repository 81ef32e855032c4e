"""Metadata from the command line: a JSON object from the line, a file or stdin, and single keys on top of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lucid_compute.cli.failures import CommandFailed, ExitStatus

MetadataOption = Annotated[
    str | None,
    typer.Option(metavar="JSON|FILE|-", help="Metadata: a JSON object, a file that holds one, or - for stdin."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="One key of the metadata; dots reach nested keys. The value is JSON if it can be, else text. May be given "
        "again.",
    ),
]


def read_metadata_options(metadata: str | None, settings: Sequence[str] | None) -> dict[str, Any] | None:
    """Return the metadata with the single keys set; None when neither was given.

    Raises:
        CommandFailed: it can't be read, or is no JSON object.
    """
    if metadata is None and not settings:
        return None
    read = {} if metadata is None else _read_object(metadata)
    for setting in settings or ():
        _put(read, setting)
    return read


def _read_object(metadata: str) -> dict[str, Any]:
    if metadata.lstrip().startswith("{"):
        text, source = metadata, "--metadata"
    elif metadata == "-":
        text, source = sys.stdin.read(), "stdin"
    else:
        text, source = _read_file(metadata), metadata
    try:
        read = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CommandFailed(f"{source} is no JSON: {error}.", ExitStatus.USAGE) from None
    if not isinstance(read, dict):
        raise CommandFailed(f'{source} is no JSON object. Write it like {{"vram": "80GB"}}.', ExitStatus.USAGE)
    return read


def _read_file(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise CommandFailed(f"--metadata: {name}: {error.strerror}.", ExitStatus.USAGE) from None
    except UnicodeDecodeError:
        raise CommandFailed(f"--metadata: {name} is no text in UTF-8.", ExitStatus.USAGE) from None


def _put(metadata: dict[str, Any], setting: str) -> None:
    path, is_setting, text = setting.partition("=")
    *above, last = path.split(".")
    if not is_setting or not all([*above, last]):
        raise CommandFailed(f"--set {setting}: write KEY=VALUE, such as --set vram=80GB.", ExitStatus.USAGE)
    place = metadata
    for name in above:
        inside = place.setdefault(name, {})
        if not isinstance(inside, dict):
            raise CommandFailed(f"--set {setting}: {name} is not an object.", ExitStatus.USAGE)
        place = inside
    place[last] = _value(text)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
