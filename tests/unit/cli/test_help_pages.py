"""The pages of `--help`, and that each command and each target of make that the docs name exists."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from lucid_compute.cli.command_groups import LIST, ListByDefault
from lucid_compute.cli.main import Commands, app
from tests import ROOT

# The changelog also names what was removed.
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("deploy/**/*.md")} - {ROOT / "CHANGELOG.md"})
CODE = re.compile(r"^```[^\n]*\n(.*?)^```|`([^`\n]+)`", re.MULTILINE | re.DOTALL)
BETWEEN_COMMANDS = re.compile(r"\n|&&|\|\||[|;]|\$\(|<\(|^\$ ", re.MULTILINE)
OPTION = re.compile(r"--?[a-zA-Z][\w-]*")


@cache
def root() -> Any:
    """`lucid` itself."""
    return typer.main.get_command(app)


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command, as it is typed."""
    yield path
    if hasattr(command, "list_commands"):
        for name in command.list_commands(typer.Context(command)):
            yield from commands(command.get_command(typer.Context(command), name), *path, name)


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is printed for these words."""
    root().main([*words], prog_name="lucid", standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 200])
def test_every_help_is_readable(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`-h` is `--help`; an option has a word for its value, not a type; what names the service comes last."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for path in commands(root()):
        shown = help_of(capsys, *path, "-h")
        assert shown == help_of(capsys, *path, "--help")
        assert not re.search(r"<(bool|str|int|float|list|path)\b|None|Annotated|\[\[|\{", shown), shown
        assert max(map(len, shown.splitlines())) <= min(columns, 100), shown
        titles = re.findall(r"^([A-Z][A-Za-z ]+):$", shown, re.MULTILINE)
        assert ("--api" in shown) is (titles[-1] == "The service"), shown
        assert ("--api" in shown and "--profile" in shown) is ("--api" in shown)


def test_commands_are_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the groups, each command once."""
    shown = help_of(capsys, "--help")
    places = [shown.index(f"\n{title}:\n") for title in Commands.GROUPS]
    assert places == sorted(places)
    assert all(len(re.findall(rf"^    {name} ", shown, re.MULTILINE)) == 1 for name in Commands.PLACES)


def words_of_code(page: Path) -> Iterator[list[str]]:
    """The words of each command in the page's code."""
    for block, span in CODE.findall(page.read_text()):
        text = re.sub(r"\\\n\s*", " ", block or span)
        for line in BETWEEN_COMMANDS.split(text):
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # no shell's line
                words = line.split()
            while words and re.match(r"^[A-Z_]+=", words[0]):
                words = words[1:]
            yield words


def faults_of(words: list[str]) -> Iterator[str]:
    """What `lucid` would not understand of these words, which follow it."""
    command, path, rest = root(), "lucid", iter(words)
    for word in rest:
        names = {name: each for each in accepted_by(command) for name in [*each.opts, *each.secondary_opts]}
        if OPTION.match(word):
            option, _, value = word.partition("=")
            if option not in {*names, "-h", "--help"}:
                yield f"{path} has no {option}"
            elif option in names and not names[option].is_flag and not value:
                next(rest, None)
        elif hasattr(command, "list_commands"):
            found = command.get_command(typer.Context(command), word) if re.fullmatch(r"[a-z-]+", word) else None
            if found is None:
                if word not in {"…", "COMMAND"}:
                    yield f"{path} has no {word}"
                return
            command, path = found, f"{path} {word}"


def accepted_by(command: Any) -> list[Any]:
    """The options and arguments of a command, among them those of its default command."""
    inner: Any = command.get_command(typer.Context(command), LIST) if isinstance(command, ListByDefault) else None
    return [*command.params, *(inner.params if inner is not None else [])]


def test_the_docs_name_commands_and_options_that_exist() -> None:
    """In every block of code and every span of it."""
    faults = [
        f"{page.relative_to(ROOT)}: {' '.join(words)}: {fault}"
        for page in PAGES
        for words in words_of_code(page)
        if words and (words[0] == "lucid" or words[0].endswith("bin/lucid")) and words[1:2] != ["="]
        for fault in faults_of([word.strip(",.:") for word in words[1:]])
    ]
    assert not faults, "\n".join(faults)


def test_the_docs_name_targets_of_make_that_exist() -> None:
    """With `make NAME`."""
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    faults = [
        f"{page.relative_to(ROOT)}: make {word}"
        for page in PAGES
        for words in words_of_code(page)
        if words[:1] == ["make"]
        for word in words[1:]
        if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-") and word not in targets
    ]
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("line", ["nodez", "nodes --watched", "nodes show x --json --yaml", "keys mak", "--versions"])
def test_a_stale_command_would_be_found(line: str) -> None:
    """By its name or by its option."""
    assert list(faults_of(line.split()))
    assert not list(faults_of(["nodes", "--watch", "--interval", "5", "--status", "unhealthy"]))
