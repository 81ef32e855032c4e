"""`lucid` on a terminal: colours, columns, the live table, the progress bar, questions, completion."""

from __future__ import annotations

import asyncio
import json
import sys
from uuid import uuid4

import pytest
import pytest_asyncio

from tests import postgres
from tests.command_line import CommandLine
from tests.fault_answers import respond
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import BusyNode, Gateway
from tests.lucid_serve import Served, folder

pytestmark = pytest.mark.asyncio(loop_scope="session")
NOWHERE = "http://gpu.example.com:8000"


@pytest_asyncio.fixture(loop_scope="session")
async def region(cli_fleet: Gateway) -> str:
    """A region with one healthy node of a long model list."""
    region = f"r{uuid4().hex[:8]}"
    models = [f"org/a-long-name-of-a-model-{number}" for number in range(5)]
    await cli_fleet.add_node(NOWHERE, *models, region=region, gpu="NVIDIA H100 80GB HBM3")
    return region


@pytest.mark.parametrize("columns", [40, 80, 140, 250])
async def test_a_table_fits_the_terminal(columns: int, region: str, lucid: CommandLine) -> None:
    """Whole columns go when there is no room, the least important first; name, status and age stay."""
    with lucid.on_terminal("nodes", "--region", region, columns=columns) as terminal:
        assert await terminal.ends() == 0
    lines = terminal.text.splitlines()
    assert max(map(len, lines)) <= columns
    assert lines[0].split()[:3] == ["NAME", "STATUS", "BEAT"]
    assert ("MODELS" in lines[0]) is (columns >= 140)
    assert len([line for line in lines if "healthy " in line]) == 1


async def test_colours_are_for_terminals_and_can_be_switched_off(region: str, lucid: CommandLine) -> None:
    """By NO_COLOR, and in a pipe there are none."""
    with lucid.on_terminal("nodes", "--region", region) as terminal:
        await terminal.ends()
    assert "\x1b[32mhealthy" in terminal.shown
    with lucid.on_terminal("nodes", "--region", region, NO_COLOR="1") as terminal:
        await terminal.ends()
    assert "\x1b[3" not in terminal.shown
    assert "\x1b" not in (await lucid("nodes", "--region", region)).out


async def test_json_on_a_terminal_is_as_in_a_pipe(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """It is not wrapped, coloured or cut off."""
    command = ("models", "--search", await cli_fleet.add_model(), "--json")
    with lucid.on_terminal(*command, columns=40) as terminal:
        await terminal.ends()
    assert "\x1b" not in terminal.shown
    assert terminal.text == (await lucid(*command)).out


async def test_the_live_table_outlives_the_service_and_ends_on_ctrl_c(
    postgres_and_template: tuple[str, str], lucid: CommandLine
) -> None:
    """An outage is told below the last table; the service's return is shown, too."""
    url = await postgres.clone(*postgres_and_template)
    with folder() as made, Served(made, url) as served:
        line = CommandLine(served.url, served.admin_key, lucid.folder)
        create = ("passports", "create", "the-node", "--set", "vram=8GB", "--set", f"inferenceUrl={NOWHERE}")
        assert (await line(*create)).status == 0
        with line.on_terminal("nodes", "--watch", "--interval", "0.2") as terminal:
            await terminal.shows("the-node")
            await terminal.shows("1 node: 1 unhealthy. As of ")
            port = served.url.rpartition(":")[2]
            await asyncio.to_thread(served.stop)
            await terminal.shows("Nothing listens at")
            await terminal.shows("the-node")
            again = Served(made, url, PORT=port)
            with again:
                assert again.url == served.url
                await line("passports", "create", "another-node", *create[3:])
                await terminal.shows("2 nodes: 2 unhealthy.")
                terminal.interrupt()
                assert await terminal.ends() == 130
    assert terminal.shown.rstrip().endswith(("\x1b[?1049l", "\x1b[?25h"))
    await postgres.drop(url)


async def test_the_live_table_looks_again_over_one_connection(lucid: CommandLine) -> None:
    """A connection for each look would be 40,000 a day, and a port each for a minute."""
    none = {"nodes": [], "pagination": {"total": 0, "page": 1, "perPage": 100, "totalPages": 0}}
    async with FaultNode(Behaviour(answer=respond(json.dumps(none).encode()))) as service:
        with lucid.on_terminal("nodes", "--watch", "--interval", "0.2", "--api", service.url) as terminal:
            await service.until(lambda service: len(service.requests) > 4, seconds=10)
            terminal.interrupt()
            assert await terminal.ends() == 130
        assert service.connections == 1


async def test_the_live_table_shows_as_many_rows_as_there_is_room_for(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """And says how many it left out."""
    region = uuid4().hex[:8]
    for _ in range(9):
        await cli_fleet.add_node(NOWHERE, region=region)
    with lucid.on_terminal("nodes", "-w", "--region", region, rows=10) as terminal:
        await terminal.shows("and 5 more")
        await terminal.shows("9 nodes: 9 healthy")


async def test_the_live_table_ends_where_waiting_mends_nothing(lucid: CommandLine) -> None:
    """As with a wrong key."""
    with lucid.on_terminal("nodes", "--watch", "--key", "lk_live_wrong") as terminal:
        await terminal.shows("The key is not valid")
        assert await terminal.ends() == 4


async def test_a_drain_shows_how_far_it_is(lucid: CommandLine, busy_node: BusyNode) -> None:
    """A bar over the requests that were in flight, until it is safe to stop."""
    with lucid.on_terminal("drain", busy_node.id, columns=120) as terminal:
        await terminal.shows("1 request in flight")
        busy_node.request.cancel()
        await terminal.shows("is drained: safe to stop.")
        assert await terminal.ends() == 0


async def test_ctrl_c_ends_the_waiting_for_a_drain_and_not_the_drain(
    cli_fleet: Gateway, lucid: CommandLine, busy_node: BusyNode
) -> None:
    """Quietly, with 130."""
    with lucid.on_terminal("drain", busy_node.id) as terminal:
        await terminal.shows("in flight")
        terminal.interrupt()
        assert await terminal.ends() == 130
    assert (await cli_fleet.health(busy_node.id))["status"] == "draining"


async def test_a_person_is_asked_before_a_node_is_deregistered(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """No changes nothing, Ctrl-C is 130, yes does it."""
    node = await cli_fleet.add_node(NOWHERE)
    with lucid.on_terminal("deregister", node, columns=200) as terminal:
        await terminal.shows("for good? [y/N]")
        terminal.press("n\n")
        await terminal.shows("Nothing was changed.")
        assert await terminal.ends() == 1
    with lucid.on_terminal("deregister", node, columns=200) as terminal:
        await terminal.shows("for good? [y/N]")
        terminal.interrupt()
        assert await terminal.ends() == 130
    assert (await cli_fleet.health(node))["status"] == "healthy"
    with lucid.on_terminal("deregister", node, columns=200) as terminal:
        await terminal.shows("for good? [y/N]")
        terminal.press("y\n")
        await terminal.shows("is deregistered.")
        assert await terminal.ends() == 0


async def complete(lucid: CommandLine, line: str, **variables: str) -> list[str]:
    """Return what bash would offer."""
    words = str(len(line.split(" ")) - 1)
    asked = {"_LUCID_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": words, **variables}
    ended = await lucid(**asked)
    assert not ended.err
    return ended.out.split()


async def test_a_shell_completes_commands_options_and_names(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Names of nodes and models come from the service; without it there are none, and no word about it."""
    assert await complete(lucid, "lucid der") == ["deregister"]
    assert await complete(lucid, "lucid nodes ") == ["list", "show"]
    assert await complete(lucid, "lucid nodes --wat") == ["--watch"]
    node = await cli_fleet.add_node(NOWHERE)
    name = (await cli_fleet.admin.get(f"/passports/{node}")).json()["name"]
    model = await cli_fleet.add_model()
    assert await complete(lucid, f"lucid drain {name[:20]}") == [name]
    assert await complete(lucid, f"lucid models show {model[:15]}") == [model]
    assert await complete(lucid, f"lucid drain {name[:20]}", LUCID_API_URL="http://127.0.0.1:1") == []
    assert await complete(lucid, f"lucid drain {name[:20]}", LUCID_API_KEY="lk_live_wrong") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
async def test_completion_is_installed_by_one_command(shell: str, lucid: CommandLine) -> None:
    """For the shell that runs it; a person may look at it first."""
    ended = await lucid("--show-completion", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert ended.status == 2
    shown = await lucid("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_LUCID_COMPLETE" in shown.out


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("nodes",), ("settings",), ("drain", "--help")])
async def test_a_command_starts_without_what_only_the_service_needs(
    command: tuple[str, ...], lucid: CommandLine
) -> None:
    """FastAPI, SQLAlchemy and uvicorn cost half a second."""
    script = (
        "import sys\nfrom lucid_compute.cli.main import main\n"
        "try:\n    main()\nfinally:\n"
        "    print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, *command,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, cwd=lucid.folder, env=lucid.environment,
    )  # fmt: skip
    _, imported = await process.communicate()
    assert process.returncode == 0
    assert not {"fastapi", "starlette", "sqlalchemy", "alembic", "asyncpg", "uvicorn"} & set(imported.decode().split())
