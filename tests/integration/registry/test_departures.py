"""Nodes that are deregistered or revoked while requests run, here and on other replicas."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from lucid_compute.errors import RequestsInFlight
from lucid_compute.postgres.database import connect
from lucid_compute.registry.departures import SETTLING_SECONDS, Departure, Departures, Drain
from lucid_compute.registry.domain.identity import SYSTEM
from lucid_compute.registry.fleet.fleet import Lifecycle
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, error_code, open_api
from tests.other_replicas import (
    APPLIED_EVERYTHING,
    APPLIED_NOTHING,
    add_lease,
    change_lease,
    run_sql,
    until,
)

WAYS = ("deregister", "delete", "patch")


async def leave(api: Api, node: str, way: str = "deregister", query: str = "") -> httpx.Response:
    """End the node, in one of the three ways."""
    if way == "deregister":
        return await api.http.post(f"/compute/deregister/{node}{query}")
    if way == "delete":
        return await api.http.delete(f"/passports/{node}")
    return await api.http.patch(f"/passports/{node}", json={"status": "revoked"})


@asynccontextmanager
async def two_replicas(api: Api, database_url: str) -> AsyncIterator[Api]:
    """The other one of two replicas that know of each other."""
    async with open_api(database_url, api.replica.settings) as other:
        for one in (api, other):
            await until_true(lambda one=one: one.replica.fleet.replicas.count() == 2)
        yield other


async def until_true(holds: Any) -> None:
    """Wait until `holds` returns true."""

    async def is_so() -> bool:
        return bool(holds())

    await until(is_so)


async def until_known(api: Api, node: str) -> None:
    """Wait until the replica has the node in its fleet."""
    await until_true(lambda: api.replica.fleet.find_node(node) is not None)


def is_draining(api: Api, node: str) -> bool:
    """Return whether the replica starts no request on the node."""
    return api.replica.fleet.get_node(node, owner=None).state.is_draining


async def told(api: Api, node: str) -> list[tuple[str, str | None]]:
    """Return the node's events, oldest first, with their reasons."""
    events = (await api.http.get(f"/compute/events/{node}")).json()["events"]
    return [(event["type"], event["reason"]) for event in reversed(events)]


@asynccontextmanager
async def renewing(api: Api, replica_id: str, **lease: Any) -> AsyncIterator[None]:
    """Let the other replica renew its lease again and again, unchanged."""

    async def renew() -> None:
        while True:
            await change_lease(api, replica_id, **lease)
            await asyncio.sleep(0.2)

    task = asyncio.create_task(renew())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@asynccontextmanager
async def changing(api: Api, *statements: str, node: str) -> AsyncIterator[None]:
    """Let another replica change the node in a transaction that is committed when the block ends."""
    connection = await connect(api.replica.database.url, application="lucid tests")
    try:
        async with connection.transaction():
            for statement in statements:
                await connection.execute(statement, node)
            yield
    finally:
        await connection.close()


async def until_it_waits_for_a_row(api: Api) -> None:
    """Wait until a transaction of the replica waits for a lock that `changing` holds."""

    async def is_waiting() -> bool:
        waiting = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
        return bool(await run_sql(api, waiting))

    await until(is_waiting)


async def leave_and_be_overtaken(api: Api, node: str, *statements: str) -> httpx.Response:
    """Let the node go, while another replica changes it just before the last transaction of its departure."""
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
    await until_true(lambda: is_draining(api, node))
    async with changing(api, *statements, node=node):
        api.replica.fleet.replicas.end(node)
        await until_it_waits_for_a_row(api)
    return await leaving


RESUME = "UPDATE nodes SET draining_since = NULL, drain_xid = NULL WHERE passport_id = $1"


@pytest.mark.parametrize("way", WAYS)
async def test_a_replica_that_is_alone_lets_an_idle_node_go_at_once(api: Api, way: str) -> None:
    node = await api.register()
    began = time.monotonic()
    assert (await leave(api, node, way)).is_success
    assert time.monotonic() - began < SETTLING_SECONDS
    reason = "deregistering" if way == "deregister" else "revoking"
    assert (await told(api, node))[:2] == [("registered", None), ("draining", reason)]
    assert not is_draining(api, node)  # the drain ended with the node, so its reasons name one cause


async def test_a_drain_that_somebody_else_began_meanwhile_is_not_the_departures_own(api: Api) -> None:
    """Its own was ended, so that requests may have begun; that the node drains again, and is idle, changes nothing."""
    node, fleet = await api.register(), api.replica.fleet
    departures, finished = Departures(api.replica.database, fleet), []

    async def finish(drain: Drain | None) -> None:
        finished.append(drain)

    fleet.replicas.begin(node)
    leaving = asyncio.create_task(departures.run(Departure(SYSTEM, node, None, "deregistering", 30), finish))
    await until_true(lambda: is_draining(api, node))
    held = fleet.get_node(node, owner=None)
    drained_again = Lifecycle(node, {}, api.replica.clock.now(), 10**12, "draining", held.lifecycle_revision + 2)
    fleet.apply_lifecycle(drained_again)
    fleet.replicas.end(node)
    with pytest.raises(RequestsInFlight):
        await leaving
    assert finished == []


@pytest.mark.parametrize("way", WAYS)
async def test_requests_on_another_replica_keep_the_node(api: Api, database_url: str, way: str) -> None:
    """That replica began its request before it could know of the departure."""
    async with two_replicas(api, database_url) as other:
        node = await api.register()
        await until_known(other, node)
        other.replica.fleet.replicas.begin(node)
        refused = await leave(api, node, way)
        assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
        assert refused.json()["error"]["details"] == {"inFlight": 1}
        assert [event for event, _ in await told(api, node)] in (
            ["registered", "draining", "resumed"],
            ["registered"],  # a lease reported the request before
        )
        await until_true(lambda: not is_draining(other, node))
        other.replica.fleet.replicas.end(node)
        await until_true(lambda: api.replica.fleet.in_flight(node) == 0)
        assert (await leave(api, node, way)).is_success


async def test_no_replica_starts_a_request_from_the_moment_it_begins(api: Api, database_url: str) -> None:
    """While it waits for what runs, the node drains on every replica; then it ends."""
    async with two_replicas(api, database_url) as other:
        node = await api.register()
        await until_known(other, node)
        other.replica.fleet.replicas.begin(node)
        leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
        await until_true(lambda: is_draining(api, node) and is_draining(other, node))
        await asyncio.sleep(0.3)
        assert not leaving.done()
        other.replica.fleet.replicas.end(node)
        async with asyncio.timeout(6):
            assert (await leaving).status_code == 200
        await until_true(lambda: other.replica.fleet.get_node(node, owner=None).record.has_ended)


async def test_a_replica_that_hears_of_a_drain_says_at_once_that_it_has_applied_it(api: Api, database_url: str) -> None:
    """It does not wait until its lease is due, which is seldom in this test."""
    async with two_replicas(api, database_url) as other:
        node = await api.register()
        await until_known(other, node)
        for replica in (api, other):
            replica.replica.feed.lease_renewal_seconds = 30.0
        await asyncio.sleep(1.2)  # the renewals that were due before
        began = time.monotonic()
        assert (await leave(api, node)).status_code == 200
        assert time.monotonic() - began < SETTLING_SECONDS


async def test_it_waits_a_moment_for_a_replica_that_has_not_applied_the_drain(api: Api) -> None:
    """Without a known request and without waitSeconds. The other replica then reports a request, which refuses it."""
    node = await api.register()
    other = await add_lease(api, applied=APPLIED_NOTHING)
    leaving = asyncio.create_task(leave(api, node))
    await until_true(lambda: is_draining(api, node))
    await asyncio.sleep(0.5)
    assert not leaving.done()
    await change_lease(api, other, applied=APPLIED_EVERYTHING, in_flight={node: 1})
    async with asyncio.timeout(2):
        refused = await leaving
    assert (refused.status_code, refused.json()["error"]["details"]) == (409, {"inFlight": 1})
    assert not is_draining(api, node)
    await change_lease(api, other, applied=APPLIED_EVERYTHING)
    await until_true(lambda: api.replica.fleet.in_flight(node) == 0)
    assert (await leave(api, node)).status_code == 200


async def test_a_replica_that_lives_and_never_applies_the_drain_refuses_it(api: Api) -> None:
    """It might start a request at any time."""
    node = await api.register()
    other = await add_lease(api, applied=APPLIED_NOTHING)
    async with renewing(api, other, applied=APPLIED_NOTHING):
        began = time.monotonic()
        refused = await leave(api, node)
        assert SETTLING_SECONDS <= time.monotonic() - began < SETTLING_SECONDS * 2
    assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
    assert refused.json()["error"]["details"] == {"inFlight": 0}
    assert "not every replica has applied it" in refused.json()["error"]["message"]


async def test_a_replica_that_went_without_a_goodbye_holds_it_up_for_a_moment_only(api: Api) -> None:
    """Its lease has not run out, and it reported no request in it."""
    node = await api.register()
    await add_lease(api, applied=APPLIED_NOTHING)
    began = time.monotonic()
    assert (await leave(api, node)).status_code == 200
    assert SETTLING_SECONDS <= time.monotonic() - began < SETTLING_SECONDS * 2


@pytest.mark.parametrize("way", ["delete", "patch"])
async def test_a_revocation_is_as_careful(api: Api, way: str) -> None:
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    refused = await leave(api, node, way)
    assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")
    assert await told(api, node) == [("registered", None)]  # what is known to run refuses it before anything changes
    api.replica.fleet.replicas.end(node)
    other = await add_lease(api, applied=APPLIED_NOTHING)
    leaving = asyncio.create_task(leave(api, node, way))
    await until_true(lambda: is_draining(api, node))
    await change_lease(api, other, applied=APPLIED_EVERYTHING, in_flight={node: 2})
    refused = await leaving
    assert (refused.status_code, refused.json()["error"]["details"]) == (409, {"inFlight": 2})
    assert (await api.http.get(f"/passports/{node}")).json()["status"] == "active"
    await until_true(lambda: not is_draining(api, node))


async def test_an_operators_own_drain_outlives_a_refusal(api: Api) -> None:
    node = await api.register()
    await api.http.post(f"/compute/drain/{node}")
    api.replica.fleet.replicas.begin(node)
    assert (await leave(api, node, query="?waitSeconds=0.2")).status_code == 409
    assert is_draining(api, node)
    assert await told(api, node) == [("registered", None), ("draining", "drained by its operator")]
    api.replica.fleet.replicas.end(node)
    assert (await leave(api, node)).status_code == 200


async def test_a_drain_of_its_own_is_over_after_a_refusal(api: Api) -> None:
    node = await api.register()
    await api.beat(node)
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=0.3"))
    await until_true(lambda: is_draining(api, node))
    assert (await leaving).status_code == 409
    assert (await api.health(node))["status"] == "healthy"
    assert (await told(api, node))[1:] == [("draining", "deregistering"), ("resumed", "deregistering was given up")]


async def test_a_resume_meanwhile_calls_it_off(api: Api) -> None:
    """Requests may have begun since: it is refused at once, and the node goes on."""
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
    await until_true(lambda: is_draining(api, node))
    await api.http.post(f"/compute/resume/{node}")
    async with asyncio.timeout(2):
        assert (await leaving).status_code == 409
    assert [event for event, _ in await told(api, node)] == ["registered", "draining", "resumed"]


async def test_a_resume_that_nobody_heard_of_yet_is_found_in_the_last_transaction(api: Api) -> None:
    """Another replica commits it when this one has already seen the node drained."""
    node = await api.register()
    refused = await leave_and_be_overtaken(api, node, RESUME)
    assert (refused.status_code, error_code(refused)) == (409, "REQUESTS_IN_FLIGHT")


async def test_a_revocation_that_nobody_heard_of_yet_is_no_resume(api: Api) -> None:
    """The drain ended with the node, which is what the caller asked for."""
    node = await api.register()
    revoke = "UPDATE passports SET status = 'revoked', revision = revision + 1 WHERE id = $1"
    assert (await leave_and_be_overtaken(api, node, RESUME, revoke)).status_code == 200


async def test_two_calls_at_once_are_answered_the_same(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    leaving = [asyncio.create_task(leave(api, node, query="?waitSeconds=30")) for _ in range(3)]
    await until_true(lambda: is_draining(api, node))
    api.replica.fleet.replicas.end(node)
    answers = [await task for task in leaving]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.text for answer in answers} == {(await leave(api, node)).text}
    assert [event for event, _ in await told(api, node)].count("deregistered") == 1


async def test_a_force_meanwhile_ends_it_and_answers_both(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
    await until_true(lambda: is_draining(api, node))
    assert (await leave(api, node, query="?force=true")).status_code == 200
    async with asyncio.timeout(2):
        assert (await leaving).status_code == 200


async def test_it_goes_on_when_its_caller_goes_away(api: Api) -> None:
    """The client hung up while it waited; the node ends when it can."""
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
    await until_true(lambda: is_draining(api, node))
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert is_draining(api, node)
    api.replica.fleet.replicas.end(node)
    await until_true(lambda: api.replica.fleet.get_node(node, owner=None).record.has_ended)


async def test_a_shutdown_in_the_middle_lets_the_node_go_on(api: Api) -> None:
    node = await api.register()
    api.replica.fleet.replicas.begin(node)
    leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
    await until_true(lambda: is_draining(api, node))
    (task,) = (task for task in asyncio.all_tasks() if task.get_name() == f"departure of {node}")
    task.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert not is_draining(api, node)
    assert [event for event, _ in await told(api, node)] == ["registered", "draining", "resumed"]


async def test_a_crash_in_the_middle_leaves_a_drain_that_says_why_and_leaving_again_works(database_url: str) -> None:
    """The drain is all that is left: an operator ends it, by another deregistration or by `resume`.

    The replica is cut off as a crash does it: its departure is cancelled, and it can't undo the drain.
    """
    async with open_api(database_url, Settings(bootstrap_admin_key=ADMIN_KEY, database_timeout_seconds=0.3)) as api:
        node = await api.register()
        api.replica.fleet.replicas.begin(node)
        leaving = asyncio.create_task(leave(api, node, query="?waitSeconds=30"))
        await until_true(lambda: is_draining(api, node))
        async with changing(api, "SELECT FROM nodes WHERE passport_id = $1 FOR UPDATE", node=node):
            (task,) = (task for task in asyncio.all_tasks() if task.get_name() == f"departure of {node}")
            task.cancel()
            assert (await leaving).status_code == 503
        assert (await told(api, node))[-1] == ("draining", "deregistering")
    async with open_api(database_url, api.replica.settings) as after:
        health = await after.health(node)  # unhealthy, as it was never heard, and draining
        assert [reason["code"] for reason in health["reasons"]] == ["DRAINING", "HEARTBEAT_MISSING"]
        assert (await leave(after, node)).status_code == 200
