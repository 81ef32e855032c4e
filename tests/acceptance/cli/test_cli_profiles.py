"""`lucid profiles`, `--profile` and LUCID_PROFILE: the right service, with its own key and no other."""

from __future__ import annotations

import asyncio
import stat
from pathlib import Path

import pytest

from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.lucid_serve import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")
NONE = b'{"nodes": [], "pagination": {"total": 0, "page": 1, "perPage": 100, "totalPages": 0}}'


@pytest.fixture
def bare(cli_service: Served, tmp_path: Path) -> CommandLine:
    """The command line of a user who has no variables and no profiles."""
    return CommandLine("", None, tmp_path)


def file_of(line: CommandLine) -> Path:
    """The user's file of profiles."""
    return line.folder / ".config" / "lucid" / "profiles.json"


async def test_a_profile_is_stored_privately_and_used(bare: CommandLine, cli_service: Served) -> None:
    """By the option before and after the command, by the variable, and as the default."""
    added = await bare("profiles", "add", "prod", f"{cli_service.url}/", "--key", "-", stdin=cli_service.admin_key)
    assert added.out == "The profile prod is stored. Try it: lucid status --profile prod\n"
    assert stat.S_IMODE(file_of(bare).stat().st_mode) == 0o600
    assert stat.S_IMODE(file_of(bare).parent.stat().st_mode) == 0o700
    for ended in (
        await bare("nodes", "--profile", "prod"),
        await bare("--profile", "prod", "nodes"),
        await bare("nodes", LUCID_PROFILE="prod"),
    ):
        assert ended.status == 0, ended.err
    assert (await bare("nodes", LUCID_API_URL="http://127.0.0.1:1")).status == 3
    used = await bare("profiles", "use", "prod")
    assert cli_service.url in used.out
    assert (await bare("nodes")).status == 0
    listed = (await bare("profiles", "--json")).json["profiles"]
    end = f"...{cli_service.admin_key[-4:]}"
    assert listed == [{"name": "prod", "url": cli_service.url, "key": end, "isDefault": True}]
    assert cli_service.admin_key not in (await bare("profiles")).out
    assert (await bare("profiles", "remove", "prod")).status == 2
    assert (await bare("profiles", "remove", "prod", "--yes")).status == 0
    assert (await bare("profiles")).out.startswith("No profiles.")


async def test_a_key_goes_to_its_own_service_only(bare: CommandLine) -> None:
    """Neither does a profile's key go to another address, nor a variable's key to a profile's."""
    async with FaultNode(Behaviour(answer=respond(NONE))) as other, FaultNode(Behaviour(answer=respond(NONE))) as own:
        await bare("profiles", "add", "own", own.url, "--key", "lk_live_own", "--default")
        assert (await bare("nodes", "--api", other.url)).status == 0
        assert (await bare("nodes", LUCID_API_URL=other.url)).status == 0
        assert not any("authorization" in str(request.headers).lower() for request in other.requests)
        assert (
            await bare("nodes", "--profile", "own", LUCID_API_KEY="lk_live_env", LUCID_API_URL=other.url)
        ).status == 0
        assert "lk_live_own" in str(own.requests[-1].headers)
        assert (await bare("nodes", "--key", "lk_live_typed")).status == 0
        assert "lk_live_typed" in str(own.requests[-1].headers)
        refused = await bare("nodes", LUCID_PROFILE="own", LUCID_API_KEY="lk_live_env")
        assert (refused.status, "Unset one" in refused.sentence) == (2, True)
        both = await bare("nodes", "--profile", "own", "--api", other.url)
        assert (both.status, "not both" in both.sentence) == (2, True)


async def test_what_is_wrong_with_profiles_is_a_sentence(bare: CommandLine) -> None:
    """Names, addresses, keys, and a file that others may read or that is no list of profiles."""
    assert "lucid profiles add" in (await bare("nodes", "--profile", "prod")).sentence
    for name, url in (("a b", "http://h"), ("-x", "http://h"), ("x" * 65, "http://h"), ("x", "h"), ("x", "ftp://h")):
        assert (await bare("profiles", "add", "--", name, url)).status == 2
    assert (await bare("profiles", "add", "x", "http://h", "--key", "a b")).status == 2
    await bare("profiles", "add", "x", "http://h", "--key", "lk_live_x")
    assert "There are: x." in (await bare("nodes", LUCID_PROFILE="y")).sentence
    for content in (
        "",
        "{",
        "[]",
        '{"profiles": 7}',
        '{"profiles": {"x": {"url": 7}}, "default": null}',
        "[" * 100_000,
    ):
        file_of(bare).write_text(content)
        assert str(file_of(bare)) in (await bare("profiles")).sentence
    file_of(bare).write_bytes(b"\xff")
    assert (await bare("profiles")).status == 2
    file_of(bare).chmod(0o644)
    assert f"chmod 600 {file_of(bare)}" in (await bare("nodes")).sentence


async def test_profiles_added_at_once_are_all_there(bare: CommandLine) -> None:
    """Each process waits for the one that writes."""
    names = [f"p{number}" for number in range(6)]
    await asyncio.gather(*(bare("profiles", "add", name, "http://h", "--key", "k") for name in names))
    assert [each["name"] for each in (await bare("profiles", "--json")).json["profiles"]] == names


async def test_a_person_is_asked_for_the_key_without_an_echo(bare: CommandLine) -> None:
    """It is in no list of processes and not on the screen."""
    with bare.on_terminal("profiles", "add", "x", "http://h") as terminal:
        await terminal.shows("API key")
        terminal.press("lk_live_secret\n")
        await terminal.shows("is stored")
        assert await terminal.ends() == 0
    assert "secret" not in terminal.text
    assert "lk_live_secret" in file_of(bare).read_text()
