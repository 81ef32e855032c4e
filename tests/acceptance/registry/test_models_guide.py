"""The models guide, sentence by sentence, over a real socket against a real `lucid serve`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from tests.lucid_serve import Served, eventually, serving

# A node that can run everything below but where a test says otherwise.
NODE = {"gpu": "NVIDIA A100", "vram": "80GB", "inferenceUrl": "http://your-gpu:8080/v1", "runtimes": ["vllm"]}
QUERIES = {"true": "?available=true", "false": "?available=false", "omitted": ""}


@pytest.fixture
async def served(database_url: str) -> AsyncIterator[Served]:
    """A service with a database of its own, so that every model in it is the test's."""
    with serving(database_url) as served:
        yield served


@pytest.fixture
async def lucid(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """A client with the admin's key."""
    async with served.client() as client:
        yield client


async def add_model(lucid: httpx.AsyncClient, name: str, format_: str, **metadata: Any) -> str:
    """Register a model; return its id."""
    body: dict[str, Any] = {"name": name, "type": "model", "metadata": {"format": format_, **metadata}}
    answer = await lucid.post("/passports", json=body)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def add_node(lucid: httpx.AsyncClient, name: str, **metadata: Any) -> str:
    """Register a node and let it beat once; return its id."""
    body: dict[str, Any] = {"name": name, "type": "compute", "metadata": {**NODE, **metadata}}
    answer = await lucid.post("/passports", json=body)
    assert answer.status_code == 201, answer.text
    passport_id = str(answer.json()["id"])
    assert await beat(lucid, passport_id) == 200
    return passport_id


async def beat(lucid: httpx.AsyncClient, passport_id: str, status: str = "healthy") -> int:
    """Send a heartbeat; return the HTTP status."""
    body: dict[str, Any] = {
        "passportId": passport_id,
        "status": status,
        "load": None,
        "availableModels": [],
        "queueDepth": None,
    }
    return (await lucid.post("/compute/heartbeat", json=body)).status_code


async def listed(lucid: httpx.AsyncClient, available: str) -> set[str]:
    """Return the names of the models of one of the three queries; its total must count them."""
    answer = (await lucid.get(f"/models{QUERIES[available]}")).json()
    assert answer["pagination"]["total"] == len(answer["models"])
    if available != "omitted":
        assert {model["available"] for model in answer["models"]} <= {available == "true"}
    return {model["name"] for model in answer["models"]}


async def why_not(lucid: httpx.AsyncClient, model: str) -> list[str]:
    """Return why no node can run the model; the filter and the model itself must say the same as the explanation."""
    verdict = (await lucid.get(f"/models/{model}/availability")).json()
    assert (await lucid.get(f"/models/{model}")).json()["available"] is verdict["available"]
    assert (model in await listed(lucid, "true")) is verdict["available"]
    assert (model in await listed(lucid, "false")) is not verdict["available"]
    assert verdict["available"] is any(node["eligible"] for node in verdict["nodes"])
    return sorted({reason["code"] for node in verdict["nodes"] for reason in node["reasons"]})


async def test_the_three_queries_part_the_models(lucid: httpx.AsyncClient) -> None:
    """`true` lists what can serve now, `false` what lacks compute, omitted all; any other value is refused."""
    await add_model(lucid, "gpt", "api")
    await add_model(lucid, "llama", "safetensors")
    await add_model(lucid, "tiny", "gguf")
    assert await listed(lucid, "true") == {"gpt"}
    assert await listed(lucid, "false") == {"llama", "tiny"}
    await add_node(lucid, "a node for safetensors", runtimes=["tgi"])
    assert await listed(lucid, "true") == {"gpt", "llama"}
    assert await listed(lucid, "false") == {"tiny"}
    assert await listed(lucid, "omitted") == {"gpt", "llama", "tiny"}
    for other in ("maybe", "TRUE", "1", ""):
        answer = await lucid.get("/models", params={"available": other})
        assert answer.status_code == 422
        assert answer.json()["error"]["details"]["fields"][0]["path"] == "query.available"


async def test_the_filter_applies_before_paging(lucid: httpx.AsyncClient) -> None:
    """Each page is full and the total exact, however the available models are spread over the whole list."""
    for number in range(9):
        await add_model(lucid, f"model-{number}", "api" if number % 3 == 0 else "gguf")
    pages = [(await lucid.get(f"/models?available=true&perPage=2&page={page}")).json() for page in (1, 2, 3)]
    assert [[model["name"] for model in page["models"]] for page in pages] == [["model-6", "model-3"], ["model-0"], []]
    assert pages[0]["pagination"] == {"total": 3, "page": 1, "perPage": 2, "totalPages": 2}


async def test_models_of_format_api_are_always_available(lucid: httpx.AsyncClient) -> None:
    """They need no compute: no node, and none that is healthy."""
    await add_model(lucid, "gpt", "api")
    assert await listed(lucid, "true") == {"gpt"}
    node = await add_node(lucid, "ill")
    assert await beat(lucid, node, "unhealthy") == 200
    shown = (await lucid.get("/models/gpt")).json()
    assert (shown["available"], shown["served"]) == (True, True)


@pytest.mark.parametrize(("format_", "runtime"), [("safetensors", "vllm"), ("gguf", "llama.cpp")])
async def test_other_formats_need_one_healthy_node(lucid: httpx.AsyncClient, format_: str, runtime: str) -> None:
    """One is enough, and it has to say that it is healthy: neither ill nor draining."""
    await add_model(lucid, "llama", format_)
    assert await why_not(lucid, "llama") == []
    node = await add_node(lucid, "the one", runtimes=[runtime])
    await add_node(lucid, "another that can't", runtimes=["another"])
    assert await listed(lucid, "true") == {"llama"}
    assert await beat(lucid, node, "unhealthy") == 200
    assert await why_not(lucid, "llama") == ["REPORTED_UNHEALTHY", "RUNTIME_MISMATCH"]
    assert await beat(lucid, node) == 200
    assert await listed(lucid, "true") == {"llama"}
    assert (await lucid.post(f"/compute/drain/{node}")).status_code == 202
    assert await why_not(lucid, "llama") == ["DRAINING", "RUNTIME_MISMATCH"]
    assert (await lucid.post(f"/compute/resume/{node}")).status_code == 200
    assert await listed(lucid, "true") == {"llama"}
    assert (await lucid.post(f"/compute/deregister/{node}")).status_code == 200
    assert await listed(lucid, "true") == set()


@pytest.mark.parametrize(
    ("wanted", "offered", "reason"),
    [
        ({"runtimes": ["sglang"]}, {"runtimes": ["vllm"]}, "RUNTIME_MISMATCH"),
        ({"runtimeRecommended": "tgi"}, {"runtimes": ["vllm"]}, "RUNTIME_MISMATCH"),
        ({"minVramGb": 80.5}, {"vram": "80GB"}, "VRAM_TOO_LOW"),
        ({"minVramGb": {"fp16": 140, "awq-4bit": 90}}, {"vram": "81920MiB"}, "VRAM_TOO_LOW"),
        ({"contextLength": 8193}, {"maxContext": 8192}, "CONTEXT_TOO_SHORT"),
    ],
)
async def test_the_runtime_and_the_hardware_have_to_do(
    lucid: httpx.AsyncClient, wanted: dict[str, Any], offered: dict[str, Any], reason: str
) -> None:
    """Runtime, VRAM and context each decide alone, and a node that has what is wanted makes the model available."""
    await add_model(lucid, "llama", "safetensors", **wanted)
    await add_node(lucid, "short of it", **offered)
    assert await why_not(lucid, "llama") == [reason]
    runtimes = ["vllm", "tgi", "sglang"]
    await add_node(lucid, "has it", **{**offered, "runtimes": runtimes, "vram": "96GB", "maxContext": 8193})
    assert await listed(lucid, "true") == {"llama"}


async def test_what_a_node_has_to_the_letter_is_enough(lucid: httpx.AsyncClient) -> None:
    """The bounds of VRAM and context are inclusive."""
    await add_model(lucid, "llama", "safetensors", minVramGb=80, contextLength=8192)
    await add_node(lucid, "just enough", vram="80 GiB", maxContext=8192)
    assert await why_not(lucid, "llama") == []
    assert await listed(lucid, "true") == {"llama"}


async def test_the_heartbeat_has_to_be_of_the_last_30_seconds(served: Served, lucid: httpx.AsyncClient) -> None:
    """Through the 30th second, and no instant longer, every answer goes by the age at the instant that it names."""
    await add_model(lucid, "llama", "safetensors")
    node = await add_node(lucid, "falls silent")
    await served.fall_silent(node, 29)
    last_heartbeat_at = datetime.min.replace(tzinfo=UTC)

    async def is_noticed() -> bool:
        nonlocal last_heartbeat_at
        health = (await lucid.get(f"/compute/health/{node}")).json()
        last_heartbeat_at = datetime.fromisoformat(health["lastHeartbeatAt"])
        return bool(health["heartbeatAgeSeconds"] >= 28)

    await eventually(is_noticed)
    verdicts: dict[bool, list[float]] = {True: [], False: []}

    async def is_old() -> bool:
        verdict = (await lucid.get("/models/llama/availability")).json()
        age = (datetime.fromisoformat(verdict["checkedAt"]) - last_heartbeat_at).total_seconds()
        verdicts[verdict["available"]].append(age)
        return age > 30.5

    await eventually(is_old)
    assert max(verdicts[True]) <= 30.001  # both instants are cut to milliseconds
    assert min(verdicts[False]) >= 29.999
    assert await why_not(lucid, "llama") == ["HEARTBEAT_STALE"]
    assert (await lucid.get(f"/compute/health/{node}")).json()["status"] == "healthy"
    assert await beat(lucid, node) == 200
    assert await listed(lucid, "true") == {"llama"}


async def test_a_node_that_never_beat_counts_for_nothing(lucid: httpx.AsyncClient) -> None:
    """A registration alone is no sign of life."""
    await add_model(lucid, "llama", "safetensors")
    body = {"name": "silent", "type": "compute", "metadata": NODE}
    assert (await lucid.post("/passports", json=body)).status_code == 201
    assert await why_not(lucid, "llama") == ["HEARTBEAT_MISSING"]
