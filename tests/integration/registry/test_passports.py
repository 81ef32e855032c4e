"""Passports: create, read and revoke them, and what their metadata may contain."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.factories import GUIDE_PASSPORT

FIELDS = [
    "id",
    "type",
    "name",
    "description",
    "version",
    "tags",
    "owner",
    "status",
    "metadata",
    "createdAt",
    "updatedAt",
]
INSTANT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")
NODE = {"vram": "80GB", "inferenceUrl": "http://node:8080"}


async def make(api: Api, type_: str, metadata: dict[str, Any] | None = None, **fields: Any) -> Any:
    """Ask for a passport named by its type unless said otherwise; return the raw response."""
    return await api.http.post(
        "/passports", json={"name": f"a {type_}", "type": type_, "metadata": metadata or {}, **fields}
    )


def fault_paths(answer: Any) -> list[str]:
    """Return the paths of the faults of an INVALID_REQUEST."""
    assert answer.status_code == 422, answer.text
    assert error_code(answer) == "INVALID_REQUEST"
    faults = answer.json()["error"]["details"]["fields"]
    assert all(fault["message"] for fault in faults)
    return [fault["path"] for fault in faults]


async def test_a_passport_is_answered_with_exactly_the_contracts_fields(api: Api) -> None:
    sent = {"description": "for reading", "version": "1.2", "tags": ["a", "b"]}
    made = await make(api, "agent", {"any": ["thing", None, 1.5]}, **sent)
    assert made.status_code == 201
    passport = made.json()
    assert sorted(passport) == sorted(FIELDS)
    assert {key: passport[key] for key in sent} == sent
    assert passport["metadata"] == {"any": ["thing", None, 1.5]}
    assert (passport["owner"], passport["status"]) == ("admin", "active")
    assert INSTANT.fullmatch(passport["createdAt"])
    assert passport["updatedAt"] == passport["createdAt"]
    assert made.headers["location"] == f"/passports/{passport['id']}"
    assert (await api.http.get(made.headers["location"])).json() == passport


@pytest.mark.parametrize("type_", ["agent", "tool", "dataset"])
async def test_opaque_passports_keep_their_metadata_to_the_letter(api: Api, type_: str) -> None:
    metadata = {"vramGb": 3, "vram": "no", "nested": {"deep": [{"x": None}]}, "ключ": "日本語 🚀", "big": 2**62}
    assert (await make(api, type_, metadata)).json()["metadata"] == metadata


async def test_vram_is_answered_as_written_and_parsed(api: Api) -> None:
    for number, (written, gigabytes) in enumerate(
        [("80GB", 80), ("80 GiB", 80), ("81920MiB", 80), ("512MB", 0.5), (80, 80), (23.5, 23.5)]
    ):
        made = await make(api, "compute", {**NODE, "vram": written}, name=f"node {number}")
        assert made.json()["metadata"] == {**NODE, "vram": written, "vramGb": gigabytes}


async def test_vram_that_cannot_be_read_is_refused_where_it_stands(api: Api) -> None:
    for written in ("80", "lots", "", "-1GB", 0, -1, True, None, [80], {"gb": 80}, "0GB"):
        assert fault_paths(await make(api, "compute", {**NODE, "vram": written})) == ["metadata.vram"]
    assert fault_paths(await make(api, "compute")) == ["metadata.vram", "metadata.inferenceUrl"]


async def test_a_vram_gb_that_is_sent_is_ignored(api: Api) -> None:
    made = await make(api, "compute", {**NODE, "vramGb": 9000})
    assert made.json()["metadata"]["vramGb"] == 80


async def test_compute_metadata_is_kept_as_written_with_keys_it_does_not_know(api: Api) -> None:
    metadata = {
        **GUIDE_PASSPORT["metadata"],
        "gpuCount": 2,
        "runtimes": ["vllm", {"name": "tgi", "version": "3"}],
        "maxContext": 32768,
        "rack": {"row": 7, "slot": None},
        "pricePer1kTokens": "0.0020",
    }
    made = await make(api, "compute", metadata)
    assert made.json()["metadata"] == {**metadata, "vramGb": 80}


async def test_faults_of_compute_metadata_are_all_named(api: Api) -> None:
    wrong = {
        "maxConcurrency": 0,
        "gpuCount": 1.5,
        "capabilities": "inference",
        "runtimes": ["vllm", 7],
        "maxContext": -1,
        "pricePer1kTokens": "free",
        "region": 5,
    }
    paths = fault_paths(await make(api, "compute", {**NODE, **wrong}))
    assert {path.removesuffix(".1") for path in paths} == {f"metadata.{key}" for key in wrong}
    assert "metadata.runtimes.1" in paths


async def test_money_is_taken_as_a_number_or_a_decimal_string_and_answered_as_a_string(api: Api) -> None:
    for number, (sent, answered) in enumerate(
        [(0.1, "0.1"), ("0.10", "0.10"), (3, "3"), ("0.000000000001", "0.000000000001"), (1e-7, "0.0000001")]
    ):
        made = await make(api, "compute", {**NODE, "pricePer1kTokens": sent}, name=f"node {number}")
        assert made.json()["metadata"]["pricePer1kTokens"] == answered
    for sent in (-0.1, "NaN", "Infinity", True, "1e3000"):
        paths = fault_paths(await make(api, "compute", {**NODE, "pricePer1kTokens": sent}))
        assert paths == ["metadata.pricePer1kTokens"]


async def test_a_nodes_own_key_is_never_answered(api: Api) -> None:
    secret = "the-nodes-own-bearer"
    node = await api.register(metadata={"inferenceKey": secret})
    await api.beat(node)
    for path in ("/passports", f"/passports/{node}", "/compute", f"/compute/health/{node}", "/audit"):
        answer = await api.http.get(path)
        assert answer.status_code == 200
        assert secret not in answer.text
        assert "inferenceKey" not in answer.text
    events = await api.http.get(f"/compute/events/{node}")
    assert secret not in events.text


async def test_an_address_that_the_egress_policy_denies_is_refused_and_a_name_is_not(api: Api) -> None:
    for url in (
        "http://169.254.169.254/v1",
        "http://10.0.0.1",
        "http://[fe80::1]:8000",
        "ftp://gpu",
        "gpu:8080",
        "http://user:password@gpu",
        "http://gpu:6379",
        "http://0x7f.1/",
    ):
        paths = fault_paths(await make(api, "compute", {"vram": 80, "inferenceUrl": url}))
        assert paths == ["metadata.inferenceUrl"], url
    for number, url in enumerate(("http://your-gpu:8080/v1", "https://gpu.example/", "http://127.0.0.1:9000/v1")):
        assert (await make(api, "compute", {"vram": 80, "inferenceUrl": url}, name=f"{number}")).status_code == 201


async def test_loopback_is_refused_where_the_service_itself_is_not_on_loopback(database_url: str) -> None:
    async with open_api(database_url, Settings(host="0.0.0.0", bootstrap_admin_key=ADMIN_KEY)) as api:  # noqa: S104
        made = await make(api, "compute", {"vram": 80, "inferenceUrl": "http://127.0.0.1:9000"})
        assert fault_paths(made) == ["metadata.inferenceUrl"]
        assert (await make(api, "compute", NODE)).status_code == 201


async def test_model_metadata_is_checked_and_kept(api: Api) -> None:
    metadata = {
        "format": "safetensors",
        "runtimes": ["vllm"],
        "runtimeRecommended": "vllm",
        "minVramGb": {"fp16": 140, "awq-4bit": 40},
        "contextLength": 8192,
        "aliases": ["llama"],
        "licence": "open",
        "vramGb": 12,
    }
    assert (await make(api, "model", metadata)).json()["metadata"] == metadata
    assert fault_paths(await make(api, "model")) == ["metadata.format"]
    wrong = {"format": "onnx", "minVramGb": "40GB", "contextLength": 0, "aliases": "llama", "runtimes": "vllm"}
    assert set(fault_paths(await make(api, "model", wrong))) == {f"metadata.{key}" for key in wrong}


async def test_a_models_name_may_not_hide_a_path_of_the_api(api: Api) -> None:
    metadata = {"format": "gguf"}
    assert fault_paths(await make(api, "model", metadata, name="x/availability")) == ["name"]
    assert fault_paths(await make(api, "model", {**metadata, "aliases": ["y/availability"]})) == ["metadata.aliases.0"]


async def test_an_upstream_is_for_admins_and_api_models_and_its_key_is_never_answered(api: Api) -> None:
    upstream = {"url": "https://api.example/v1", "model": "big", "apiKey": "sk-upstream"}
    metadata = {"format": "api", "upstream": upstream}
    writer = await api.new_key("acme", ["passports:write", "passports:read"])
    refused = await make(writer, "model", metadata)
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")
    assert fault_paths(await make(api, "model", {**metadata, "format": "gguf"})) == ["metadata"]
    denied = {"format": "api", "upstream": {"url": "http://169.254.169.254"}}
    assert fault_paths(await make(api, "model", denied)) == ["metadata.upstream.url"]
    made = await make(api, "model", metadata)
    assert made.json()["metadata"]["upstream"] == {"url": "https://api.example/v1", "model": "big"}
    for path in (f"/passports/{made.json()['id']}", "/passports", "/models", f"/models/{made.json()['id']}", "/audit"):
        assert "sk-upstream" not in (await api.http.get(path)).text


async def test_unknown_fields_and_types_are_refused(api: Api) -> None:
    assert fault_paths(await make(api, "agent", surprise=1)) == ["surprise"]
    assert fault_paths(await make(api, "robot")) == ["type"]
    assert fault_paths(await make(api, "agent", status="revoked")) == ["status"]
    assert fault_paths(await make(api, "agent", name="")) == ["name"]


async def test_only_an_admin_names_another_owner(api: Api) -> None:
    made = await make(api, "agent", owner="acme")
    assert made.json()["owner"] == "acme"
    writer = await api.new_key("acme", ["passports:write"])
    assert (await make(writer, "tool", owner="acme")).json()["owner"] == "acme"
    refused = await make(writer, "dataset", owner="rival")
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_a_name_is_one_owners_and_one_types_alone(api: Api) -> None:
    first = (await make(api, "agent", name="x")).json()["id"]
    again = await make(api, "agent", name="x")
    assert (again.status_code, error_code(again)) == (409, "PASSPORT_EXISTS")
    assert again.json()["error"]["details"] == {"passportId": first}
    assert (await make(api, "tool", name="x")).status_code == 201
    assert (await make(api, "agent", name="x", owner="acme")).status_code == 201
    assert (await make(api, "agent", name="X")).status_code == 201


async def test_a_deprecated_passport_keeps_its_name(api: Api) -> None:
    first = (await make(api, "agent", name="x")).json()["id"]
    await api.http.patch(f"/passports/{first}", json={"status": "deprecated"})
    assert error_code(await make(api, "agent", name="x")) == "PASSPORT_EXISTS"


async def test_a_revoked_passport_stays_readable_and_frees_its_name(api: Api) -> None:
    first = (await make(api, "agent", name="x")).json()["id"]
    for _ in range(2):
        revoked = await api.http.delete(f"/passports/{first}")
        assert (revoked.status_code, revoked.content) == (204, b"")
    assert (await api.http.get(f"/passports/{first}")).json()["status"] == "revoked"
    second = await make(api, "agent", name="x")
    assert second.status_code == 201
    assert second.json()["id"] != first


async def test_a_revoked_passport_is_revoked_for_good(api: Api) -> None:
    gone = (await make(api, "agent")).json()["id"]
    await api.http.delete(f"/passports/{gone}")
    assert fault_paths(await api.http.patch(f"/passports/{gone}", json={"status": "active"})) == ["status"]
    assert (await api.http.get(f"/passports/{gone}")).json()["status"] == "revoked"


async def test_a_node_with_requests_in_flight_is_not_revoked(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.own_in_flight[node] = 2
    for refused in (
        await api.http.delete(f"/passports/{node}"),
        await api.http.patch(f"/passports/{node}", json={"status": "revoked"}),
    ):
        assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
        assert refused.json()["error"]["details"] == {"inFlight": 2}
    api.replica.fleet.replicas.own_in_flight[node] = 0
    assert (await api.http.delete(f"/passports/{node}")).status_code == 204


async def test_an_unknown_passport_is_not_found(api: Api) -> None:
    for passport_id in ("7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11", "nonsense"):
        for method in ("GET", "DELETE", "PATCH"):
            body = {"description": "x"} if method == "PATCH" else None
            answer = await api.http.request(method, f"/passports/{passport_id}", json=body)
            assert (answer.status_code, error_code(answer)) == (404, "PASSPORT_NOT_FOUND")
