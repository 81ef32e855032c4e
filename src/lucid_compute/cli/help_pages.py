"""The pages of `--help`: what a command does, its arguments and options, and the options that name the service."""

from __future__ import annotations

import inspect
import re
import shutil
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from lucid_compute.cli.failures import write

CONNECTION = ("api", "key", "profile")
WIDEST = 100
NARROW_TITLES = 34  # a longer name of an option has its own line in effect: it wraps
_SENTENCE = re.compile(r"(?<=\.) ")
_MARKS_OF_CODE = re.compile(r"`([^`]*)`")


class HelpRow(NamedTuple):
    """A line of a section: the option or command as it is typed, and what it means."""

    title: str
    meaning: str


def write_help(command: Any, context: Any) -> None:
    """Print the help page of a command."""
    console = Console(width=min(shutil.get_terminal_size((WIDEST, 24)).columns, WIDEST), markup=False, highlight=False)
    with console.capture() as capture:
        console.print(*_page(command, context), sep="\n")
    write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _page(command: Any, context: Any) -> list[RenderableType]:
    parts: list[RenderableType] = [Text.assemble(("Usage: ", "bold"), _usage(command, context)), Text("")]
    parts += [_text(paragraph) for paragraph in _paragraphs(command.help)]
    for title, rows in _sections(command, context).items():
        parts += [Text(f"\n{title}:", style="bold"), _table(rows)]
    if command.epilog:
        parts += [Text(""), _text(command.epilog)]
    return parts


def _usage(command: Any, context: Any) -> str:
    words = [context.command_path, "[OPTIONS]"]
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            word = parameter.display_name_raw.upper()
            words.append(word if parameter.required else f"[{word}]")
    return " ".join([*words, *(["COMMAND"] if hasattr(command, "list_commands") else [])])


def _paragraphs(text: str | None) -> list[str]:
    paragraphs = inspect.cleandoc(text or "").split("\n\n")
    lines = [" ".join(paragraph.split()) for paragraph in paragraphs]
    return [f"\n{line}" if number else line for number, line in enumerate(lines)]


def _sections(command: Any, context: Any) -> dict[str, list[HelpRow]]:
    """Return the sections in their order: commands by group, arguments, options, and what names the service."""
    sections: dict[str, list[HelpRow]] = {}
    if (list_commands := getattr(command, "list_commands", None)) is not None:
        for name in list_commands(context):
            inner = command.get_command(context, name)
            if inner is not None and not inner.hidden:
                row = HelpRow(name, _SENTENCE.split(_paragraphs(inner.help)[0], maxsplit=1)[0])
                sections.setdefault(getattr(inner, "rich_help_panel", None) or "Commands", []).append(row)
    options: dict[str, list[HelpRow]] = {"Arguments": [], "Options": [], "The service": []}
    for parameter in command.get_params(context):
        if not getattr(parameter, "hidden", False):
            is_argument = parameter.param_type_name == "argument"
            is_connection = parameter.name in CONNECTION and "api" in {each.name for each in command.params}
            section = "Arguments" if is_argument else "The service" if is_connection else "Options"
            options[section].append(HelpRow(_title(parameter, is_argument=is_argument), _meaning(parameter)))
    return {**sections, **{title: rows for title, rows in options.items() if rows}}


def _title(parameter: Any, *, is_argument: bool) -> str:
    if is_argument:
        return str(parameter.display_name_raw).upper()
    names = ", ".join(sorted(parameter.opts, key=len))
    if parameter.is_flag:
        return "/".join([names, *parameter.secondary_opts])
    return f"{names} {_value_name(parameter)}"


def _value_name(parameter: Any) -> str:
    """Return what stands for the option's value: its own word, `N` for a number, else the last word of its name."""
    if parameter.metavar:
        return str(parameter.metavar)
    if parameter.type_descriptor.annotation in {int, float}:
        return "N"
    longest: str = max(parameter.opts, key=len)
    return longest.lstrip("-").rpartition("-")[2].upper()


def _meaning(parameter: Any) -> str:
    """Return the option's help, with its choices and limits in words."""
    parts = [parameter.help or ""]
    if choices := parameter.type_descriptor.choices:
        parts.append(f"One of: {', '.join(str(getattr(each, 'value', each)) for each in choices)}.")
    least, most = parameter.min, parameter.max
    if most is not None:
        parts.append(f"From {least or 0} to {most}.")
    elif least:
        parts.append(f"At least {least}.")
    if parameter.envvar:
        parts.append(f"[{parameter.envvar}]")
    if parameter.required and parameter.param_type_name == "option":
        parts.append("(required)")
    return " ".join(filter(None, parts))


def _table(rows: list[HelpRow]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(width=2)
    grid.add_column(min_width=10, max_width=NARROW_TITLES, overflow="fold")
    grid.add_column(overflow="fold")
    for row in rows:
        grid.add_row("", Text(row.title, style="cyan"), _text(row.meaning))
    return grid


def _text(text: str) -> Text:
    """Return the text without the backquotes of Markdown; what stood between them is bold."""
    found = Text()
    for number, piece in enumerate(_MARKS_OF_CODE.split(text)):
        found.append(piece, style="bold" if number % 2 else "")
    return found
