"""`lucid passports import` beside a real service: formats, faults by line, a second run, two at once, a kill."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.command_line import CommandLine
from tests.lucid_serve import eventually, serving

METADATA = {"gpu": "4090", "vram": "24GB", "inferenceUrl": "http://gpu.example.com:8000"}
TABLE = """name,gpu,vram,inferenceUrl,capabilities,maxConcurrency,metadata.rack.row,tags
{0}-1,4090,24GB,http://gpu.example.com:8000,"inference,fine-tuning",8,3,"a;b"
{0}-2,4090,much,http://gpu.example.com:8000,,,,

{0}-3,4090,24GB,http://gpu.example.com:8000,,,,,,,
"""


def nodes(prefix: str, count: int) -> list[dict[str, Any]]:
    """Return nodes to register."""
    return [{"name": f"{prefix}-{number}", "type": "compute", "metadata": METADATA} for number in range(count)]


def write_lines(path: Path, passports: list[Any]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(passport) + "\n" for passport in passports))


@pytest.mark.asyncio(loop_scope="session")
async def test_a_second_run_skips_what_is_there(lucid: CommandLine) -> None:
    prefix = uuid4().hex
    write_lines(lucid.folder / "nodes.jsonl", nodes(prefix, 1200))
    first = await lucid("passports", "import", "nodes.jsonl")
    assert (first.status, first.out, first.err) == (0, "1,200 registered, 0 there already.\n", "")
    write_lines(lucid.folder / "nodes.jsonl", nodes(prefix, 1201))
    again = await lucid("passports", "import", "nodes.jsonl", "--json")
    assert again.json == {"registered": 1, "thereAlready": 1200, "refused": []}
    found = (await lucid("passports", "--search", f"{prefix}-120", "--json")).json["passports"]
    assert sorted(passport["name"] for passport in found) == [f"{prefix}-120", f"{prefix}-1200"]


@pytest.mark.asyncio(loop_scope="session")
async def test_arrays_and_tables_are_read_from_stdin_too(lucid: CommandLine) -> None:
    prefix = uuid4().hex
    array = json.dumps([*nodes(prefix, 2), 7, {"name": f"{prefix}-x"}], indent=1)
    read = await lucid("passports", "import", "-", "--format", "json", "--type", "agent", stdin=array)
    line = array[: array.index(" 7,")].count("\n") + 1
    assert (read.status, read.out) == (1, "3 registered, 0 there already, 1 refused.\n")
    assert read.err.startswith(f"line {line}: A passport is a JSON object.")
    prefix = uuid4().hex
    read = await lucid("passports", "import", "-", "--format", "csv", stdin=TABLE.format(prefix))
    assert (read.status, read.out) == (1, "1 registered, 0 there already, 2 refused.\n")
    assert "line 3: metadata.vram: Send the memory of the GPUs" in read.err
    assert "line 5: The row has 11 cells, and the first line names 8." in read.err
    made = (await lucid("passports", "show", f"{prefix}-1", "--json")).json
    assert made["tags"] == ["a", "b"]
    assert made["metadata"] == {
        **METADATA, "vramGb": 24, "capabilities": ["inference", "fine-tuning"], "maxConcurrency": 8, "rack": {"row": 3}
    }  # fmt: skip


@pytest.mark.asyncio(loop_scope="session")
async def test_garbage_is_named_by_its_line_and_stops_nothing(lucid: CommandLine) -> None:
    prefix = uuid4().hex
    good = [json.dumps(node).encode() for node in nodes(prefix, 2)]
    garbage = [
        b"{", b"\xff\xfe", b"[1]", b"null", b'{"a": NaN}', b'{"a": 1e999}', b'{"a": "\\u0000"}', b'{"a": 1, "a": 2}',
        b'{"a": "\\ud800"}', b'{"a":' * 100, b"[" * 100_000, b'{"name": "' + b"x" * 1_100_000 + b'"}',
        b'{"name": "x", "metadata": {"x": [' + b"1," * 30_000 + b"1]}}",
    ]  # fmt: skip
    (lucid.folder / "mixed.jsonl").write_bytes(b"\n".join([good[0], *garbage, good[1]]))
    read = await lucid("passports", "import", "mixed.jsonl", "--json")
    assert read.status == 1
    assert (read.json["registered"], read.json["thereAlready"]) == (2, 0)
    assert [fault["line"] for fault in read.json["refused"]] == list(range(2, 2 + len(garbage)))
    assert all(len(fault["message"]) > 20 for fault in read.json["refused"])


@pytest.mark.asyncio(loop_scope="session")
async def test_what_can_not_be_read_at_all_is_one_sentence(lucid: CommandLine) -> None:
    (lucid.folder / "object.json").write_text("{}")
    (lucid.folder / "table.csv").write_text("vram,gpu\n1,2\n")
    for arguments, status, said in (
        (("nowhere.jsonl",), 1, "nowhere.jsonl: No such file or directory."),
        (("nodes",), 2, "Pass --format jsonl, json or csv."),
        (("object.json",), 2, "The file is no JSON array."),
        (("table.csv",), 2, "The first line of a CSV file names its columns"),
    ):
        ended = await lucid("passports", "import", *arguments)
        assert ended.status == status, ended
        assert said in ended.err
    refused = await lucid("passports", "import", "-", stdin=json.dumps(nodes("x", 1)[0]), LUCID_API_KEY="lk_live_no")
    assert refused.status == 4
    away = await lucid("passports", "import", "-", "--api", "http://127.0.0.1:9", stdin=json.dumps(nodes("x", 1)[0]))
    assert away.status == 3
    assert "Run it again to go on." in away.err


@pytest.mark.asyncio(loop_scope="session")
async def test_a_terminal_shows_how_far_it_is(lucid: CommandLine) -> None:
    write_lines(lucid.folder / "nodes.jsonl", nodes(uuid4().hex, 3000))
    with lucid.on_terminal("passports", "import", "nodes.jsonl") as terminal:
        await terminal.shows("%")
        await terminal.shows("3,000 registered, 0 there already.")
        assert await terminal.ends() == 0


async def test_a_service_that_is_killed_meanwhile_loses_and_doubles_nothing(database_url: str, tmp_path: Path) -> None:
    """Two imports of one file at once, over kills of the service: each passport is registered once."""
    write_lines(tmp_path / "nodes.jsonl", nodes("n", 4000))
    with serving(database_url) as served:
        port = served.url.rpartition(":")[2]
        served._environment["LUCID_PORT"] = port
        line = CommandLine(served.url, served.admin_key, tmp_path)
        imports = [asyncio.create_task(line("passports", "import", "nodes.jsonl", "--json")) for _ in range(2)]
        async with served.client() as client:
            for enough in (1, 2500):

                async def has_enough(enough: int = enough) -> bool:
                    total = (await client.get("/passports")).json()["pagination"]["total"]
                    return int(total) >= enough

                await eventually(has_enough, 30.0)
                served.kill()
                served.start()
                served.wait_until_ready()
            done = [(await each).json for each in imports]
            assert [each["registered"] + each["thereAlready"] for each in done] == [4000, 4000]
            assert sum(each["registered"] for each in done) == 4000
            assert (await client.get("/passports")).json()["pagination"]["total"] == 4000
