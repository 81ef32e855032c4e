"""`lucid nodes`, `events`, `resume`, `deregister` and `drain` beside a real service, as scripts run them."""

from __future__ import annotations

import asyncio
from typing import Any
from uuid import uuid4

import pytest

from tests.command_line import CommandLine
from tests.gateway import BusyNode, Gateway
from tests.lucid_serve import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")
NOWHERE = "http://gpu.example.com:8000"


async def add_node(cli_fleet: Gateway, *models: str, **metadata: Any) -> tuple[str, str]:
    """Register a healthy node; return its id and name."""
    node = await cli_fleet.add_node(NOWHERE, *models, **metadata)
    return node, (await cli_fleet.admin.get(f"/passports/{node}")).json()["name"]


async def test_nodes_are_listed_as_a_table_with_a_row_of_each(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Through a pipe nothing is cut off, and a row is a line."""
    model = "a-model-with-a-name-that-is-longer-than-any-column-of-a-narrow-terminal"
    node, name = await add_node(cli_fleet, model, gpu="NVIDIA A100", region="mars")
    ended = await lucid("nodes", "--search", name, COLUMNS="40")
    assert ended.status == 0
    titles, row, _, summary = ended.out.splitlines()
    assert titles.split()[:3] == ["NAME", "STATUS", "BEAT"]
    assert row.split()[:2] == [name, "healthy"]
    assert {"A100", "80", model, "mars", node} <= set(row.split())
    assert summary == "1 node: 1 healthy"
    assert not any(line.endswith(" ") for line in ended.out.splitlines())


async def test_nodes_as_json_are_all_of_them_as_on_the_wire(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Over every page: 100 nodes are the most that one holds."""
    region = uuid4().hex
    made = {await cli_fleet.add_node(NOWHERE, region=region) for _ in range(103)}
    ended = await lucid("nodes", "--region", region, "--json")
    assert set(ended.json) == {"nodes"}
    assert {node["id"] for node in ended.json["nodes"]} == made
    listed = (await cli_fleet.admin.get("/compute", params={"region": region})).json()["nodes"][0]
    assert set(listed) == set(ended.json["nodes"][0])
    assert set(listed["health"]) == set(ended.json["nodes"][0]["health"])


async def test_without_a_node_the_list_says_how_to_register_one(lucid: CommandLine) -> None:
    """And is an empty list for a script."""
    assert "lucid agent run" in (await lucid("nodes", "--region", "nowhere")).out
    assert (await lucid("nodes", "list", "--region", "nowhere", "--json")).json == {"nodes": []}


async def test_the_price_of_a_node_is_shown(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Also that some models have their own, and that there is none."""
    priced: dict[str, Any] = {
        "pricePer1kTokens": "0.002",
        "prices": {"tiny": {"inputPer1kTokens": "0.01", "outputPer1kTokens": "0.03"}},
    }
    node = await cli_fleet.add_node(NOWHERE, **priced)
    said = "price      $0.002 for 1,000 tokens; 1 model at a price of its own"
    assert said in (await lucid("nodes", "show", node)).out
    free = await cli_fleet.add_node(NOWHERE)
    assert "price      none" in (await lucid("nodes", "show", free)).out


async def test_a_node_is_shown_whole_by_its_name_and_by_its_id(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """With what its heartbeat says, and why it counts for nothing."""
    node, name = await add_node(cli_fleet, "tiny")
    await cli_fleet.beat(node, "tiny", status="unhealthy", detail="no \x1b[31mmemory")
    for called in (node, name, node.upper()):
        shown = await lucid("nodes", "show", called)
        assert shown.status == 0
        assert name in shown.out
        assert "REPORTED_UNHEALTHY" in shown.out
        assert "it says    no \\x1b[31mmemory" in shown.out
    answer = (await lucid("nodes", "show", name, "--json")).json
    assert answer["id"] == node
    assert answer["health"]["reported"]["detail"] == "no \x1b[31mmemory"


async def test_events_of_one_node_or_of_all_of_an_owner(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Of several nodes with their names; a node and an owner at once are refused."""
    node, name = await add_node(cli_fleet)
    await cli_fleet.admin.post(f"/compute/drain/{node}")
    lines = (await lucid("events", name)).out.splitlines()
    assert (lines[0].split(), [line.split()[2] for line in lines[1:]]) == (
        ["AT", "EVENT", "REASON", "DETAILS"],
        ["draining", "registered"],
    )
    owner = (await cli_fleet.admin.get(f"/passports/{node}")).json()["owner"]
    lines = (await lucid("events", "--owner", owner, "--type", "draining", "--since", "1h")).out.splitlines()
    assert lines[0].split() == ["AT", "NODE", "EVENT", "REASON", "DETAILS"]
    assert name in {line.split()[2] for line in lines[1:]}
    found = (await lucid("events", "--json")).json["events"]
    assert {"draining", "registered"} <= {event["type"] for event in found if event["passportId"] == node}
    both = await lucid("events", name, "--owner", owner)
    assert (both.status, "--owner" in both.sentence) == (2, True)
    nothing = await lucid("events", "--owner", "nobody")
    assert nothing.out == "Nothing of the kind happened to a node.\n"


@pytest.mark.parametrize("command", [("nodes", "show"), ("drain",), ("resume",), ("deregister", "-y"), ("events",)])
async def test_an_unknown_node_is_status_5(command: tuple[str, ...], lucid: CommandLine) -> None:
    """By a name or by an id."""
    for called in ("no-such-node", str(uuid4())):
        ended = await lucid(*command, called)
        assert ended.status == 5
        assert called in ended.sentence
        assert "`lucid nodes`" in ended.sentence


@pytest.mark.parametrize("command", [("nodes", "show"), ("drain",), ("resume",), ("deregister", "-y")])
async def test_a_node_that_has_left_is_not_called_unknown(
    command: tuple[str, ...], cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """By its name it can only be looked back at."""
    node, name = await add_node(cli_fleet)
    await cli_fleet.admin.post(f"/compute/deregister/{node}")
    ended = await lucid(*command, name)
    assert ended.status == 5
    assert ended.sentence == f"{name} was deregistered, for good. What happened to it: lucid events {name}"


async def test_the_passport_of_a_node_that_has_left_is_not_shown_as_if_it_served(
    cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """It is active on the wire, where its node's state is another thing."""
    node, name = await add_node(cli_fleet)
    await cli_fleet.admin.post(f"/compute/deregister/{node}")
    shown = await lucid("passports", "--search", name)
    assert shown.out.splitlines()[1].split()[:3] == [name, "compute", "deregistered"]
    assert (await lucid("passports", "--search", name, "--json")).json["passports"][0]["status"] == "active"


async def test_a_name_of_two_owners_is_ambiguous_and_status_2(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """The sentence names the ids that say which."""
    name = uuid4().hex
    metadata = {"vram": "8GB", "inferenceUrl": NOWHERE}
    body = {"name": name, "type": "compute", "metadata": metadata}
    made = [(await cli_fleet.admin.post("/passports", json={**body, "owner": owner})).json() for owner in ("a", "b")]
    ended = await lucid("drain", name)
    assert ended.status == 2
    assert all(f"{passport['id']} of {passport['owner']}" in ended.sentence for passport in made)
    assert (await lucid("drain", made[0]["id"])).status == 0


async def test_a_drain_ends_when_the_last_request_has(
    cli_fleet: Gateway, lucid: CommandLine, busy_node: BusyNode
) -> None:
    """What is in flight is told on stderr as it changes; stdout says when it is safe to stop."""
    waiting = asyncio.create_task(lucid("drain", busy_node.id))
    await eventually(lambda: is_draining(cli_fleet, busy_node.id))
    assert not waiting.done()
    busy_node.request.cancel()
    ended = await waiting
    assert ended.status == 0
    assert ended.out.endswith("is drained: safe to stop.\n")
    assert ": 1 request in flight." in ended.err


async def test_a_drain_that_takes_too_long_is_status_6(lucid: CommandLine, busy_node: BusyNode) -> None:
    """The last state is printed, and the drain goes on: the node can be deregistered once its requests have ended."""
    ended = await lucid("drain", busy_node.id, "--timeout", "0.3", "--json")
    assert ended.status == 6
    assert ended.json == {"passportId": busy_node.id, "status": "draining", "inFlight": 1, "drained": False}
    assert "Not drained in time: 1 request in flight" in ended.err
    refused = await lucid("deregister", busy_node.id, "--yes")
    assert refused.status == 1
    assert "--wait-seconds" in refused.sentence
    waiting = asyncio.create_task(lucid("deregister", busy_node.id, "--yes", "--wait-seconds", "20"))
    await asyncio.sleep(0)
    busy_node.request.cancel()
    assert (await waiting).status == 0


async def test_a_drain_that_somebody_else_ends_is_status_1(
    cli_fleet: Gateway, lucid: CommandLine, busy_node: BusyNode
) -> None:
    """It would wait for ever for a node that takes requests again."""
    waiting = asyncio.create_task(lucid("drain", busy_node.id))
    await eventually(lambda: is_draining(cli_fleet, busy_node.id))
    await cli_fleet.admin.post(f"/compute/resume/{busy_node.id}")
    ended = await waiting
    assert ended.status == 1
    assert "The drain was ended" in ended.err


async def test_a_drain_need_not_be_waited_for(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """And `resume` ends it."""
    node, name = await add_node(cli_fleet)
    answer = (await lucid("drain", name, "--no-wait", "--json")).json
    assert set(answer) == {"passportId", "status", "inFlight", "drained"}
    assert answer["status"] == "draining"
    resumed = await lucid("resume", name)
    assert (resumed.status, resumed.out) == (0, f"{name} is healthy.\n")
    again = await lucid("resume", name, "--json")
    assert (again.status, again.json["passportId"], again.json["status"]) == (1, node, "healthy")
    assert again.err == f"lucid: Nothing changed: no operator drains {name}. {name} is healthy.\n"


async def test_a_resume_that_changes_nothing_says_so_and_is_status_1(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """A drain that the node reports ends with its agent's next start; the operator's ends with the command."""
    node, name = await add_node(cli_fleet)
    await cli_fleet.beat(node, status="draining")
    ended = await lucid("resume", name)
    assert ended.status == 1
    assert ended.sentence.startswith(f"Nothing changed: no operator drains {name}. {name} reports itself that it")
    assert ended.sentence.endswith("lucid agent run")
    await cli_fleet.admin.post(f"/compute/drain/{node}")
    both = await lucid("resume", name)
    assert both.status == 0
    assert both.out.startswith(f"The operator's drain has ended. {name} reports itself that it drains.")
    await cli_fleet.served.fall_silent(node, 180)
    await eventually(lambda: has_stopped(cli_fleet, node))
    silent = await lucid("resume", name)
    assert silent.status == 1
    assert f"{name} is stopped: it said so 3 min ago. Start it: lucid agent run" in silent.sentence


async def test_a_silent_node_is_called_stopped_or_unhealthy_and_can_be_drained(
    cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """What stopped as it said is told from what vanished; a drain of a silent node ends as any other."""
    region = uuid4().hex
    stopped, vanished = [await add_node(cli_fleet, region=region) for _ in range(2)]
    await cli_fleet.beat(stopped[0], status="draining", detail="the agent is stopping")
    for node, _ in (stopped, vanished):
        await cli_fleet.served.fall_silent(node, 1500)
    await eventually(lambda: has_stopped(cli_fleet, stopped[0]))
    drained = await lucid("drain", vanished[1])
    assert (drained.status, drained.out) == (0, f"{vanished[1]} is drained: safe to stop.\n")
    listed = await lucid("nodes", "--region", region, "--status", "unhealthy")
    rows = {line.split()[0]: line.split()[1] for line in listed.out.splitlines()[1:3]}
    assert rows == {stopped[1]: "stopped", vanished[1]: "unhealthy"}
    assert listed.out.splitlines()[-1] == "2 nodes: 1 stopped, 1 unhealthy"
    assert "status     stopped" in (await lucid("nodes", "show", stopped[1])).out
    assert (await lucid("nodes", "show", stopped[1], "--json")).json["health"]["stopped"] is True


async def test_a_script_has_to_agree_to_a_deregistration(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Nobody is there to ask. The node's events can be read after, by its name too."""
    node, name = await add_node(cli_fleet)
    refused = await lucid("deregister", name)
    assert refused.status == 2
    assert "--yes" in refused.sentence
    assert (await lucid("deregister", name, "--yes", "--json")).json == {"passportId": node, "status": "deregistered"}
    assert (await lucid("drain", node)).status == 1
    events = (await lucid("events", name, "--json")).json["events"]
    assert [event["type"] for event in events][-1] == "registered"
    assert events[0]["type"] == "deregistered"
    shown = (await lucid("events", name, "--limit", "1")).out
    assert "deregistered" in shown
    assert "registered  " not in shown.replace("deregistered", "")


async def has_stopped(cli_fleet: Gateway, node: str) -> bool:
    """Return whether the node stopped as it said."""
    return bool((await cli_fleet.health(node))["stopped"])


async def is_draining(cli_fleet: Gateway, node: str) -> bool:
    """Return whether the node drains."""
    return bool((await cli_fleet.health(node))["status"] == "draining")
