"""GET /models/{id}/availability: every failing rule of every node, and the same verdict as the filter's."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api
from tests.other_replicas import let_pass

VLLM = {"runtimes": ["vllm"], "vram": "80GB", "maxContext": 8192}
Arrange = Callable[[Api, str], Awaitable[Any]]


@pytest.fixture
def settings() -> Settings:
    """The tests' settings; a node may send any number of heartbeats."""
    return Settings(bootstrap_admin_key=ADMIN_KEY, heartbeat_max_per_second=0)


async def fresh(api: Api, node: str) -> None:
    """A fresh, healthy node."""
    await api.beat(node)


async def stale(api: Api, node: str) -> None:
    """A node whose last heartbeat is 40 s old."""
    await api.beat(node)
    await let_pass(api, node, 40)


async def silent(api: Api, node: str) -> None:
    """A node that never sent a heartbeat."""


async def unhealthy(api: Api, node: str) -> None:
    """A node that reports unhealthy."""
    await api.beat(node, status="unhealthy")


async def drained(api: Api, node: str) -> None:
    """A fresh node that its operator drains."""
    await api.beat(node)
    await api.http.post(f"/compute/drain/{node}")


async def says_it_drains(api: Api, node: str) -> None:
    """A node that drains itself."""
    await api.beat(node, status="draining")


async def deregistered(api: Api, node: str) -> None:
    """A node that was deregistered while fresh."""
    await api.beat(node)
    await api.http.post(f"/compute/deregister/{node}")


async def deprecated(api: Api, node: str) -> None:
    """A fresh node whose passport is deprecated."""
    await api.beat(node)
    await api.http.patch(f"/passports/{node}", json={"status": "deprecated"})


async def revoked(api: Api, node: str) -> None:
    """A node that was revoked while fresh."""
    await api.beat(node)
    await api.http.delete(f"/passports/{node}")


Case = tuple[Arrange, dict[str, Any], dict[str, Any], set[str]]
CASES: list[Case] = [
    (fresh, VLLM, {}, set()),
    (fresh, VLLM, {"minVramGb": 80, "contextLength": 8192}, set()),
    (fresh, VLLM, {"minVramGb": 80.5}, {"VRAM_TOO_LOW"}),
    (fresh, VLLM, {"minVramGb": {"fp16": 140, "awq-4bit": 40}}, set()),
    (fresh, VLLM, {"contextLength": 8193}, {"CONTEXT_TOO_SHORT"}),
    (fresh, {**VLLM, "maxContext": None}, {"contextLength": 10**6}, set()),
    (fresh, VLLM, {"runtimes": ["tgi", "sglang"]}, {"RUNTIME_MISMATCH"}),
    (fresh, VLLM, {"runtimes": ["tgi", "vllm"], "runtimeRecommended": "tgi"}, set()),
    (fresh, VLLM, {"runtimeRecommended": "tgi"}, {"RUNTIME_MISMATCH"}),
    (fresh, {**VLLM, "runtimes": ["ollama"]}, {}, {"RUNTIME_MISMATCH"}),
    (fresh, {**VLLM, "runtimes": None}, {}, {"RUNTIME_MISMATCH"}),
    (stale, VLLM, {}, {"HEARTBEAT_STALE"}),
    (silent, VLLM, {}, {"HEARTBEAT_MISSING"}),
    (unhealthy, VLLM, {}, {"REPORTED_UNHEALTHY"}),
    (drained, VLLM, {}, {"DRAINING"}),
    (says_it_drains, VLLM, {}, {"DRAINING"}),
    (deregistered, VLLM, {}, {"DEREGISTERED"}),
    (deprecated, VLLM, {}, {"PASSPORT_INACTIVE"}),
    (revoked, VLLM, {}, {"PASSPORT_INACTIVE"}),
    (
        unhealthy,
        {**VLLM, "runtimes": ["ollama"]},
        {"minVramGb": 100, "contextLength": 9000},
        {"RUNTIME_MISMATCH", "VRAM_TOO_LOW", "CONTEXT_TOO_SHORT", "REPORTED_UNHEALTHY"},
    ),
]


async def availability(api: Api, model: str) -> Any:
    """The availability of a model."""
    answer = await api.http.get(f"/models/{model}/availability")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def assert_verdicts_equal(api: Api) -> None:
    """For every model the filter, the model itself and its availability say the same."""
    listed = {}
    for wanted in ("true", "false"):
        for model in (await api.http.get(f"/models?available={wanted}&perPage=100")).json()["models"]:
            listed[model["id"]] = wanted == "true"
    everything = (await api.http.get("/models?perPage=100")).json()["models"]
    assert set(listed) == {model["id"] for model in everything}
    for model in everything:
        explained = await availability(api, model["id"])
        shown = (await api.http.get(f"/models/{model['id']}")).json()
        verdicts = {listed[model["id"]], model["available"], shown["available"], explained["available"]}
        assert len(verdicts) == 1, model
        assert model["served"] == shown["served"] == explained["served"]
        assert model["available"] >= model["served"]
        if model["metadata"]["format"] != "api":
            assert explained["available"] is any(node["eligible"] for node in explained["nodes"])


async def test_every_reason_stands_for_one_failing_rule(api: Api) -> None:
    """All cases in one fleet, each with a model that only its own node is asked about."""
    nodes = []
    for number, (arrange, node_metadata, model_metadata, _) in enumerate(CASES):
        node = await api.register(f"node {number}", node_metadata)
        await arrange(api, node)
        await api.add_model(f"model {number}", **model_metadata)
        nodes.append(node)
    for number, (arrange, _, model_metadata, codes) in enumerate(CASES):
        explained = await availability(api, f"model {number}")
        assert sorted(explained) == ["available", "checkedAt", "nodes", "served", "summary"]
        (node,) = [node for node in explained["nodes"] if node["passportId"] == nodes[number]]
        where = (arrange.__name__, model_metadata)
        assert {reason["code"] for reason in node["reasons"]} == codes, where
        assert node["eligible"] is not bool(codes), where
        assert all(sorted(reason) == ["code", "found", "message", "wanted"] for reason in node["reasons"])
        counted: dict[str, int] = {}
        for reasons in (node["reasons"] for node in explained["nodes"]):
            for code in {reason["code"] for reason in reasons}:
                counted[code] = counted.get(code, 0) + 1
        assert explained["summary"] == counted
    await assert_verdicts_equal(api)


async def test_reasons_say_what_was_wanted_and_found(api: Api) -> None:
    node = await api.register(metadata={**VLLM, "runtimes": ["ollama"]})
    await api.beat(node)
    await let_pass(api, node, 40)
    await api.add_model("m", minVramGb=100, contextLength=9000, runtimes=["vllm"])
    (seen,) = (await availability(api, "m"))["nodes"]
    found = {reason["code"]: (reason["wanted"], reason["found"]) for reason in seen["reasons"]}
    assert found["RUNTIME_MISMATCH"] == (["vllm"], ["ollama"])
    assert found["VRAM_TOO_LOW"] == (100, 80)
    assert found["CONTEXT_TOO_SHORT"] == (9000, 8192)
    wanted, age = found["HEARTBEAT_STALE"]
    assert (wanted, 40 <= age < 50) == (30, True)


async def test_an_api_model_is_always_available(api: Api) -> None:
    await api.add_model("hosted", "api", minVramGb=10**5, contextLength=10**6, runtimes=["tgi"])
    explained = await availability(api, "hosted")
    assert (explained["available"], explained["served"], explained["summary"]) == (True, True, {})
    await assert_verdicts_equal(api)


async def test_a_node_that_names_no_runtime_counts_for_what_it_declares_or_reports(api: Api) -> None:
    node = await api.register()
    await api.add_model("m")
    await api.add_model("other")
    for models, declared, available in (([], [], False), (["m"], [], True), ([], ["m"], True), (["x"], ["y"], False)):
        await api.http.put(f"/compute/models/{node}", json={"models": [{"id": id_} for id_ in declared]})
        await api.beat(node, availableModels=models)
        assert (await availability(api, "m"))["available"] is available
        assert (await availability(api, "other"))["available"] is False
        await assert_verdicts_equal(api)


async def test_a_reported_runtime_counts_as_named(api: Api) -> None:
    node = await api.register()
    await api.add_model("m")
    await api.beat(node, runtime={"name": "vLLM"})
    assert (await availability(api, "m"))["available"] is True


async def test_what_a_node_declares_decides_vram_by_quantization_and_context_by_max_tokens(api: Api) -> None:
    node = await api.register(metadata=VLLM)
    await api.beat(node)
    await api.add_model("m", minVramGb={"fp16": 140, "awq-4bit": 40}, contextLength=16384)
    for quantization, max_tokens, codes in (
        (None, None, {"CONTEXT_TOO_SHORT"}),
        ("fp16", 16384, {"VRAM_TOO_LOW"}),
        ("FP16", 16384, {"VRAM_TOO_LOW"}),
        ("awq-4bit", 16384, set()),
        ("awq-4bit", 4096, {"CONTEXT_TOO_SHORT"}),
        ("q8_0", 32768, set()),
        ("fp16", 100, {"VRAM_TOO_LOW", "CONTEXT_TOO_SHORT"}),
    ):
        declared = {"id": "m", "quantization": quantization, "maxTokens": max_tokens}
        await api.http.put(f"/compute/models/{node}", json={"models": [declared]})
        (seen,) = (await availability(api, "m"))["nodes"]
        assert {reason["code"] for reason in seen["reasons"]} == codes, declared
        await assert_verdicts_equal(api)


async def test_the_formats_runtimes_are_the_default(api: Api) -> None:
    runs = {"safetensors": {"vllm", "tgi", "sglang", "tensorrt"}, "gguf": {"ollama", "llama.cpp", "vllm"}}
    nodes = {}
    for runtime in sorted(set.union(*runs.values())):
        nodes[runtime] = await api.register(runtime, {"runtimes": [{"name": runtime, "version": "1"}]})
        await api.beat(nodes[runtime])
    for format_, runtimes in runs.items():
        await api.add_model(format_, format_)
        explained = await availability(api, format_)
        eligible = {node["passportId"] for node in explained["nodes"] if node["eligible"]}
        assert eligible == {nodes[runtime] for runtime in runtimes}


async def test_an_explanation_is_read_page_by_page_and_by_reason(api: Api) -> None:
    """Nodes with the fewest reasons come first; the summary counts all nodes, also those not listed."""
    await api.add_model("m", minVramGb=100)
    far = await api.register("far", {"vram": "24GB", "runtimes": ["vllm"]})
    near = await api.register("near", {"vram": "200GB", "runtimes": ["vllm"]})
    fits = await api.register("fits", {"vram": "200GB", "runtimes": ["vllm"]})
    await api.beat(fits)
    whole = await availability(api, "m")
    assert [(node["passportId"], node["name"]) for node in whole["nodes"]] == [
        (fits, "fits"),
        (near, "near"),
        (far, "far"),
    ]
    page = (await api.http.get("/models/m/availability?page=2&perPage=1")).json()
    assert [node["name"] for node in page["nodes"]] == ["near"]
    assert page["pagination"] == {"total": 3, "page": 2, "perPage": 1, "totalPages": 3}
    assert page["summary"] == whole["summary"] == {"HEARTBEAT_MISSING": 2, "VRAM_TOO_LOW": 1}
    small = (await api.http.get("/models/m/availability?reason=VRAM_TOO_LOW&perPage=100")).json()
    assert [node["name"] for node in small["nodes"]] == ["far"]
    assert small["pagination"]["total"] == 1
    assert (await api.http.get("/models/m/availability?reason=NO_SUCH")).status_code == 422
    await api.http.post(f"/compute/deregister/{near}")
    assert [node["name"] for node in (await availability(api, "m"))["nodes"]] == ["fits", "far", "near"]


async def test_nodes_that_can_not_run_a_model_come_nearest_first(api: Api) -> None:
    """By what they lack, and by how much: a heartbeat before a runtime, and 80 GB before 24 GB of 640 GB."""
    await api.add_model("m", minVramGb=640, runtimes=["vllm"])
    wanted = [
        ("silent", {"vram": "640GB", "runtimes": ["vllm"]}),
        ("other-runtime", {"vram": "640GB", "runtimes": ["tgi"]}),
        ("half", {"vram": "320GB", "runtimes": ["vllm"]}),
        ("of-80", {"vram": "80GB", "runtimes": ["vllm"]}),
        ("of-80-too", {"vram": "80GB", "runtimes": ["vllm"]}),
        ("of-48", {"vram": "48GB", "runtimes": ["vllm"]}),
        ("of-24", {"vram": "24GB", "runtimes": ["vllm"]}),
        ("of-24-silent", {"vram": "24GB", "runtimes": ["vllm"]}),
    ]
    for name, metadata in (wanted[index] for index in (5, 1, 7, 3, 0, 6, 4, 2)):
        node = await api.register(name, metadata)
        if "silent" not in name:
            await api.beat(node)
    nodes = (await api.http.get("/models/m/availability")).json()["nodes"]
    assert [node["name"] for node in nodes] == [name for name, _ in wanted]
