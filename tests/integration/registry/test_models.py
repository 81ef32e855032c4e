"""GET /models: the tri-state filter, exact totals, ids, names with slashes, aliases, one namespace."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api import Api, error_code

PASSPORT = [
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


async def names(api: Api, query: str = "") -> set[str]:
    """The names of a list of models, whose total counts them exactly."""
    answer = await api.http.get(f"/models?perPage=100&{query}")
    assert answer.status_code == 200, answer.text
    found = {model["name"] for model in answer.json()["models"]}
    assert answer.json()["pagination"]["total"] == len(found)
    return found


async def test_the_filter_has_three_states_and_applies_before_paging(api: Api) -> None:
    node = await api.register(metadata={"runtimes": ["vllm"], "vram": "80GB"})
    await api.beat(node)
    fits = {f"fits-{number}" for number in range(7)}
    misses = {f"too-large-{number}" for number in range(5)}
    for name in sorted(fits):
        await api.add_model(name, minVramGb=40)
    for name in sorted(misses):
        await api.add_model(name, minVramGb=400)
    await api.add_model("behind-an-api", "api")
    assert await names(api, "available=true") == fits | {"behind-an-api"}
    assert await names(api, "available=false") == misses
    assert await names(api) == fits | misses | {"behind-an-api"}
    page = (await api.http.get("/models?available=true&perPage=3&page=3")).json()
    assert page["pagination"] == {"total": 8, "page": 3, "perPage": 3, "totalPages": 3}
    assert len(page["models"]) == 2
    assert all(model["available"] is True for model in page["models"])


async def test_any_other_value_of_available_is_refused(api: Api) -> None:
    for value in ("True", "1", "yes", "", "null", "true,false"):
        refused = await api.http.get("/models", params={"available": value})
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
        assert refused.json()["error"]["details"]["fields"][0]["path"] == "query.available"


async def test_a_model_is_a_passport_with_available_and_served(api: Api) -> None:
    model = await api.add_model("m")
    shown = (await api.http.get(f"/models/{model}")).json()
    assert sorted(shown) == sorted([*PASSPORT, "available", "served"])
    passport = (await api.http.get(f"/passports/{model}")).json()
    assert {key: shown[key] for key in PASSPORT} == passport
    assert (await api.http.get("/models")).json()["models"] == [shown]


async def test_available_asks_whether_it_could_run_and_served_whether_it_can_be_reached(api: Api) -> None:
    node = await api.register(metadata={"runtimes": ["vllm"]})
    await api.beat(node)
    await api.add_model("m", aliases=["alias"])
    await api.add_model("behind-an-api", "api")

    async def seen(name: str = "m") -> tuple[bool, bool]:
        model = (await api.http.get(f"/models/{name}")).json()
        return model["available"], model["served"]

    assert await seen("behind-an-api") == (True, True)
    assert await seen() == (True, False)
    await api.beat(node, availableModels=["alias"])
    assert await seen() == (True, True)
    await api.beat(node, availableModels=["another"])
    assert await seen() == (True, False)
    await api.http.put(f"/compute/models/{node}", json={"models": [{"id": "m"}]})
    assert await seen() == (True, True)
    await api.beat(node, status="unhealthy")
    assert await seen() == (False, False)


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("format=gguf", {"small"}),
        ("format=api", {"hosted"}),
        ("runtime=ollama", {"small"}),
        ("runtime=llama.cpp", {"small"}),
        ("runtime=llamacpp", {"small"}),
        ("runtime=vllm", {"large", "small"}),
        ("runtime=tgi", set()),
        ("maxVram=8", {"small", "hosted"}),
        ("maxVram=40", {"large", "small", "hosted"}),
        ("owner=acme", {"large"}),
        ("tags=chat", {"large", "small"}),
        ("tags=chat,new", {"small"}),
        ("tags=chat&tags=new", {"small"}),
        ("search=LARG", {"large"}),
        ("search=for+laptops", {"small"}),
        ("search=%25", set()),
        ("search=chat", set()),
        ("format=gguf&owner=acme", set()),
        ("format=safetensors&available=false", {"large"}),
    ],
)
async def test_filters_narrow(api: Api, query: str, found: set[str]) -> None:
    await add(api, "large", {"format": "safetensors", "runtimes": ["vllm"], "minVramGb": 40}, ["chat"], owner="acme")
    await add(api, "small", {"format": "gguf", "minVramGb": 8}, ["chat", "new"], description="for laptops")
    await add(api, "hosted", {"format": "api"}, [])
    assert await names(api, query) == found


async def add(api: Api, name: str, metadata: dict[str, Any], tags: list[str], **fields: Any) -> None:
    """Register a model with what filters look at."""
    body = {"name": name, "type": "model", "metadata": metadata, "tags": tags, **fields}
    assert (await api.http.post("/passports", json=body)).status_code == 201


async def test_a_filter_that_cannot_be_is_refused(api: Api) -> None:
    for query in ("format=onnx", "maxVram=-1", "maxVram=nan", "maxVram=much", "owner=%00", "search=%00"):
        refused = await api.http.get(f"/models?{query}")
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST"), query
        assert refused.json()["error"]["details"]["fields"][0]["path"] == f"query.{query.partition('=')[0]}"


async def test_a_name_with_slashes_is_found_raw_and_encoded(api: Api) -> None:
    for name in ("meta-llama/Llama-3-70B", "a/b/c", "availability", "availability/x", "models", "日本/語 model", "50%"):
        model = await api.add_model(name)
        raw = name.replace("%", "%25")
        for path in (raw, raw.replace("/", "%2F"), raw.replace("/", "%2f")):
            assert (await api.http.get(f"/models/{path}")).json()["id"] == model, path
            verdict = await api.http.get(f"/models/{path}/availability")
            assert verdict.json()["available"] is False, path


async def test_ids_resolve_before_names_and_names_are_case_sensitive(api: Api) -> None:
    first = await api.add_model("first", aliases=["other name"])
    second = await api.add_model(first)
    for path, model in ((first, first), (second, second), ("first", first), ("other%20name", first)):
        assert (await api.http.get(f"/models/{path}")).json()["id"] == model
    for path in ("First", "other name ", "", "nothing", "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11", "x/y/z"):
        for suffix in ("", "/availability"):
            answer = await api.http.get(f"/models/{path}{suffix}")
            if path:
                assert (answer.status_code, error_code(answer)) == (404, "MODEL_NOT_FOUND"), path + suffix


async def test_names_and_aliases_of_active_models_are_one_namespace_over_all_owners(api: Api) -> None:
    acme = await api.new_key("acme", ["passports:write", "passports:read"])
    first = await api.add_model("a", aliases=["b", "a"])
    for name, aliases in (("b", []), ("c", ["a"]), ("c", ["d", "b"]), ("a", [])):
        body = {"name": name, "type": "model", "metadata": {"format": "gguf", "aliases": aliases}}
        refused = await acme.http.post("/passports", json=body)
        assert (refused.status_code, error_code(refused)) == (409, "MODEL_NAME_TAKEN")
        assert refused.json()["error"]["details"] == {"name": "a" if "a" in (name, *aliases) else "b"}
    assert (await acme.add_model("B")) != first
    assert error_code(await api.http.get("/models/c")) == "MODEL_NOT_FOUND"


async def test_a_model_that_is_not_active_gives_its_names_up(api: Api) -> None:
    first = await api.add_model("a", aliases=["b"])
    await api.http.patch(f"/passports/{first}", json={"status": "deprecated"})
    assert error_code(await api.http.get("/models/a")) == "MODEL_NOT_FOUND"
    assert (await api.http.get(f"/models/{first}")).json()["status"] == "deprecated"
    second = await api.add_model("b")
    back = await api.http.patch(f"/passports/{first}", json={"status": "active"})
    assert (back.status_code, error_code(back)) == (409, "MODEL_NAME_TAKEN")
    await api.http.delete(f"/passports/{second}")
    assert error_code(await api.http.get(f"/models/{second}")) == "MODEL_NOT_FOUND"
    assert (await api.http.patch(f"/passports/{first}", json={"status": "active"})).status_code == 200
    assert (await api.http.get("/models/b")).json()["id"] == first


async def test_a_renamed_model_is_found_by_its_new_names_alone(api: Api) -> None:
    model = await api.add_model("old", aliases=["old-alias"])
    await api.http.patch(f"/passports/{model}", json={"name": "new", "metadata": {"aliases": ["new-alias"]}})
    for name in ("new", "new-alias"):
        assert (await api.http.get(f"/models/{name}")).json()["id"] == model
    for name in ("old", "old-alias"):
        assert error_code(await api.http.get(f"/models/{name}")) == "MODEL_NOT_FOUND"
    other = await api.add_model("old")
    taken = await api.http.patch(f"/passports/{other}", json={"metadata": {"aliases": ["new-alias"]}})
    assert error_code(taken) == "MODEL_NAME_TAKEN"
    assert (await api.http.get("/models/old")).json()["id"] == other
