"""Drain and resume, and when a drained node is drained everywhere."""

from __future__ import annotations

from typing import Any

from tests.api import Api, error_code
from tests.other_replicas import (
    APPLIED_EVERYTHING,
    APPLIED_NOTHING,
    add_lease,
    change_lease,
    run_sql,
    until,
)


async def drain(api: Api, node: str) -> Any:
    """Drain the node; return what was answered."""
    answer = await api.http.post(f"/compute/drain/{node}")
    assert answer.status_code == 202, answer.text
    return answer.json()


async def until_drained(api: Api, node: str) -> None:
    """Wait until the node is drained."""

    async def is_drained() -> bool:
        return bool((await api.health(node))["drained"])

    await until(is_drained)


async def test_a_drain_is_accepted_and_a_second_one_is_answered_the_same(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    first = await drain(api, node)
    assert first == {"passportId": node, "status": "draining", "inFlight": 0, "drained": True}
    assert await drain(api, node) == first
    events = (await api.http.get(f"/compute/events/{node}?type=draining")).json()
    assert events["pagination"]["total"] == 1


async def test_a_draining_node_is_available_for_nothing_and_a_resumed_one_again(api: Api) -> None:
    node = await api.register(metadata={"runtimes": ["vllm"]})
    await api.beat(node)
    await api.add_model("m")
    for call, status, available in (("drain", "draining", False), ("resume", "healthy", True)):
        await api.http.post(f"/compute/{call}/{node}")
        assert (await api.health(node))["status"] == status
        assert (await api.http.get("/models/m")).json()["available"] is available


async def test_resume_answers_the_health_whether_or_not_the_node_was_draining(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    await drain(api, node)
    for _ in range(2):
        resumed = await api.http.post(f"/compute/resume/{node}")
        assert resumed.status_code == 200
        health = resumed.json()
        assert sorted(health) == sorted(await api.health(node))
        assert (health["passportId"], health["status"], health["drained"]) == (node, "healthy", False)
    assert (await api.http.get(f"/compute/events/{node}?type=resumed")).json()["pagination"]["total"] == 1


async def test_a_drain_outlives_silence_and_a_new_boot(api: Api) -> None:
    node = await api.register()
    await api.beat(node, bootId="one", sequence=1)
    await drain(api, node)
    assert (await api.beat(node, bootId="two", sequence=1)).json()["status"] == "draining"


async def test_resume_does_not_end_a_drain_that_the_node_reports(api: Api) -> None:
    node = await api.register()
    await api.beat(node, status="draining")
    await drain(api, node)
    assert (await api.http.post(f"/compute/resume/{node}")).json()["status"] == "draining"
    assert (await api.beat(node)).json()["status"] == "healthy"


async def test_requests_in_flight_here_hold_drained_back(api: Api) -> None:
    node = await api.register()
    for _ in range(3):
        api.replica.fleet.replicas.begin(node)
    answer = await drain(api, node)
    assert (answer["inFlight"], answer["drained"]) == (3, False)
    for _ in range(3):
        api.replica.fleet.replicas.end(node)
    assert await drain(api, node) == {**answer, "inFlight": 0, "drained": True}


async def test_a_replica_that_has_not_applied_the_drain_holds_drained_back(api: Api) -> None:
    node = await api.register()
    other = await add_lease(api, applied=APPLIED_NOTHING)
    assert (await drain(api, node))["drained"] is False
    await change_lease(api, other, applied=APPLIED_EVERYTHING, in_flight={node: 2})

    async def sees_two_in_flight() -> bool:
        return bool((await api.health(node))["inFlight"] == 2)

    await until(sees_two_in_flight)
    assert (await api.health(node))["drained"] is False
    await change_lease(api, other, applied=APPLIED_EVERYTHING)
    await until_drained(api, node)


async def test_a_replica_whose_lease_ran_out_holds_nothing_back(api: Api) -> None:
    node = await api.register()
    other = await add_lease(api, applied=APPLIED_NOTHING, in_flight={node: 1})
    assert (await drain(api, node))["drained"] is False
    await run_sql(api, "UPDATE replicas SET seen_at = clock_timestamp() - interval '11 seconds' WHERE id = $1", other)
    await until_drained(api, node)


async def test_a_node_that_does_not_drain_is_not_drained(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    assert (await api.health(node))["drained"] is False
    await drain(api, node)
    await api.http.post(f"/compute/resume/{node}")
    assert (await api.health(node))["drained"] is False


async def test_an_ended_node_is_neither_drained_nor_resumed(api: Api) -> None:
    deregistered, revoked = await api.register("a"), await api.register("b")
    await api.http.post(f"/compute/deregister/{deregistered}")
    await api.http.delete(f"/passports/{revoked}")
    for node in (deregistered, revoked):
        for call in ("drain", "resume"):
            answer = await api.http.post(f"/compute/{call}/{node}")
            assert (answer.status_code, error_code(answer)) == (410, "NODE_DEREGISTERED")


async def test_what_happened_to_a_node_is_told_by_its_events(api: Api) -> None:
    node = await api.register()
    await api.beat(node, bootId="one", sequence=1)
    await api.beat(node, bootId="two", sequence=1)
    await api.http.put(f"/compute/models/{node}", json={"models": [{"id": "m"}]})
    await drain(api, node)
    await api.replica.sweep.record(await api.replica.sweep.find_transitions())
    await api.http.post(f"/compute/resume/{node}")
    await api.http.patch(f"/passports/{node}", json={"description": "x"})
    await api.http.post(f"/compute/deregister/{node}")
    events = (await api.http.get(f"/compute/events/{node}?perPage=100")).json()["events"]
    assert all(sorted(event) == sorted(["id", "passportId", "type", "at", "reason", "details"]) for event in events)
    assert {event["passportId"] for event in events} == {node}
    told = {event["type"] for event in events}
    assert {"registered", "restarted", "models_declared", "draining", "drained", "resumed", "updated"} <= told
    assert events[0]["type"] == "deregistered"
    since = events[3]["at"]
    late = (await api.http.get(f"/compute/events/{node}", params={"since": since, "perPage": 100})).json()
    assert 4 <= late["pagination"]["total"] < len(events)
    assert all(event["at"] >= since for event in late["events"])
