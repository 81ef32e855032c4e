"""PATCH /passports/{id}: an RFC 7396 merge patch, also inside metadata, and around secrets."""

from __future__ import annotations

from typing import Any

from tests.api import Api, error_code
from tests.other_replicas import run_sql

UPSTREAM = {"url": "https://api.example/v1", "model": "big", "apiKey": "sk-first"}


async def patch(api: Api, passport_id: str, body: Any) -> Any:
    """Send a merge patch; return the raw response."""
    return await api.http.patch(f"/passports/{passport_id}", json=body)


async def patched(api: Api, passport_id: str, body: Any) -> Any:
    """Return the passport after an accepted patch; a new read returns the same."""
    answer = await patch(api, passport_id, body)
    assert answer.status_code == 200, answer.text
    assert (await api.http.get(f"/passports/{passport_id}")).json() == answer.json()
    return answer.json()


async def secrets_of(api: Api, passport_id: str) -> Any:
    """Return the stored secrets of a passport."""
    return (await run_sql(api, "SELECT secrets::text FROM passports WHERE id = $1", passport_id))[0][0]


def first_fault(answer: Any) -> Any:
    """Return the path of the first fault of an INVALID_REQUEST."""
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST"), answer.text
    return answer.json()["error"]["details"]["fields"][0]["path"]


async def agent(api: Api, metadata: dict[str, Any], **fields: Any) -> str:
    """Make an agent; return its id."""
    made = await api.http.post("/passports", json={"name": "x", "type": "agent", "metadata": metadata, **fields})
    return str(made.json()["id"])


async def test_what_a_patch_leaves_out_stays(api: Api) -> None:
    node = await api.register()
    before = (await api.http.get(f"/passports/{node}")).json()
    after = await patched(api, node, {"description": "in rack 7"})
    assert after.pop("updatedAt") > before.pop("updatedAt")
    assert after == {**before, "description": "in rack 7"}


async def test_null_removes(api: Api) -> None:
    made = await agent(api, {"a": 1, "b": {"c": 2, "d": 3}}, description="d", version="1", tags=["t"])
    after = await patched(
        api, made, {"description": None, "version": None, "tags": None, "metadata": {"a": None, "b": {"c": None}}}
    )
    assert (after["description"], after["version"], after["tags"]) == (None, None, [])
    assert after["metadata"] == {"b": {"d": 3}}
    assert (await patched(api, made, {"metadata": {}}))["metadata"] == {"b": {"d": 3}}
    assert (await patched(api, made, {"metadata": None}))["metadata"] == {}


async def test_the_examples_of_rfc_7396_hold_inside_metadata(api: Api) -> None:
    """Appendix A, as far as both sides are objects, which metadata always is."""
    examples: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ]
    for number, (target, change, result) in enumerate(examples):
        made = await agent(api, target, version=str(number), owner=f"owner {number}")
        assert (await patched(api, made, {"metadata": change}))["metadata"] == result, change


async def test_a_patch_that_leaves_an_unsound_passport_changes_nothing(api: Api) -> None:
    node = await api.register()
    before = (await api.http.get(f"/passports/{node}")).json()
    for body, path in (
        ({"metadata": {"vram": None}}, "metadata.vram"),
        ({"metadata": {"inferenceUrl": None}}, "metadata.inferenceUrl"),
        ({"metadata": None}, "metadata.vram"),
        ({"metadata": {"vram": "much"}}, "metadata.vram"),
        ({"metadata": {"inferenceUrl": "http://169.254.169.254"}}, "metadata.inferenceUrl"),
        ({"metadata": []}, "metadata"),
        ({"name": None}, "name"),
        ({"status": None}, "status"),
        ({"status": "asleep"}, "status"),
        ({"name": ""}, "name"),
        ({"id": "mine"}, "id"),
        ({"createdAt": "2026-01-01T00:00:00Z"}, "createdAt"),
        ([], ""),
    ):
        assert first_fault(await patch(api, node, body)) == path, body
    assert (await api.http.get(f"/passports/{node}")).json() == before


async def test_type_and_owner_are_fixed(api: Api) -> None:
    made = await agent(api, {}, owner="acme")
    assert first_fault(await patch(api, made, {"type": "tool"})) == "type"
    assert first_fault(await patch(api, made, {"owner": "rival"})) == "owner"
    for body in ({"type": None}, {"owner": None}):
        assert first_fault(await patch(api, made, body)) == next(iter(body))
    assert (await patched(api, made, {"type": "agent", "owner": "acme"}))["owner"] == "acme"


async def test_a_patched_vram_is_parsed_again_and_vram_gb_is_ignored(api: Api) -> None:
    node = await api.register()
    assert (await patched(api, node, {"metadata": {"vramGb": 5}}))["metadata"]["vramGb"] == 80
    changed = (await patched(api, node, {"metadata": {"vram": "40 GiB", "vramGb": 5}}))["metadata"]
    assert (changed["vram"], changed["vramGb"]) == ("40 GiB", 40)
    assert (await patched(api, node, {"metadata": {"vramGb": None}}))["metadata"]["vramGb"] == 40


async def test_what_was_answered_can_be_sent_back(api: Api) -> None:
    node = await api.register(metadata={"inferenceKey": "a-secret", "pricePer1kTokens": 0.25})
    whole = (await api.http.get(f"/passports/{node}")).json()
    back = {key: whole[key] for key in ("name", "description", "version", "tags", "status", "metadata", "type")}
    assert (await patched(api, node, back))["metadata"] == whole["metadata"]
    assert await secrets_of(api, node) == '{"inferenceKey": "a-secret"}'


async def test_a_nodes_own_key_is_kept_replaced_and_removed_without_being_shown(api: Api) -> None:
    node = await api.register(metadata={"inferenceKey": "first"})
    for change, kept in (
        ({"region": "eu"}, '{"inferenceKey": "first"}'),
        ({"inferenceKey": "second"}, '{"inferenceKey": "second"}'),
        ({"inferenceKey": None}, "{}"),
    ):
        assert "inferenceKey" not in (await patched(api, node, {"metadata": change}))["metadata"]
        assert await secrets_of(api, node) == kept


async def test_an_upstreams_key_is_kept_replaced_and_removed_without_being_shown(api: Api) -> None:
    model = await api.add_model("big", "api", upstream=UPSTREAM)
    shown = {"url": "https://api.example/v1", "model": "big"}
    for change, kept in (
        ({"model": "big"}, '{"upstreamApiKey": "sk-first"}'),
        ({"apiKey": "sk-second"}, '{"upstreamApiKey": "sk-second"}'),
        ({"apiKey": None}, "{}"),
    ):
        after = await patched(api, model, {"metadata": {"upstream": change}})
        assert after["metadata"]["upstream"] == shown
        assert await secrets_of(api, model) == kept
    assert "upstream" not in (await patched(api, model, {"metadata": {"upstream": None}}))["metadata"]


async def test_removing_an_upstream_forgets_its_key(api: Api) -> None:
    model = await api.add_model("big", "api", upstream=UPSTREAM)
    await patched(api, model, {"metadata": {"upstream": None}})
    assert await secrets_of(api, model) == "{}"


async def test_an_owner_who_is_no_admin_changes_all_of_a_model_but_its_upstream(api: Api) -> None:
    body = {"name": "big", "type": "model", "owner": "acme", "metadata": {"format": "api", "upstream": UPSTREAM}}
    model = (await api.http.post("/passports", json=body)).json()["id"]
    owner = await api.new_key("acme", ["passports:write", "passports:read"])
    after = await patched(owner, model, {"tags": ["new"], "metadata": {"contextLength": 4096}})
    assert after["metadata"]["contextLength"] == 4096
    for upstream in ({"url": "https://evil.example"}, {"apiKey": "sk-stolen"}, {"apiKey": None}, None):
        refused = await patch(owner, model, {"metadata": {"upstream": upstream}})
        assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN"), upstream
    assert await secrets_of(api, model) == '{"upstreamApiKey": "sk-first"}'


async def test_a_patch_to_a_name_in_use_is_a_conflict(api: Api) -> None:
    first = await api.register("one")
    second = await api.register("two")
    taken = await patch(api, second, {"name": "one"})
    assert (taken.status_code, error_code(taken)) == (409, "PASSPORT_EXISTS")
    assert taken.json()["error"]["details"] == {"passportId": first}
    assert (await patched(api, second, {"name": "two"}))["name"] == "two"


async def test_a_changed_node_is_matched_as_changed_at_once(api: Api) -> None:
    await api.add_model("m", minVramGb=60)
    node = await api.register(metadata={"vram": "40GB", "runtimes": ["vllm"]})
    await api.beat(node)
    for vram, available in (("80GB", True), ("40GB", False)):
        await patched(api, node, {"metadata": {"vram": vram}})
        assert (await api.http.get("/models/m")).json()["available"] is available
