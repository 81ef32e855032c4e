"""The overview of the fleet: its counts equal those of the lists, and an unchanged one is not sent twice."""

from __future__ import annotations

import asyncio
from typing import Any

from lucid_compute.accounting.overview import CACHE_SECONDS
from lucid_compute.postgres.database import connect
from tests.api import Api, error_code
from tests.other_replicas import let_pass, until

VRAM = {"vram": "80GB", "runtimes": ["vllm"]}


async def overview(api: Api, query: str = "") -> dict[str, Any]:
    """What the caller sees."""
    answer = await api.http.get(f"/compute/overview{query}")
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def total(api: Api, path: str) -> int:
    """Return how long a list is."""
    return int((await api.http.get(path)).json()["pagination"]["total"])


async def test_counts_are_those_of_the_lists(api: Api) -> None:
    """Healthy, silent, draining and ended nodes; models that can be run, be reached, or neither."""
    serving, silent, draining, ended = [await api.register(f"node {number}", VRAM) for number in range(4)]
    for node in (serving, draining, ended):
        await api.beat(node, availableModels=["served"])
    await api.http.post(f"/compute/drain/{draining}")
    await api.http.post(f"/compute/deregister/{ended}")
    await api.add_model("served")
    await api.add_model("available")
    await api.add_model("too large", minVramGb=2000)
    await api.add_model("hosted", "api")
    shown = await overview(api)
    for status in ("healthy", "unhealthy", "draining"):
        assert shown["nodes"][status] == await total(api, f"/compute?status={status}") == 1
    assert shown["nodes"]["total"] == await total(api, "/compute") == 3
    assert shown["nodes"]["fresh"] == 2
    assert shown["models"] == {"total": 4, "available": await total(api, "/models?available=true"), "served": 2}
    assert shown["models"]["available"] == 3
    assert shown["owner"] is None
    assert shown["inFlight"] == 0
    assert shown["outageSince"] is None
    assert shown["lastHour"] == {
        "requests": 0,
        "completed": 0,
        "failed": 0,
        "errorRate": None,
        "latencyP50Ms": None,
        "latencyP95Ms": None,
        "tokensIn": 0,
        "tokensOut": 0,
        "revenueUsd": "0",
    }
    assert silent


async def test_a_provider_sees_its_own_nodes_and_every_model(api: Api) -> None:
    """An admin may look at an owner's; nobody else may look at another's."""
    await api.register("the admin's")
    acme = await api.new_key("acme", ["compute"])
    await acme.register("acme's")
    await api.add_model("a model")
    assert (await overview(acme))["nodes"]["total"] == 1
    assert (await overview(acme))["owner"] == "acme"
    assert (await overview(acme))["models"]["total"] == 1
    assert (await overview(api))["nodes"]["total"] == 2
    assert await overview(api, "?owner=acme") == await overview(acme)
    refused = await acme.http.get("/compute/overview?owner=globex")
    assert (refused.status_code, error_code(refused)) == (403, "FORBIDDEN")


async def test_a_key_without_the_scope_is_refused(api: Api) -> None:
    """As everywhere below /compute."""
    consumer = await api.new_key("consumer", ["inference:run"])
    assert (await consumer.http.get("/compute/overview")).status_code == 403
    assert (await api.with_key(None).http.get("/compute/overview")).status_code == 401


async def test_an_unchanged_overview_gives_304_without_a_body(api: Api) -> None:
    """A client that polls gets a few bytes while nothing changes, and each change at once."""
    node = await api.register()
    etag = (await api.http.get("/compute/overview")).headers["etag"]
    again = await api.http.get("/compute/overview", headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (304, b"")
    await api.beat(node)
    changed = await api.http.get("/compute/overview", headers={"If-None-Match": etag})
    assert changed.status_code == 200
    assert changed.json()["nodes"]["healthy"] == 1
    assert changed.headers["etag"] != etag


async def test_many_clients_cost_one_computation(api: Api) -> None:
    """Requests within a second get the same overview, but a change of the fleet is in the next one anyway."""
    node = await api.register("the node", VRAM)
    await api.replica.feed.catch_up()
    glances = await asyncio.gather(*(api.replica.overviews.get(None) for _ in range(20)))
    assert await api.replica.overviews.get(None) is glances[0]
    assert {id(glance) for glance in glances} == {id(glances[0])}
    assert await api.replica.overviews.get("acme") is not glances[0]
    for change, counts in (
        (api.beat(node), {"healthy": 1, "unhealthy": 0, "draining": 0}),
        (api.http.post(f"/compute/drain/{node}"), {"healthy": 0, "unhealthy": 0, "draining": 1}),
        (api.http.post(f"/compute/resume/{node}"), {"healthy": 1, "unhealthy": 0, "draining": 0}),
        (api.beat(node, status="unhealthy"), {"healthy": 0, "unhealthy": 1, "draining": 0}),
        (api.http.post(f"/compute/deregister/{node}"), {"healthy": 0, "unhealthy": 0, "draining": 0}),
    ):
        await change
        assert counts.items() <= (await overview(api))["nodes"].items()
    await api.add_model("a model")
    assert (await overview(api))["models"]["total"] == 1


async def test_a_node_that_comes_back_is_counted_at_once(api: Api) -> None:
    """Its heartbeat says what the one before said, and yet it changes the count; its silence shows within a second."""
    node = await api.register()
    await api.beat(node)
    assert (await overview(api))["nodes"]["healthy"] == 1
    await let_pass(api, node, 180)

    async def is_seen() -> bool:
        return bool((await overview(api))["nodes"]["unhealthy"])

    await until(is_seen)
    await api.beat(node)
    assert (await overview(api))["nodes"]["healthy"] == 1


async def test_the_last_hours_totals_are_those_of_the_records(api: Api) -> None:
    """The same figures as `GET /compute/metrics` of the last hour."""
    asked = await api.http.get("/compute/metrics?from=-1h&series=requests,tokensOut,revenueUsd,latencyP95Ms")
    totals = asked.json()["totals"]
    hour = (await overview(api))["lastHour"]
    assert {name: hour[name] for name in totals} == totals


async def test_the_counts_are_available_while_the_database_hangs(api: Api, database_url: str) -> None:
    """Counts come from memory; only the totals are unknown then."""
    await api.beat(await api.register())
    connection = await connect(database_url, application="lucid tests")
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE job_minutes IN ACCESS EXCLUSIVE MODE")
            shown = await overview(api)
    finally:
        await connection.close()
    assert shown["nodes"]["healthy"] == 1
    assert shown["lastHour"] is None
    await asyncio.sleep(CACHE_SECONDS)
    assert (await overview(api))["lastHour"] is not None
