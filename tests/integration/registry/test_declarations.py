"""PUT and GET /compute/models/{id}: what a node declares, and the models it resolves to."""

from __future__ import annotations

from typing import Any

from tests.api import Api, error_code

GUIDE = [
    {"id": "llama-3-70b", "maxTokens": 4096, "quantization": "fp16"},
    {"id": "mistral-7b", "maxTokens": 8192, "quantization": "awq-4bit"},
    {"id": "deepseek-coder-33b", "maxTokens": 16384, "quantization": "gptq"},
]


async def declare(api: Api, node: str, *models: dict[str, Any]) -> Any:
    """Declare these models; return the raw response."""
    return await api.http.put(f"/compute/models/{node}", json={"models": list(models)})


async def resolved(api: Api, node: str) -> dict[str, str | None]:
    """The model passport of each declared id."""
    declaration = (await api.http.get(f"/compute/models/{node}")).json()
    return {model["id"]: model["modelPassportId"] for model in declaration["models"]}


async def test_the_guides_declaration_works_to_the_letter(api: Api) -> None:
    node = await api.register()
    model = await api.add_model("mistral-7b")
    answer = await declare(api, node, *GUIDE)
    assert answer.status_code == 200
    passports = [None, model, None]
    expected = [{**declared, "modelPassportId": id_} for declared, id_ in zip(GUIDE, passports, strict=True)]
    assert answer.json() == {"passportId": node, "models": expected}
    assert (await api.http.get(f"/compute/models/{node}")).json() == answer.json()


async def test_a_declaration_replaces_the_whole_former_one(api: Api) -> None:
    node = await api.register()
    await declare(api, node, *GUIDE)
    await declare(api, node, {"id": "only"})
    assert await resolved(api, node) == {"only": None}
    assert (await declare(api, node)).json()["models"] == []
    assert await resolved(api, node) == {}


async def test_max_tokens_and_quantization_may_be_null_or_left_out(api: Api) -> None:
    node = await api.register()
    answer = await declare(api, node, {"id": "a", "maxTokens": None, "quantization": None}, {"id": "b"})
    for model in answer.json()["models"]:
        assert (model["maxTokens"], model["quantization"]) == (None, None)


async def test_an_id_twice_is_refused_where_it_stands_again(api: Api) -> None:
    node = await api.register()
    await declare(api, node, {"id": "kept"})
    answer = await declare(api, node, {"id": "a"}, {"id": "b"}, {"id": "a", "maxTokens": 5})
    assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST")
    assert [fault["path"] for fault in answer.json()["error"]["details"]["fields"]] == ["models.2.id"]
    assert await resolved(api, node) == {"kept": None}


async def test_a_declaration_that_cannot_be_is_refused_where_it_stands(api: Api) -> None:
    node = await api.register()
    for model, path in (
        ({"id": ""}, "models.0.id"),
        ({"maxTokens": 5}, "models.0.id"),
        ({"id": "m", "maxTokens": 0}, "models.0.maxTokens"),
        ({"id": "m", "maxTokens": "many"}, "models.0.maxTokens"),
        ({"id": "m", "quantization": 4}, "models.0.quantization"),
        ({"id": "m", "vram": 4}, "models.0.vram"),
    ):
        answer = await declare(api, node, model)
        assert answer.status_code == 422
        assert [fault["path"] for fault in answer.json()["error"]["details"]["fields"]] == [path]
    missing = await api.http.put(f"/compute/models/{node}", json={})
    assert missing.json()["error"]["details"]["fields"][0]["path"] == "models"


async def test_declarations_resolve_on_reading_by_id_name_and_alias(api: Api) -> None:
    node = await api.register()
    await declare(api, node, {"id": "org/llama"}, {"id": "llama"}, {"id": "LLAMA"})
    assert set((await resolved(api, node)).values()) == {None}
    model = await api.add_model("org/llama", aliases=["llama"])
    assert await resolved(api, node) == {"org/llama": model, "llama": model, "LLAMA": None}
    await declare(api, node, {"id": model})
    assert await resolved(api, node) == {model: model}
    await api.http.delete(f"/passports/{model}")
    assert await resolved(api, node) == {model: None}


async def test_a_model_registered_later_binds_at_once(api: Api) -> None:
    node = await api.register()
    await declare(api, node, {"id": "later"})
    await api.beat(node)
    await api.add_model("later")
    shown = (await api.http.get("/models/later")).json()
    assert (shown["available"], shown["served"]) == (True, True)


async def test_an_ended_node_declares_nothing(api: Api) -> None:
    deregistered, revoked = await api.register("a"), await api.register("b")
    await api.http.post(f"/compute/deregister/{deregistered}")
    await api.http.delete(f"/passports/{revoked}")
    for node in (deregistered, revoked):
        for answer in (await declare(api, node), await api.http.get(f"/compute/models/{node}")):
            assert (answer.status_code, error_code(answer)) == (410, "NODE_DEREGISTERED")


async def events_of(api: Api, node: str) -> list[dict[str, Any]]:
    """The details of each event of a declaration, newest first."""
    answer = await api.http.get(f"/compute/events/{node}", params={"type": "models_declared"})
    return [event["details"] for event in answer.json()["events"]]


async def test_an_event_says_what_changed_and_stays_small(api: Api) -> None:
    """A thousand long ids in turns: counts, and the first few ids."""
    node = await api.register()
    await declare(api, node, {"id": "a"}, {"id": "b"})
    await declare(api, node, {"id": "b", "maxTokens": 5}, {"id": "c"})
    await declare(api, node, *({"id": f"{n:04}" + "x" * 196} for n in range(1000)))
    large, second, first = await events_of(api, node)
    assert first == {
        "count": 2,
        "addedCount": 2,
        "removedCount": 0,
        "changedCount": 0,
        "added": ["a", "b"],
        "removed": [],
    }
    assert second == {
        "count": 2,
        "addedCount": 1,
        "removedCount": 1,
        "changedCount": 1,
        "added": ["c"],
        "removed": ["a"],
    }
    assert (large["count"], large["addedCount"], large["removedCount"]) == (1000, 1000, 2)
    assert (len(large["added"]), large["removed"]) == (5, ["b", "c"])


async def test_the_same_declaration_again_records_nothing(api: Api) -> None:
    """An agent that restarts declares what it declared before."""
    node = await api.register()
    for _ in range(3):
        assert (await declare(api, node, *GUIDE)).status_code == 200
    assert len(await events_of(api, node)) == 1
    rows = (await api.http.get("/audit", params={"targetId": node})).json()["events"]
    assert [row["action"] for row in rows] == ["compute.declare", "passport.create"]
    assert list(await resolved(api, node)) == [model["id"] for model in GUIDE]
