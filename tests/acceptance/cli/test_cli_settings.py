"""`lucid settings`, `lucid db` and the settings of `lucid serve`, as scripts run them."""

from __future__ import annotations

import asyncio

import pytest

from lucid_compute.agent.settings import AgentSettings
from lucid_compute.postgres.embedded.processes import processes_of
from lucid_compute.server.settings import Settings
from tests.command_line import CommandLine
from tests.lucid_serve import Served, folder

pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_settings_lists_every_variable_with_its_default_and_meaning(lucid: CommandLine) -> None:
    """The service's, the client's and the agent's; what is set is marked, and its value never shown."""
    ended = await lucid("settings", "--json", LUCID_DATABASE_URL="postgresql://user:secret@host/db", LUCID_PORT="")
    rows = {row["variable"]: row for row in ended.json["settings"]}
    assert {f"LUCID_{name.upper()}" for name in Settings.model_fields} <= set(rows)
    assert {f"LUCID_AGENT_{name.upper()}" for name in AgentSettings.model_fields} <= set(rows)
    assert {"LUCID_API_URL", "LUCID_API_KEY"} <= set(rows)
    assert all(row["meaning"] for row in rows.values())
    assert rows["LUCID_PORT"] == {
        "variable": "LUCID_PORT",
        "reader": "service",
        "default": "8000",
        "isSet": False,
        "meaning": "TCP port to listen on; 0 takes a free one.",
    }
    assert (rows["LUCID_DATABASE_URL"]["isSet"], rows["LUCID_DATABASE_URL"]["default"]) == (True, None)
    assert rows["LUCID_API_URL"]["reader"] == "client"
    assert "secret" not in ended.out
    shown = (await lucid("settings", LUCID_PORT="1")).out
    assert "LUCID_PORT (set)\n    service, default: 8000\n" in shown


async def test_a_wrong_setting_is_status_2_and_names_the_variable(lucid: CommandLine) -> None:
    """Before anything is started."""
    ended = await lucid("serve", LUCID_PORT="many")
    assert ended.status == 2
    assert ended.sentence.startswith("LUCID_PORT: ")


async def test_a_mistyped_setting_is_told_at_the_start(lucid: CommandLine) -> None:
    """It would be as if it were not set. What only begins alike, as Kubernetes sets it, is no matter."""
    near = {"LUCID_METRIC_PUBLIC": "true", "LUCID_PORT_8000_TCP_ADDR": "10.0.0.1"}
    ended = await lucid("serve", "--host", "no.such.host.invalid", LUCID_DATABASE_URL="postgresql://x@y/z", **near)
    assert ended.err.splitlines()[0] == (
        "lucid: Nothing reads LUCID_METRIC_PUBLIC. Did you mean LUCID_METRICS_PUBLIC? See: lucid settings"
    )
    assert ended.err.count("Nothing reads") == 1


async def test_db_says_where_the_schema_stands(lucid: CommandLine, database_url: str) -> None:
    """And takes it down and up."""
    stands = (await lucid("db", "current", "--json", LUCID_DATABASE_URL=database_url)).json
    assert set(stands) == {"revision", "neededRevision"}
    assert stands["revision"] == stands["neededRevision"]
    refused = await lucid("db", "downgrade", "base", "--database-url", database_url)
    assert (refused.status, "--yes" in refused.sentence) == (2, True)
    gone = await lucid("db", "downgrade", "base", "--database-url", database_url, "--yes")
    assert gone.out.startswith("The database has no schema yet. ")
    behind = await lucid("db", "upgrade", "--database-url", database_url, "--revision", "money")
    assert behind.out.startswith("The schema is at revision money, and this version needs ")
    assert (await lucid("db", "upgrade", "--database-url", database_url)).out == (
        f"The schema is up to date (revision {stands['revision']}).\n"
    )
    assert (await lucid("db", "upgrade", "--database-url", database_url, "--json")).json == stands


async def test_a_database_that_is_away_is_a_sentence(lucid: CommandLine) -> None:
    """And status 1, also where there is neither an address nor a data folder."""
    away = await lucid("db", "current", "--database-url", "postgresql://nobody@127.0.0.1:1/none")
    assert away.status == 1
    assert away.sentence
    nowhere = await lucid("db", "current")
    assert nowhere.status == 1
    assert "LUCID_DATABASE_URL is not set" in nowhere.sentence
    assert not (lucid.folder / "data").exists()


async def test_db_finds_the_embedded_postgres_of_the_data_folder(lucid: CommandLine) -> None:
    """While the service runs, and when it does not: then a Postgres runs for the command alone."""
    with folder() as made, Served(made) as served:
        running = await lucid("db", "current", "--json", LUCID_DATA_DIR=str(made / "data"))
        assert running.json["revision"] == running.json["neededRevision"]
        await asyncio.to_thread(served.stop)
        alone = await lucid("db", "current", "--json", LUCID_DATA_DIR=str(made / "data"))
        assert alone.json == running.json
        assert not processes_of((made / "data" / "postgres").resolve())
