"""`lucid models`, `match` and `jobs` beside a real service: what can be had, and why not."""

from __future__ import annotations

from uuid import uuid4

import pytest

from lucid_compute.agent.doctor.reason_fixes import REASON_FIXES
from lucid_compute.registry.matching_engine import ReasonCode
from tests.command_line import CommandLine
from tests.fault_node import Behaviour, FaultNode
from tests.gateway import Gateway, chat_answer

pytestmark = pytest.mark.asyncio(loop_scope="session")
NOWHERE = "http://gpu.example.com:8000"


async def test_models_are_those_that_can_be_run_those_that_cannot_or_all(
    cli_fleet: Gateway, lucid: CommandLine
) -> None:
    """As the guide's filter of three states; names may hold slashes."""
    runs, does_not = f"org/{uuid4().hex}", await cli_fleet.add_model(minVramGb=90000, runtimes=["llama.cpp"])
    body = {"name": runs, "type": "model", "metadata": {"format": "gguf", "runtimes": ["llama.cpp"], "minVramGb": 1}}
    await cli_fleet.admin.post("/passports", json=body)
    node = await cli_fleet.add_node(NOWHERE, runs)

    async def names(*options: str) -> set[str]:
        await cli_fleet.beat(node, runs)  # commands may take long where others run too
        ended = await lucid("models", *options, "--json")
        assert set(ended.json) == {"models"}
        return {model["name"] for model in ended.json["models"]}

    assert {runs, does_not} <= await names()
    assert runs in await names("--available")
    assert does_not not in await names("--available")
    assert does_not in await names("--unavailable")
    assert runs not in await names("--unavailable")
    await cli_fleet.beat(node, runs)
    table = await lucid("models", "--search", runs)
    assert table.out.splitlines()[1].split()[:4] == [runs, "yes", "yes", "gguf"]
    assert (await lucid("models", "show", runs)).status == 0


async def test_a_model_that_nobody_can_run_is_explained_node_by_node(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Every reason of each node, what to do about each, and the exit status 1."""
    model, owner, name = await cli_fleet.add_model(minVramGb=90, contextLength=4096), uuid4().hex, uuid4().hex
    metadata = {"vram": "80GB", "maxContext": 2048, "runtimes": ["llama.cpp"], "inferenceUrl": NOWHERE}
    node = {"name": name, "type": "compute", "owner": owner, "metadata": metadata}
    await cli_fleet.beat((await cli_fleet.admin.post("/passports", json=node)).json()["id"])
    key = (await cli_fleet.new_key("compute", owner=owner))["key"]
    ended = await lucid("models", "show", f"{model}/alias", "--key", key)
    assert ended.status == 1
    assert f"{model} is not available" in ended.out
    assert (
        f"  {name}:\n"
        "    VRAM_TOO_LOW: The model needs 90 GB of VRAM; the node has 80 GB.\n"
        "    CONTEXT_TOO_SHORT: The model's context is 4096 tokens; the node takes 2048.\n"
    ) in ended.out
    remedies = ended.out.split("What to do:", 1)[1]
    assert REASON_FIXES[ReasonCode.VRAM_TOO_LOW] in remedies
    assert REASON_FIXES[ReasonCode.CONTEXT_TOO_SHORT] in remedies
    answer = (await lucid("models", "show", model, "--json")).json
    assert set(answer) == {"model", "availability"}
    assert answer["model"]["name"] == model
    assert {reason["code"] for node in answer["availability"]["nodes"] for reason in node["reasons"]} >= {
        "VRAM_TOO_LOW"
    }


async def test_a_model_that_runs_and_is_not_served_says_what_is_missing(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Available and not served: no request can be sent."""
    model = await cli_fleet.add_model(runtimes=["llama.cpp"])
    await cli_fleet.add_node(NOWHERE)
    ended = await lucid("models", "show", model)
    assert ended.status == 1
    assert "could run now, but" in ended.out


async def test_models_need_no_key(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """The summary over all nodes explains even then."""
    model = await cli_fleet.add_model(minVramGb=90000)
    await cli_fleet.add_node(NOWHERE)
    ended = await lucid("models", "show", model, LUCID_API_KEY="")
    assert ended.status == 1
    assert "VRAM_TOO_LOW" in ended.out


async def test_an_unknown_model_is_status_5(lucid: CommandLine) -> None:
    """The sentence names a command, not a path of the API."""
    for command in (("models", "show"), ("match",)):
        ended = await lucid(*command, "no/such model")
        assert ended.status == 5
        assert "no/such model" in ended.sentence
        assert "`lucid models`" in ended.sentence


@pytest.mark.parametrize("is_revoked", [False, True])
async def test_a_node_that_has_left_is_named_once_and_nothing_is_to_be_done(
    cli_fleet: Gateway, lucid: CommandLine, is_revoked: bool
) -> None:
    """Neither its drain nor its silence is advised about; where all have left, a new one is."""
    model, owner, name = await cli_fleet.add_model(), uuid4().hex, uuid4().hex
    node = {"name": name, "type": "compute", "owner": owner, "metadata": {"vram": "8GB", "inferenceUrl": NOWHERE}}
    made = (await cli_fleet.admin.post("/passports", json=node)).json()["id"]
    await cli_fleet.admin.put(f"/compute/models/{made}", json={"models": [{"id": model}]})
    await cli_fleet.admin.post(f"/compute/drain/{made}")
    await cli_fleet.admin.request(
        *("DELETE", f"/passports/{made}") if is_revoked else ("POST", f"/compute/deregister/{made}")
    )
    key = (await cli_fleet.new_key("compute", owner=owner))["key"]
    shown = await lucid("models", "show", model, "--key", key)
    assert f"  Deregistered or revoked, nothing to do: {name}.\n" in shown.out
    assert shown.status == 1
    assert "lucid resume" not in shown.out
    assert "What to do" not in shown.out


async def test_match_says_where_a_request_would_go(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """And by status 1 that it would be refused, with what kept each node out."""
    model = await cli_fleet.add_model()
    node = await cli_fleet.add_node(NOWHERE, model, region="eu")
    name = (await cli_fleet.admin.get(f"/passports/{node}")).json()["name"]
    ended = await lucid("match", model, "--region", "eu", "--region", "us")
    assert ended.status == 0
    assert f"would go to {name}" in ended.out
    refused = await lucid("match", model, "--region", "us")
    assert refused.status == 1
    assert f"{name}:\n    REGION_NOT_ALLOWED: " in refused.out
    answer = await lucid("match", model, "--region", "us", "--max-price", "0.5", "--json")
    assert answer.status == 1
    assert answer.json["chosen"] is None
    assert (await lucid("match", model, "--max-price", "cheap")).status == 1


async def test_jobs_are_listed_newest_first(cli_fleet: Gateway, lucid: CommandLine) -> None:
    """Of a node by its name, of a model, and so many as are wanted."""
    async with FaultNode(Behaviour(answer=chat_answer())) as server:
        model = await cli_fleet.add_model()
        node = await cli_fleet.add_node(server.url, model)
        for _ in range(3):
            assert (await cli_fleet.chat(model)).status_code == 200
        await cli_fleet.jobs(model, 3)
    listed = (await lucid("jobs", "--node", node, "--json")).json["jobs"]
    assert len(listed) == 3
    assert [job["startedAt"] for job in listed] == sorted((job["startedAt"] for job in listed), reverse=True)
    assert len((await lucid("jobs", "--model", model, "--limit", "2", "--json")).json["jobs"]) == 2
    shown = (await lucid("jobs", "--model", model, "--since", "1h")).out.splitlines()
    assert shown[0].split()[:2] == ["STARTED", "MODEL"]
    assert len(shown) == 4
    assert (await lucid("jobs", "--model", model, "--outcome", "failed")).out == "No such jobs.\n"
