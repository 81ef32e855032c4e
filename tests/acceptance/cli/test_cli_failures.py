"""How `lucid` fails: one sentence on stderr, nothing on stdout, and a status that means something."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway
from tests.lucid_serve import LUCID, Served, eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")
ASKING = [
    ("nodes",),
    ("models",),
    ("keys",),
    ("passports",),
    ("jobs",),
    ("drain", "x"),
    ("match", "x"),
    ("events", "x"),
]


@pytest.fixture
def nobody_listens() -> str:
    """An address of this machine where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize("command", ASKING, ids=lambda command: command[0])
async def test_a_service_that_is_away_is_status_3(
    command: tuple[str, ...], nobody_listens: str, lucid: CommandLine
) -> None:
    """The sentence names the address."""
    for more in ((), ("--json",)):
        ended = await lucid(*command, *more, "--api", nobody_listens)
        assert ended.status == 3
        assert nobody_listens in ended.sentence


async def test_a_service_that_cannot_now_is_status_3(lucid: CommandLine) -> None:
    """A script may try again."""
    unavailable = respond(b"<html>busy</html>", status=503, content_type="text/html")
    async with FaultNode(Behaviour(answer=unavailable)) as proxy:
        assert (await lucid("nodes", "--api", proxy.url)).status == 3


async def test_another_service_is_told_apart(lucid: CommandLine) -> None:
    """An answer that is not ours is a sentence, too."""
    async with FaultNode(Behaviour(answer=respond(b"<html>hello</html>", content_type="text/html"))) as other:
        ended = await lucid("nodes", "--api", other.url)
    assert ended.status == 3
    assert other.url in ended.sentence


@pytest.mark.parametrize("address", ["ftp://example.com", "example.com", "http://", "http://user:secret@example.com"])
async def test_an_address_that_is_none_is_status_2(address: str, lucid: CommandLine) -> None:
    """And is not tried."""
    ended = await lucid("nodes", "--api", address)
    assert ended.status == 2
    assert "secret" not in ended.sentence


async def test_a_wrong_key_is_status_4_and_never_repeated(lucid: CommandLine) -> None:
    """By the option and by the variable."""
    for ended in (await lucid("nodes", "--key", "lk_live_wrong"), await lucid("nodes", LUCID_API_KEY="lk_live_wrong")):
        assert ended.status == 4
        assert "LUCID_API_KEY" in ended.sentence
        assert "lk_live_wrong" not in ended.sentence


async def test_no_key_is_status_4_and_says_where_one_comes_from(lucid: CommandLine) -> None:
    """Where no data folder is."""
    ended = await lucid("nodes", LUCID_API_KEY="")
    assert ended.status == 4
    assert "lucid keys create" in ended.sentence
    assert "go where `lucid serve` was started" in ended.sentence


async def test_a_key_without_the_scope_is_status_4(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """The sentence names what it lacks."""
    ended = await lucid("keys", "--key", cli_fleet.key)
    assert ended.status == 4
    assert "admin" in ended.sentence


async def test_the_admin_key_of_a_service_of_this_folder_is_used(cli_service: Served, tmp_path: Path) -> None:
    """For a loopback address alone, and only from a file that is ours alone; JSON says nothing of it."""
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "admin.key"
    file.write_text(cli_service.admin_key + "\n")
    file.chmod(0o600)
    lucid = CommandLine(cli_service.url, None, tmp_path)
    ended = await lucid("nodes", "--region", "nowhere", "--json")
    assert (ended.status, ended.json, ended.err) == (0, {"nodes": []}, "")
    moved = (tmp_path / "data").rename(tmp_path / "elsewhere")
    assert (await lucid("nodes")).status == 4
    assert (await lucid("nodes", LUCID_DATA_DIR=str(moved))).status == 0
    (moved / "admin.key").chmod(0o644)
    assert (await lucid("nodes", LUCID_DATA_DIR=str(moved))).status == 4
    (moved / "admin.key").write_text("lk_live_of_another_service")
    (moved / "admin.key").chmod(0o600)
    assert "admin.key is not valid there" in (await lucid("nodes", LUCID_DATA_DIR=str(moved))).sentence


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nodez",), "Did you mean 'nodes'?"),
        (("nodes", "--wacht"), "--watch"),
        (("nodes", "shwo", "x"), "Did you mean 'show'?"),
        (("models", "my-model"), "No such command 'my-model'. To see one: lucid models show my-model. See:"),
        (("nodes", "a b"), "To see one: lucid nodes show 'a b'"),
        (("keys", "my-key"), "There are: list, create, edit, rotate, revoke"),
        (("db", "version"), "There are: backup, restore, upgrade, downgrade, current. See:"),
        (("payouts", "--period", "x", "--from", "2026-01-01"), "not both"),
        (("keys", "create", "x", "--owner", "a", "--scope", "all"), "'--scope': 'all' is not one of"),
        (("drain",), "Missing"),
        (("nodes", "--min-vram", "much"), "'--min-vram': write a number. See: lucid nodes list --help"),
        (("jobs", "--limit", "0"), "'--limit': write at least 1. See:"),
        (("jobs", "--limit", "1.5"), "'--limit': write a whole number. See:"),
        (("nodes", "--watch"), "needs a terminal"),
        (("jobs", "--since", "yesterday"), "90m"),
        (("--colour",), "--colour"),
    ],
)
async def test_what_cannot_be_understood_is_status_2(arguments: tuple[str, ...], said: str, lucid: CommandLine) -> None:
    """In one sentence that says what was meant or where to look."""
    ended = await lucid(*arguments)
    assert ended.status == 2
    assert said in ended.sentence


async def test_lucid_alone_shows_the_help(lucid: CommandLine) -> None:
    """With the status of a command line that says too little."""
    ended = await lucid()
    assert ended.status == 2
    assert not ended.err
    assert "deregister" in ended.out


async def was_asked(node: FaultNode) -> bool:
    """Return whether a request has come."""
    return bool(node.requests)


async def test_ctrl_c_ends_a_command_quietly_with_130(lucid: CommandLine) -> None:
    """While it waits for an answer."""
    async with FaultNode(Behaviour(delay_seconds=60)) as slow:
        process = await asyncio.create_subprocess_exec(
            LUCID, "nodes", "--api", slow.url,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=lucid.folder, env=lucid.environment,
        )  # fmt: skip
        await eventually(lambda: was_asked(slow))
        process.send_signal(signal.SIGINT)
        assert await process.communicate() == (b"", b"")
    assert process.returncode == 130


async def test_a_reader_that_leaves_ends_a_command_quietly(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """As `| head` does: 141, what the shell shows for a closed pipe, and no word."""
    for _ in range(120):
        await cli_fleet.add_node("http://gpu.example.com:8000", "a-model", gpu="x" * 190)
    command = f"{LUCID} nodes --json 2>errors | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", command],
        cwd=lucid.folder, env=lucid.environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "{\n141\n"
    assert not (lucid.folder / "errors").read_text()


async def test_a_full_disk_is_a_sentence(lucid: CommandLine) -> None:
    """And not a traceback at the end of the process."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", f"{LUCID} models > /dev/full", stderr=subprocess.PIPE, cwd=lucid.folder, env=lucid.environment
    )
    _, errors = await process.communicate()
    assert (process.returncode, errors) == (1, b"lucid: No space left on device.\n")


async def test_names_that_would_move_the_cursor_are_written_out(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Of whoever registered them; JSON stays ASCII and exact."""
    name = f"{uuid4().hex}\x9b2J\u202e"
    body = {"name": name, "type": "model", "metadata": {"format": "api"}, "description": "\x1b]0;owned\x07"}
    assert (await cli_fleet.admin.post("/passports", json=body)).status_code == 201
    shown = await lucid("passports", "show", name)
    assert f"{name[:32]}\\x9b2J\\u202e" in shown.out
    assert "\\x1b]0;owned\\x07" in shown.out
    listed = await lucid("models", "--search", name[:32], "--json")
    assert listed.out.isascii()
    assert listed.json["models"][0]["name"] == name
