"""docs/cli.md says what there is: every command, every option of the list of nodes, every exit status."""

from __future__ import annotations

import re

import pytest

from lucid_compute.cli.failures import ExitStatus
from lucid_compute.cli.main import Commands
from tests import ROOT
from tests.command_line import CommandLine

PAGE = (ROOT / "docs" / "cli.md").read_text()


def test_the_page_has_every_command() -> None:
    """As it is typed."""
    assert [name for name in Commands.PLACES if f"lucid {name}" not in PAGE] == []


def test_the_page_has_every_exit_status_and_no_other() -> None:
    """In its table."""
    table = PAGE.split("| exit status | |", 1)[1].split("\n\n", 1)[0]
    assert {int(found) for found in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == set(ExitStatus)


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^\$ lucid (\w+(?: (?:create|show|current))?)", PAGE, re.MULTILINE)))
)
async def test_what_the_page_types_is_a_command(line: str, lucid: CommandLine) -> None:
    """It has a help of its own."""
    ended = await lucid(*line.split(), "--help")
    assert ended.status == 0
    assert f"Usage: lucid {line} " in ended.out
