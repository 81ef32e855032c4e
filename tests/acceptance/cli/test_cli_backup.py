"""`lucid db backup` and `lucid db restore` on the embedded Postgres, as an operator runs them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lucid_compute.postgres import schema
from lucid_compute.postgres.backup import Place, back_up, restore
from lucid_compute.postgres.embedded import EmbeddedPostgres, EmbeddedPostgresError, binaries
from lucid_compute.postgres.embedded.binaries import DISTRIBUTION_ROOT
from lucid_compute.postgres.embedded.cluster import INITDB_OPTIONS
from lucid_compute.postgres.embedded.processes import find_user, processes_of
from tests import ROOT
from tests.command_line import CommandLine
from tests.lucid_serve import LUCID, Served, eventually, folder

BLOCK = (ROOT / "docs" / "operations.md").read_text().split("## Back up and restore\n\n```\n")[1].split("```")[0]

pytestmark = pytest.mark.asyncio(loop_scope="session")


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in which a Postgres can live."""
    with folder() as made:
        yield made


async def test_a_service_comes_back_in_a_new_data_folder(place: Path) -> None:
    """As docs/operations.md says: it is backed up while it runs, and its keys are valid where it is restored."""
    commands = [line.split("#")[0].strip() for line in BLOCK.splitlines()]
    assert (len(commands), commands[-1]) == (4, "lucid serve --data-dir new-data")
    line = CommandLine("", None, place)
    with Served(place) as served:
        admin_key = served.admin_key
        async with served.client() as admin:
            body = {"name": "n", "owner": "olga", "scopes": ["passports:read"]}
            key = (await admin.post("/keys", json=body)).json()["key"]
            await shell(commands[0], place)
            audited = (await admin.get("/audit")).json()["events"]
        used = await line("db", "restore", "lucid.backup")
        assert (used.status, "belongs to the service of process" in used.sentence) == (1, True)
    await shell(commands[1], place)
    assert not processes_of(place / "new-data" / "postgres")
    assert {path.name for path in (place / "new-data").iterdir()} == {"postgres", "postgres.log", "lucid.lock"}
    await shell(commands[2], place)
    with Served(place, DATA_DIR=str(place / "new-data")) as served:
        assert f"admin key  kept in {place / 'new-data' / 'admin.key'}" in served.log
        async with served.client(admin_key) as admin:
            assert (await admin.get("/audit")).json()["events"] == audited
        async with served.client(key) as olga:
            assert (await olga.get("/passports")).status_code == 200


async def test_a_restore_that_ends_early_leaves_a_data_folder_without_a_database(
    place: Path, database_url: str
) -> None:
    """Killed, or stopped by a damaged file: the next restore or start has a clean place."""
    line = CommandLine("", None, place)
    await back_up(at(database_url), place / "whole", quietly)
    whole = (place / "whole").read_bytes()
    (place / "cut").write_bytes(whole[:-1])
    cut = await line("db", "restore", "cut")
    assert (cut.status, "cut is incomplete or damaged" in cut.sentence) == (1, True)
    assert {path.name for path in (place / "data").iterdir()} == {"postgres.log", "lucid.lock"}

    async def serves() -> bool:
        return any((unfinished / "postmaster.pid").exists() for unfinished in (place / "data").glob("postgres.new-*"))

    with line.on_terminal("db", "restore", "whole"):  # killed at the end of the block
        await eventually(serves, 30)
    assert not (place / "data" / "postgres").exists()
    assert (await line("db", "restore", "whole")).status == 0
    assert {path.name for path in (place / "data").iterdir()} == {"postgres", "postgres.log", "lucid.lock"}


async def test_a_cluster_of_an_older_postgres_moves_by_the_commands_of_its_refusal(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are read from the refusal of a machine without that version, and run on one that has it."""
    old = next((each for each in DISTRIBUTION_ROOT.glob("1[4-7]/bin") if (each / "initdb").exists()), None)
    if old is None:
        pytest.skip("this machine has no Postgres from 14 to 17 beside the wheel's")
    data = make_cluster(place / "data", old)
    with EmbeddedPostgres(data) as postgres:
        await schema.upgrade(postgres.url())
    with monkeypatch.context() as hidden:
        hidden.setattr(binaries, "DISTRIBUTION_ROOT", place)
        hidden.setenv("PATH", "/nonexistent")
        with pytest.raises(EmbeddedPostgresError) as refusal:
            EmbeddedPostgres(data).__enter__()
    commands = re.findall(r"LUCID_DATA_DIR=\S+ lucid db .*?(?=\. \d\.)", str(refusal.value))
    assert len(commands) == 2, refusal.value
    for command in commands:
        await shell(command, place)
    assert (place / "data-new" / "postgres" / "PG_VERSION").read_text() == f"{binaries.find_binaries().major}\n"
    assert f"lucid serve --data-dir {data}-new" in str(refusal.value)
    with EmbeddedPostgres(place / "data-new") as new, EmbeddedPostgres(make_cluster(place / "older", old)) as older:
        await schema.check(new.url())
        await restore(at(older.url()), await back_up(at(new.url()), place / "of-the-new", quietly), quietly)
        await schema.check(older.url())


async def shell(command: str, folder: Path) -> None:
    """Run a command in a folder as a person types it."""
    line, path = ["bash", "-ec", command], f"{LUCID.parent}:{os.defpath}"
    await asyncio.to_thread(subprocess.run, line, cwd=folder, env={"PATH": path}, check=True)


def at(url: str) -> Place:
    """Return the database of a URL, which needs no variables."""
    return Place(url, {})


def quietly(_: int) -> None:
    """Report nothing."""


def make_cluster(data_dir: Path, bin_dir: Path) -> Path:
    """Make a data folder with an empty cluster of another version of Postgres; return it."""
    data_dir.mkdir(mode=0o711)
    user = find_user("nobody")
    user.make_folder(data_dir / "postgres")
    with (data_dir / "initdb.log").open("wb") as log:
        command = (bin_dir / "initdb", "--pgdata", data_dir / "postgres", *INITDB_OPTIONS, "--no-sync")
        assert user.start(command, signal.SIGTERM, log).wait() == 0, (data_dir / "initdb.log").read_text()
    return data_dir
