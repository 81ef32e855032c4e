"""Every list: its envelope, its bounds, pages past its end, and its order."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from tests.api import Api, error_code


class List(NamedTuple):
    """A list: its path, its plural, and what its items are sorted by instead of the three names."""

    path: str
    plural: str
    sort_fields: dict[str, str]


PASSPORT_FIELDS = {"createdAt": "createdAt", "updatedAt": "updatedAt", "name": "name"}
LISTS = [
    List("/passports", "passports", PASSPORT_FIELDS),
    List("/passports?type=compute", "passports", PASSPORT_FIELDS),
    List("/compute", "nodes", PASSPORT_FIELDS),
    List("/models", "models", PASSPORT_FIELDS),
    List("/models?available=false", "models", PASSPORT_FIELDS),
    List("/keys", "keys", {"createdAt": "createdAt", "name": "name"}),
    List("/audit", "events", {"createdAt": "at", "updatedAt": "at", "name": "action"}),
    List("/compute/events", "events", {"createdAt": "at", "updatedAt": "at", "name": "type"}),
    List("/compute/events/{node}", "events", {"createdAt": "at", "updatedAt": "at", "name": "type"}),
]
NAMES = ["b", "B", "a", "ä", "_", "Z", "a b", "10", "9"]


async def fill(api: Api) -> str:
    """Give every list some items, whose order of change is not that of creation; return a node's id."""
    nodes = [await api.register(name) for name in NAMES]
    for name in NAMES:
        await api.add_model(f"model {name}")
        await api.new_key(f"owner {name}", ["compute"], name=f"key {name}")
    for node in (nodes[2], nodes[0]):
        await api.http.patch(f"/passports/{node}", json={"description": "changed"})
        await api.http.post(f"/compute/drain/{node}")
        await api.http.post(f"/compute/resume/{node}")
    return nodes[0]


async def read(api: Api, path: str, **query: Any) -> dict[str, Any]:
    """One page of a list."""
    answer = await api.http.get(path + ("&" if "?" in path else "?") + "&".join(f"{k}={v}" for k, v in query.items()))
    assert answer.status_code == 200, answer.text
    page: dict[str, Any] = answer.json()
    return page


def without_use(item: dict[str, Any]) -> dict[str, Any]:
    """Return an item without what the reads themselves change: when a key was used last."""
    return {name: value for name, value in item.items() if name != "lastUsedAt"}


async def test_every_list_pages_through_every_item_once(api: Api) -> None:
    node = await fill(api)
    for path, plural, _ in LISTS:
        where = path.format(node=node)
        whole = await read(api, where, perPage=100)
        assert sorted(whole) == sorted([plural, "pagination"])
        items = whole[plural]
        total = len(items)
        assert total >= 4
        assert whole["pagination"] == {"total": total, "page": 1, "perPage": 100, "totalPages": 1}
        assert (await read(api, where))["pagination"]["perPage"] == 20
        paged = []
        for number in range(1, -(-total // 2) + 1):
            page = await read(api, where, page=number, perPage=2)
            assert page["pagination"] == {"total": total, "page": number, "perPage": 2, "totalPages": -(-total // 2)}
            paged += page[plural]
        assert [item["id"] for item in paged] == [item["id"] for item in items]
        past = await read(api, where, page=number + 1, perPage=2)
        assert (past[plural], past["pagination"]["total"]) == ([], total)
        assert (await read(api, where, page=1_000_000_000, perPage=100))[plural] == []


async def test_every_list_is_sorted_as_asked_and_newest_first_unless_asked(api: Api) -> None:
    node = await fill(api)
    for path, plural, fields in LISTS:
        where = path.format(node=node)
        newest = (await read(api, where, perPage=100))[plural]
        assert newest == (await read(api, where, perPage=100, sortBy="createdAt", sortOrder="desc"))[plural]
        for sort_by, field in fields.items():
            for order in ("asc", "desc"):
                items = (await read(api, where, perPage=100, sortBy=sort_by, sortOrder=order))[plural]
                values = [item[field] for item in items]
                assert values == sorted(values, reverse=order == "desc"), (where, sort_by, order)
                assert {item["id"] for item in items} == {item["id"] for item in newest}
            again = (await read(api, where, perPage=100, sortBy=sort_by))[plural]
            assert list(map(without_use, items)) == list(map(without_use, again))


async def test_nodes_and_models_are_listed_worst_first(api: Api) -> None:
    """By state, equally bad ones by name, so that no row moves while no state changes."""
    for name in ("b-well", "a-well"):
        await api.beat(await api.register(name, {"runtimes": ["vllm"]}), availableModels=["served"])
    await api.beat(await api.register("drains"), status="draining")
    await api.register("never-heard")
    await api.add_model("served")
    await api.add_model("too-large", minVramGb=9999)
    await api.add_model("not-served")
    for order, reverse in (("desc", False), ("asc", True)):
        nodes = [node["name"] for node in (await read(api, "/compute", sortBy="severity", sortOrder=order))["nodes"]]
        states = [["never-heard"], ["drains"], ["a-well", "b-well"]]
        assert nodes == [name for state in (states[::-1] if reverse else states) for name in state]
        models = [each["name"] for each in (await read(api, "/models", sortBy="severity", sortOrder=order))["models"]]
        expected = ["too-large", "not-served", "served"]
        assert models == (expected[::-1] if reverse else expected)


async def test_events_of_all_nodes_are_found_by_what_they_are(api: Api) -> None:
    """By node, type, time and owner; a provider's are its own, also of a node that has ended."""
    acme, other = await api.new_key("acme", ["compute"]), await api.new_key("other", ["compute"])
    node, ended = await acme.register("one"), await acme.register("two")
    await other.register("three")
    await acme.http.post(f"/compute/drain/{node}")
    await acme.http.post(f"/compute/deregister/{ended}")

    async def found(caller: Api, query: str) -> list[tuple[str, str]]:
        events = (await read(caller, f"/compute/events?sortOrder=asc&{query}"))["events"]
        return [(event["name"], event["type"]) for event in events]

    registered = [(name, "registered") for name in ("one", "two", "three")]
    drain = [("one", "draining")]
    assert await found(api, "type=registered") == registered
    assert await found(acme, "type=registered") == registered[:2]
    assert await found(api, f"passportId={node}") == registered[:1] + drain
    assert await found(api, "owner=other") == registered[2:]
    assert ("two", "deregistered") in await found(acme, "")
    assert await found(acme, "until=2020-01-01T00:00:00Z&since=2019-01-01T00:00:00Z") == []
    assert await found(acme, "passportId=nonsense") == []
    assert await found(acme, f"passportId={await other.register('four')}") == []
    answer = await acme.http.get("/compute/events?owner=other")
    assert (answer.status_code, error_code(answer)) == (403, "FORBIDDEN")


async def test_keys_are_sorted_by_when_they_were_last_rotated(api: Api) -> None:
    await fill(api)
    keys = (await read(api, "/keys", sortBy="createdAt", sortOrder="asc"))["keys"]
    await api.http.post(f"/keys/{keys[3]['id']}/rotate")
    assert (await read(api, "/keys", sortBy="updatedAt"))["keys"][0]["id"] == keys[3]["id"]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("page=0", "page"),
        ("page=-1", "page"),
        ("page=1.5", "page"),
        ("page=", "page"),
        ("page=99999999999999999999", "page"),
        ("perPage=0", "perPage"),
        ("perPage=101", "perPage"),
        ("perPage=all", "perPage"),
        ("sortBy=id", "sortBy"),
        ("sortBy=created_at", "sortBy"),
        ("sortOrder=up", "sortOrder"),
    ],
)
async def test_a_page_that_cannot_be_is_refused_by_every_list(api: Api, query: str, field: str) -> None:
    node = await api.register()
    for path, _, _ in LISTS:
        where = path.format(node=node)
        answer = await api.http.get(where + ("&" if "?" in where else "?") + query)
        assert (answer.status_code, error_code(answer)) == (422, "INVALID_REQUEST"), where
        assert [fault["path"] for fault in answer.json()["error"]["details"]["fields"]] == [f"query.{field}"]


async def test_an_empty_list_has_no_pages(api: Api) -> None:
    for path, plural in (("/passports", "passports"), ("/compute", "nodes"), ("/models", "models")):
        pagination = {"total": 0, "page": 1, "perPage": 20, "totalPages": 0}
        assert await read(api, path) == {plural: [], "pagination": pagination}


async def test_nodes_are_found_by_what_they_are_and_serve(api: Api) -> None:
    node = await api.register("rack-7", {"gpu": "NVIDIA H200", "vram": "141GB", "region": "eu", "runtimes": ["TGI"]})
    await api.register("other", {"region": None})
    await api.beat(node, availableModels=["reported"])
    await api.http.put(f"/compute/models/{node}", json={"models": [{"id": "alias"}]})
    model = await api.add_model("org/m", aliases=["alias"])
    matching = ["status=healthy", "region=eu", "runtime=tgi", "minVram=141", "gpu=h200", "search=RACK", "owner=admin"]
    matching += ["model=reported", "model=alias", "model=org/m", f"model={model}"]
    for query in matching:
        assert node in {found["id"] for found in (await read(api, f"/compute?{query}"))["nodes"]}, query
    missing = ["status=draining", "region=EU", "runtime=vllm", "minVram=141.5", "gpu=a100", "search=rack%25"]
    for query in [*missing, "owner=acme", "model=nothing", "status=deregistered"]:
        page = await read(api, f"/compute?{query}")
        assert node not in {found["id"] for found in page["nodes"]}, query
        assert page["pagination"]["total"] == len(page["nodes"])


async def test_passports_are_found_by_type_status_tags_owner_and_text(api: Api) -> None:
    body = {"name": "one_1", "type": "agent", "tags": ["a", "b"], "description": "50% done", "owner": "acme"}
    made = (await api.http.post("/passports", json=body)).json()["id"]
    await api.http.post("/passports", json={"name": "two", "type": "tool"})
    matching = ["type=agent", "status=active&type=agent", "tags=a", "tags=a,b", "owner=acme"]
    for query in [*matching, "search=ONE", "search=e_1", "search=50%25"]:
        assert [found["id"] for found in (await read(api, f"/passports?{query}"))["passports"]] == [made], query
    for query in ("type=model", "status=revoked", "tags=a,c", "owner=none", "search=e%25", "search=on__"):
        assert (await read(api, f"/passports?{query}"))["pagination"]["total"] == 0, query
    for query in ("type=robot", "status=asleep"):
        assert (await api.http.get(f"/passports?{query}")).status_code == 422


async def test_nodes_can_be_ordered_by_what_they_do(api: Api) -> None:
    """Load, queue, requests in flight and heartbeat. A node without a heartbeat is last, in both directions."""
    nodes = [await api.register(f"node {number}") for number in range(4)]
    for number, node in enumerate(nodes[:3]):
        await api.beat(node, load=(0.5, 0.9, 0.1)[number], queueDepth=(2, 0, 7)[number])
    for sort_by, highest_first in (("load", (1, 0, 2)), ("queueDepth", (2, 0, 1)), ("heartbeatAt", (2, 1, 0))):
        for order, expected in (("desc", highest_first), ("asc", highest_first[::-1])):
            found = await read(api, "/compute", sortBy=sort_by, sortOrder=order)
            assert [node["id"] for node in found["nodes"]] == [nodes[place] for place in (*expected, 3)], sort_by
    by_id = [node["id"] for node in (await read(api, "/compute", sortBy="inFlight", sortOrder="asc"))["nodes"]]
    assert by_id == sorted(nodes)
    assert (await api.http.get("/models?sortBy=load")).status_code == 422


async def test_a_node_or_a_model_is_found_by_the_beginning_of_its_id(api: Api) -> None:
    """Of at least its first block; a shorter text is probably part of a name."""
    node, model = await api.register(), await api.add_model("m")
    for where, plural, wanted in (("/compute", "nodes", node), ("/models", "models", model)):
        for length, number in ((36, 1), (8, 1), (7, 0)):
            found = await read(api, where, search=wanted[:length].upper())
            assert len(found[plural]) == number, (where, length)
