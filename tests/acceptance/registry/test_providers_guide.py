"""The providers' guide, sentence by sentence, as JSON over a real socket against a real `lucid serve`."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Iterator
from itertools import count
from typing import Any

import httpx
import pytest

from tests.lucid_serve import Served, eventually, serving_on_a_clone

# `lucid.passports.create({...})` of the guide, its object literal written as JSON.
REGISTRATION = """
{
  "name": "my-gpu-node",
  "type": "compute",
  "metadata": {
    "gpu": "NVIDIA A100",
    "vram": "80GB",
    "region": "us-east-1",
    "inferenceUrl": "http://your-gpu:8080/v1",
    "capabilities": ["inference", "fine-tuning"],
    "maxConcurrency": 8
  }
}
"""
# `lucid.compute.heartbeat({...})`; the load and the queue's depth are what the guide's functions might answer.
HEARTBEAT = """
{
  "passportId": "PASSPORT_ID",
  "status": "healthy",
  "load": 0.42,
  "availableModels": ["llama-3-70b", "mistral-7b"],
  "queueDepth": 3
}
"""
# `lucid.compute.updateModels(passport.id, {...})`.
MODELS = """
{
  "models": [
    { "id": "llama-3-70b", "maxTokens": 4096, "quantization": "fp16" },
    { "id": "mistral-7b", "maxTokens": 8192, "quantization": "awq-4bit" },
    { "id": "deepseek-coder-33b", "maxTokens": 16384, "quantization": "gptq" }
  ]
}
"""
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
_numbers = count()


@pytest.fixture(scope="module")
def served(postgres_and_template: tuple[str, str]) -> Iterator[Served]:
    """One service for the whole guide; each test has a node, and an owner, of its own."""
    with serving_on_a_clone(postgres_and_template) as served:
        yield served


@pytest.fixture
async def lucid(served: Served) -> AsyncIterator[httpx.AsyncClient]:
    """The guide's prerequisite: a Lucid API key with compute scope."""
    async with served.client() as admin:
        body = {"name": "gpu", "owner": f"provider-{next(_numbers)}", "scopes": ["compute"]}
        key = (await admin.post("/keys", json=body)).json()["key"]
    async with served.client(key) as client:
        client.headers["Content-Type"] = "application/json"
        yield client


@pytest.fixture
async def passport_id(lucid: httpx.AsyncClient) -> str:
    """The id of the guide's node, registered with the key of the test."""
    answer = await lucid.post("/passports", content=REGISTRATION)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


async def beat(lucid: httpx.AsyncClient, passport_id: str) -> dict[str, Any]:
    """Send the guide's heartbeat."""
    answer = await lucid.post("/compute/heartbeat", content=HEARTBEAT.replace("PASSPORT_ID", passport_id))
    assert answer.status_code == 200, answer.text
    answered: dict[str, Any] = answer.json()
    return answered


async def health(lucid: httpx.AsyncClient, passport_id: str) -> dict[str, Any]:
    """Ask for the node's health."""
    answer = await lucid.get(f"/compute/health/{passport_id}")
    assert answer.status_code == 200, answer.text
    answered: dict[str, Any] = answer.json()
    return answered


async def test_registering_creates_a_compute_passport(lucid: httpx.AsyncClient) -> None:
    """The guide's object makes a passport of type compute; it is answered as it was written, and can be read again."""
    answer = await lucid.post("/passports", content=REGISTRATION)
    assert answer.status_code == 201
    passport = answer.json()
    assert answer.headers["location"] == f"/passports/{passport['id']}"
    assert passport["type"] == "compute"
    assert passport["name"] == "my-gpu-node"
    assert passport["status"] == "active"
    assert passport["metadata"] == {
        "gpu": "NVIDIA A100",
        "vram": "80GB",
        "vramGb": 80,
        "region": "us-east-1",
        "inferenceUrl": "http://your-gpu:8080/v1",
        "capabilities": ["inference", "fine-tuning"],
        "maxConcurrency": 8,
    }
    assert (await lucid.get(answer.headers["location"])).json() == passport
    again = await lucid.post("/passports", content=REGISTRATION)
    assert again.status_code == 409
    assert again.json()["error"]["details"] == {"passportId": passport["id"]}


async def test_only_a_key_with_compute_scope_registers_a_node(served: Served, lucid: httpx.AsyncClient) -> None:
    """Without a key nothing is registered, and a key of another scope does not suffice."""
    async with served.client(key="") as nobody, served.client() as admin:
        assert (await nobody.post("/passports", content=REGISTRATION)).status_code == 401
        body = {"name": "reader", "owner": "reader", "scopes": ["passports:read", "inference:run"]}
        key = (await admin.post("/keys", json=body)).json()["key"]
    async with served.client(key) as reader:
        assert (await reader.post("/passports", content=REGISTRATION)).status_code == 403


async def test_a_heartbeat_tells_that_the_node_is_alive(lucid: httpx.AsyncClient, passport_id: str) -> None:
    """Before the first one the node is unhealthy; after it healthy, with the load, queue and models that it sent."""
    assert (await health(lucid, passport_id))["status"] == "unhealthy"
    answered = await beat(lucid, passport_id)
    assert answered["passportId"] == passport_id
    assert answered["status"] == "healthy"
    assert answered["drain"] is False
    assert 8.1 <= answered["nextHeartbeatInSeconds"] <= 9.9
    assert all(INSTANT.fullmatch(answered[name]) for name in ("receivedAt", "freshUntil", "unhealthyAt"))
    seen = await health(lucid, passport_id)
    assert (seen["status"], seen["fresh"], seen["reasons"]) == ("healthy", True, [])
    assert (seen["load"], seen["queueDepth"]) == (0.42, 3)
    assert seen["availableModels"] == ["llama-3-70b", "mistral-7b"]
    assert seen["lastHeartbeatAt"] == answered["receivedAt"]


async def test_a_heartbeat_every_30_seconds_keeps_the_node_healthy(
    served: Served, lucid: httpx.AsyncClient, passport_id: str
) -> None:
    """The guide's interval is accepted, and uptime goes on from beat to beat."""
    await beat(lucid, passport_id)
    for _ in range(3):
        await served.fall_silent(passport_id, 30)
        assert (await health(lucid, passport_id))["status"] == "healthy"
        assert (await beat(lucid, passport_id))["status"] == "healthy"


async def test_a_node_silent_for_2_minutes_is_unhealthy_and_out_of_routing(
    served: Served, lucid: httpx.AsyncClient, passport_id: str
) -> None:
    """It is healthy up to the 120th second and not after; no model counts on it; its next heartbeat brings it back."""
    await beat(lucid, passport_id)
    await served.fall_silent(passport_id, 119)
    seen = await _health_when(served, lucid, passport_id, is_older_than=119)
    assert (seen["status"], seen["fresh"]) == ("healthy", False)
    last_healthy_age = 0.0

    async def is_unhealthy() -> bool:
        nonlocal seen, last_healthy_age
        seen = await health(lucid, passport_id)
        if seen["status"] == "healthy":
            last_healthy_age = seen["heartbeatAgeSeconds"]
        return bool(seen["status"] == "unhealthy")

    await eventually(is_unhealthy)
    assert seen["heartbeatAgeSeconds"] >= 120
    assert last_healthy_age <= 120 + await served.seconds_lost()
    assert seen["uptimeSeconds"] == 0
    assert [reason["code"] for reason in seen["reasons"]] == ["HEARTBEAT_STALE"]
    listed = (await lucid.get("/compute?status=unhealthy")).json()["nodes"]
    assert [node["id"] for node in listed] == [passport_id]
    await beat(lucid, passport_id)
    seen = await health(lucid, passport_id)
    assert (seen["status"], seen["fresh"]) == ("healthy", True)
    assert seen["uptimeSeconds"] < 5  # it counts anew


async def test_health_has_the_five_fields_of_the_guide(
    served: Served, lucid: httpx.AsyncClient, passport_id: str
) -> None:
    """Status, uptime, jobs completed, average latency and error rate; what is unknown is null, never 0."""
    await beat(lucid, passport_id)
    seen = await health(lucid, passport_id)
    assert seen["status"] in {"healthy", "unhealthy", "draining"}
    assert seen["uptimeSeconds"] >= 0
    assert seen["jobsCompleted"] == 0
    assert seen["avgLatencyMs"] is None
    assert seen["errorRate"] is None
    await served.fall_silent(passport_id, 1)
    assert (await _health_when(served, lucid, passport_id, is_older_than=1))["uptimeSeconds"] > 0


async def test_declared_models_are_matched(served: Served, lucid: httpx.AsyncClient, passport_id: str) -> None:
    """The declaration is answered as it was sent; a model registered later binds to it, and the node serves it."""
    answer = await lucid.put(f"/compute/models/{passport_id}", content=MODELS)
    assert answer.status_code == 200
    declared = answer.json()["models"]
    assert [(model["id"], model["maxTokens"], model["quantization"]) for model in declared] == [
        ("llama-3-70b", 4096, "fp16"),
        ("mistral-7b", 8192, "awq-4bit"),
        ("deepseek-coder-33b", 16384, "gptq"),
    ]
    assert [model["modelPassportId"] for model in declared] == [None, None, None]
    await beat(lucid, passport_id)
    async with served.client() as admin:
        metadata = {"format": "safetensors", "contextLength": 16384, "minVramGb": 40}
        body = {"name": "deepseek-coder-33b", "type": "model", "metadata": metadata}
        model = (await admin.post("/passports", json=body)).json()
    shown = (await lucid.get("/models/deepseek-coder-33b")).json()
    assert (shown["id"], shown["available"], shown["served"]) == (model["id"], True, True)
    declared = (await lucid.get(f"/compute/models/{passport_id}")).json()["models"]
    assert [model["modelPassportId"] for model in declared] == [None, None, model["id"]]
    assert (await lucid.put(f"/compute/models/{passport_id}", content='{"models": []}')).json()["models"] == []
    assert (await lucid.get("/models/deepseek-coder-33b")).json()["available"] is False


async def test_a_drained_node_is_safely_deregistered(lucid: httpx.AsyncClient, passport_id: str) -> None:
    """Draining stops new requests, says when none is left, and survives heartbeats; deregistering is for good."""
    await beat(lucid, passport_id)
    for _ in range(2):
        answer = await lucid.post(f"/compute/drain/{passport_id}")
        assert answer.status_code == 202
        assert answer.json() == {"passportId": passport_id, "status": "draining", "inFlight": 0, "drained": True}
    answered = await beat(lucid, passport_id)
    assert (answered["status"], answered["drain"]) == ("draining", True)
    seen = await health(lucid, passport_id)
    assert (seen["status"], seen["drained"]) == ("draining", True)
    assert [reason["code"] for reason in seen["reasons"]] == ["DRAINING"]
    for _ in range(2):
        answer = await lucid.post(f"/compute/deregister/{passport_id}")
        assert answer.status_code == 200
        assert answer.json() == {"passportId": passport_id, "status": "deregistered"}
    refused = await lucid.post("/compute/heartbeat", content=HEARTBEAT.replace("PASSPORT_ID", passport_id))
    assert refused.status_code == 410
    assert refused.json()["error"]["code"] == "NODE_DEREGISTERED"
    assert (await lucid.get(f"/passports/{passport_id}")).status_code == 200
    events = (await lucid.get(f"/compute/events/{passport_id}")).json()["events"]
    assert {"registered", "draining", "deregistered"} <= {event["type"] for event in events}
    again = await lucid.post("/passports", content=REGISTRATION)
    assert again.status_code == 201
    assert again.json()["id"] != passport_id


async def _health_when(
    served: Served, lucid: httpx.AsyncClient, passport_id: str, *, is_older_than: float
) -> dict[str, Any]:
    """Return the health once the replica has noticed how old the newest heartbeat was made."""
    seen: dict[str, Any] = {}

    async def is_noticed() -> bool:
        seen.update(await health(lucid, passport_id))
        return bool(seen["heartbeatAgeSeconds"] > is_older_than)

    await eventually(is_noticed)
    return seen
