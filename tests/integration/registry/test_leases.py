"""Leases: what a replica says it has applied, and what it counts on each node, are said in one order only."""

from __future__ import annotations

import asyncio
import json

from lucid_compute.postgres.database import connect
from lucid_compute.registry.fleet.fleet import Lifecycle
from lucid_compute.registry.fleet.replicas import Snapshot
from tests.api import Api, open_api
from tests.other_replicas import add_lease, change_lease, run_sql, until

_OTHER_LEASES = "SELECT applied_snapshot, in_flight FROM replicas WHERE id <> $1"
OBSERVED_SECONDS = 2.5  # two renewals, and both replicas' polls after them


async def sees_two(api: Api) -> None:
    """Wait until the replica knows that it is one of two."""

    async def is_so() -> bool:
        return api.replica.fleet.replicas.count() == 2

    await until(is_so)


async def now_visible(api: Api) -> str:
    """What has committed by now."""
    ((snapshot,),) = await run_sql(api, "SELECT pg_current_snapshot()::text")
    return str(snapshot)


async def test_a_lease_counts_requests_after_what_it_says_was_applied(api: Api, database_url: str) -> None:
    """A request that a replica begins just before it applies a drain is in the first lease that names the drain."""
    node = await api.register()
    async with open_api(database_url, api.replica.settings) as other:
        await sees_two(api)
        await sees_two(other)
        fleet, began = other.replica.fleet, asyncio.Event()
        apply_lifecycle = fleet.apply_lifecycle

        def begin_and_apply(lifecycle: Lifecycle) -> None:
            if lifecycle.drain_xid is not None and not began.is_set():
                fleet.replicas.begin(node)
                began.set()
            apply_lifecycle(lifecycle)

        fleet.apply_lifecycle = begin_and_apply  # type: ignore[method-assign]
        assert (await api.http.post(f"/compute/drain/{node}")).json()["drained"] is False
        here = api.replica.fleet.get_node(node, owner=None)
        connection = await connect(database_url)
        try:
            deadline = asyncio.get_running_loop().time() + OBSERVED_SECONDS
            while asyncio.get_running_loop().time() < deadline:
                for applied, in_flight in await connection.fetch(_OTHER_LEASES, api.replica.feed.replica_id):
                    assert here.drain_xid not in Snapshot.parse(applied) or json.loads(in_flight) == {node: 1}
                assert not api.replica.fleet.is_drained(here)
                await asyncio.sleep(0.01)
        finally:
            await connection.close()
        assert began.is_set()
        fleet.replicas.end(node)

        async def is_drained() -> bool:
            return api.replica.fleet.is_drained(here)

        await until(is_drained)


async def test_a_node_that_drains_itself_is_drained_when_every_replica_has_applied_that(
    api: Api, database_url: str
) -> None:
    """Here the one that took the heartbeat, there the one that read it."""
    node = await api.register()
    async with open_api(database_url, api.replica.settings) as other:
        await sees_two(api)
        await sees_two(other)
        await api.beat(node, status="draining")
        assert (await api.health(node))["drained"] is False

        async def are_agreed() -> bool:
            return bool((await api.health(node))["drained"] and (await other.health(node))["drained"])

        await until(are_agreed)
        other.replica.fleet.replicas.begin(node)

        async def is_seen() -> bool:
            return bool((await api.health(node))["inFlight"] == 1)

        await until(is_seen)
        assert (await api.health(node))["drained"] is False


async def test_a_replica_that_read_late_but_saw_early_holds_a_nodes_own_drain_back(api: Api) -> None:
    """The heartbeat's commit took long: a replica that polled seconds after it was received had not seen it yet."""
    node = await api.register()
    before = await now_visible(api)
    other = await add_lease(api, applied=before)
    await api.beat(node, status="draining")
    await asyncio.sleep(1.5)
    await change_lease(api, other, applied=before)
    await asyncio.sleep(1.5)
    health = await api.health(node)
    assert (health["status"], health["drained"]) == ("draining", False)
    await change_lease(api, other, applied=await now_visible(api))

    async def is_drained() -> bool:
        return bool((await api.health(node))["drained"])

    await until(is_drained)
