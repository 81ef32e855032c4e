"""POST /compute/deregister/{id}: final for that passport, and never in the middle of a request unless forced."""

from __future__ import annotations

import asyncio

from tests.api import Api, error_code
from tests.other_replicas import APPLIED_EVERYTHING, add_lease, change_lease, until


async def test_a_deregistered_node_is_gone_for_good_and_again_is_the_same(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    for _ in range(2):
        answer = await api.http.post(f"/compute/deregister/{node}")
        assert answer.status_code == 200
        assert answer.json() == {"passportId": node, "status": "deregistered"}
    for refused in (
        await api.beat(node),
        await api.http.post(f"/compute/resume/{node}"),
        await api.http.get(f"/compute/health/{node}"),
    ):
        assert (refused.status_code, error_code(refused)) == (410, "NODE_DEREGISTERED")
        assert refused.json()["error"]["details"] == {"passportId": node}
    assert (await api.http.get("/compute")).json()["nodes"] == []
    (listed,) = (await api.http.get("/compute?status=deregistered")).json()["nodes"]
    assert (listed["id"], listed["health"]["status"]) == (node, "deregistered")


async def test_its_passport_and_events_stay_readable(api: Api) -> None:
    node = await api.register()
    before = (await api.http.get(f"/passports/{node}")).json()
    await api.http.post(f"/compute/deregister/{node}")
    after = (await api.http.get(f"/passports/{node}")).json()
    assert after == {**before, "updatedAt": after["updatedAt"]}
    events = (await api.http.get(f"/compute/events/{node}")).json()["events"]
    assert [event["type"] for event in events] == ["deregistered", "draining", "registered"]
    assert events[1]["reason"] == "deregistering"


async def test_its_name_can_be_registered_again_and_gets_a_new_id(api: Api) -> None:
    first = await api.register("gpu")
    await api.http.post(f"/compute/deregister/{first}")
    second = await api.register("gpu")
    assert second != first
    assert (await api.beat(second)).status_code == 200
    assert (await api.beat(first)).status_code == 410
    assert (await api.http.get("/compute?search=gpu")).json()["pagination"]["total"] == 1


async def test_requests_in_flight_here_or_elsewhere_refuse_it(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.own_in_flight[node] = 1
    await add_lease(api, in_flight={node: 2})
    refused = await api.http.post(f"/compute/deregister/{node}")
    assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
    assert refused.json()["error"]["details"] == {"inFlight": 3}
    assert (await api.beat(node)).status_code == 200


async def test_force_does_not_wait(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.own_in_flight[node] = 1
    forced = await api.http.post(f"/compute/deregister/{node}?force=true")
    assert (forced.status_code, forced.json()["status"]) == (200, "deregistered")
    again = await api.http.post(f"/compute/deregister/{node}")
    assert (again.status_code, again.json()) == (200, forced.json())


async def test_wait_seconds_waits_for_what_runs_and_no_longer(api: Api) -> None:
    node = await api.register()
    other = await add_lease(api, in_flight={node: 1})
    waiting = asyncio.create_task(api.http.post(f"/compute/deregister/{node}?waitSeconds=20"))

    async def has_begun_to_wait() -> bool:
        return bool((await api.health(node))["inFlight"] == 1 and not waiting.done())

    await until(has_begun_to_wait)
    await change_lease(api, other, applied=APPLIED_EVERYTHING)
    async with asyncio.timeout(5):
        answer = await waiting
    assert (answer.status_code, answer.json()["status"]) == (200, "deregistered")


async def test_wait_seconds_that_pass_in_vain_refuse_it(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.own_in_flight[node] = 1
    refused = await api.http.post(f"/compute/deregister/{node}?waitSeconds=0.15")
    assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
    assert (await api.beat(node)).status_code == 200


async def test_what_is_no_wait_or_no_force_is_refused(api: Api) -> None:
    node = await api.register()
    for query in ("waitSeconds=-1", "waitSeconds=soon", "waitSeconds=nan", "waitSeconds=1e999", "force=perhaps"):
        refused = await api.http.post(f"/compute/deregister/{node}?{query}")
        assert (refused.status_code, error_code(refused)) == (422, "INVALID_REQUEST")
        (fault,) = refused.json()["error"]["details"]["fields"]
        assert fault["path"] == f"query.{query.partition('=')[0]}"
    assert (await api.health(node))["status"] == "unhealthy"
