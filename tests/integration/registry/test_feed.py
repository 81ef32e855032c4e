"""The change feed: no commit is missed, in any order of commits, with and without notifications."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
import pytest

from lucid_compute.postgres.changes import CHANGES_CHANNEL
from lucid_compute.postgres.database import connect
from lucid_compute.server.settings import Settings
from tests.api import ADMIN_KEY, Api, open_api
from tests.factories import GUIDE_PASSPORT

WITHIN_SECONDS = 2.0


async def eventually(condition: Callable[[], bool], within_seconds: float = WITHIN_SECONDS * 3) -> None:
    """Wait until the condition holds; the contract's two seconds, with threefold slack."""
    deadline = asyncio.get_running_loop().time() + within_seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not come"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def deaf_replica(database_url: str) -> AsyncIterator[Api]:
    """A replica that receives no notification, so that it only learns from its poll."""
    deaf = Settings(bootstrap_admin_key=ADMIN_KEY, feed_follows_notifications=False)
    async with open_api(database_url, deaf) as replica:
        yield replica


async def insert_node(connection: asyncpg.Connection[asyncpg.Record], name: str) -> str:
    """Register a node as another replica would, on a transaction of ours."""
    node_id: str = await connection.fetchval(
        """INSERT INTO passports (id, type, owner, name, metadata)
           VALUES (gen_random_uuid(), 'compute', 'acme', $1, '{"vram": "80GB", "inferenceUrl": "http://n:1"}')
           RETURNING id::text""",
        name,
    )
    await connection.execute("INSERT INTO nodes (passport_id) VALUES ($1)", node_id)
    await connection.execute("INSERT INTO heartbeats (passport_id) VALUES ($1)", node_id)
    return node_id


async def test_a_transaction_held_open_across_polls_is_seen_when_it_commits(api: Api, database_url: str) -> None:
    """Rows that commit out of order are not skipped: the old transaction's come after the young one's."""
    fleet = api.replica.fleet
    slow, quick = await connect(database_url), await connect(database_url)
    try:
        held = slow.transaction()
        await held.start()
        old = await insert_node(slow, "old")
        young = await insert_node(quick, "young")
        await eventually(lambda: fleet.find_node(young) is not None)
        await asyncio.sleep(1.2)  # two polls go by, beyond the open transaction's number
        assert fleet.find_node(old) is None
        await held.commit()
        await eventually(lambda: fleet.find_node(old) is not None)
    finally:
        await slow.close()
        await quick.close()


async def test_many_notifications_cost_few_reads(api: Api, database_url: str) -> None:
    """However many agents register at once: each of their commits wakes every replica."""
    feed, clock = api.replica.feed, asyncio.get_running_loop().time
    feed.least_seconds = 30.0
    connection = await connect(database_url)
    began, reads = clock(), {feed.read_at}
    for _ in range(100):
        await connection.execute(f"NOTIFY {CHANGES_CHANNEL}")
        reads.add(feed.read_at)
    seconds = clock() - began
    await connection.close()
    assert len(reads) <= seconds / feed.least_seconds + 2


async def test_a_transaction_that_rolls_back_leaves_nothing(api: Api, database_url: str) -> None:
    """The fleet shows only what is committed."""
    connection = await connect(database_url)
    try:
        held = connection.transaction()
        await held.start()
        gone = await insert_node(connection, "gone")
        await held.rollback()
        kept = await insert_node(connection, "kept")
        await eventually(lambda: api.replica.fleet.find_node(kept) is not None)
        assert api.replica.fleet.find_node(gone) is None
    finally:
        await connection.close()


async def test_a_deaf_replica_follows_everything_by_its_poll(api: Api, database_url: str) -> None:
    """Registrations, heartbeats, declarations, drains, keys and ends reach it without one notification."""
    async with deaf_replica(database_url) as other:
        fleet = other.replica.fleet
        made = await api.http.post("/passports", json=GUIDE_PASSPORT)
        node_id = made.json()["id"]
        await eventually(lambda: fleet.find_node(node_id) is not None)
        node = fleet.get_node(node_id, owner=None)

        assert (await api.beat(node_id, availableModels=["m"], load=0.25)).status_code == 200
        await eventually(lambda: node.state.reported_models == {"m"})

        declaration = {"models": [{"id": "m", "maxTokens": 4096, "quantization": None}]}
        assert (await api.http.put(f"/compute/models/{node_id}", json=declaration)).status_code == 200
        await eventually(lambda: "m" in node.state.declared)

        await api.http.post(f"/compute/drain/{node_id}")
        await eventually(lambda: node.state.is_draining)
        await eventually(lambda: other.replica.fleet.is_drained(node))
        await api.http.post(f"/compute/resume/{node_id}")
        await eventually(lambda: not node.state.is_draining)

        tenant = await api.new_key("acme", ["passports:read"])
        here = other.with_key(tenant.key)
        assert (await here.http.get("/passports")).status_code == 200
        key_id = (tenant.key or "").split("_")[2]
        await api.http.delete(f"/keys/{key_id}")
        deadline = asyncio.get_running_loop().time() + WITHIN_SECONDS * 3
        while (await here.http.get("/passports")).status_code != 401:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)

        await api.http.post(f"/compute/deregister/{node_id}")
        await eventually(lambda: node.record.has_ended)


async def test_what_another_replica_just_made_is_found_at_once(api: Api, database_url: str) -> None:
    """An unknown key is looked up in Postgres: behind a load balancer, the next request may come here."""
    async with deaf_replica(database_url) as other:
        node_id = await api.register()
        assert (await other.beat(node_id)).status_code == 200
        tenant = await api.new_key("acme", ["passports:read"])
        assert (await other.with_key(tenant.key).http.get("/passports")).status_code == 200
        await api.add_model("fresh")
        assert (await other.http.get("/models/fresh")).status_code == 200


async def test_a_drain_waits_for_a_replica_that_has_not_heard_of_it(api: Api, database_url: str) -> None:
    """With a second replica alive, `drained` turns true only when that one has applied the drain."""
    async with deaf_replica(database_url) as other:
        node_id = await api.register()
        await eventually(lambda: api.replica.fleet.replicas.count() == 2)
        await eventually(lambda: other.replica.fleet.find_node(node_id) is not None)
        answer = (await api.http.post(f"/compute/drain/{node_id}")).json()
        assert answer["drained"] is False
        node = api.replica.fleet.get_node(node_id, owner=None)
        await eventually(lambda: api.replica.fleet.is_drained(node))
        assert other.replica.fleet.get_node(node_id, owner=None).state.is_draining


async def test_an_outage_of_ours_is_recorded_and_taken_off_ages(database_url: str, settings: Settings) -> None:
    """Four minutes away: a node last heard before it is live, not fresh, and its uptime leaves the outage out."""
    async with open_api(database_url, settings) as before:
        node_id = await before.register()
        await before.beat(node_id)
    connection = await connect(database_url)
    try:
        await connection.execute("UPDATE heartbeats SET received_at = received_at - interval '250 seconds'")
        await connection.execute("UPDATE heartbeats SET up_since = received_at - interval '10 seconds'")
        await connection.execute("UPDATE replicas SET seen_at = seen_at - interval '240 seconds'")
        async with open_api(database_url, settings) as after:
            await eventually(lambda: bool(after.replica.fleet.outages))
            health = await after.health(node_id)
            assert health["status"] == "healthy"
            assert health["fresh"] is False
            assert health["heartbeatAgeSeconds"] == pytest.approx(250, abs=5)
            assert health["uptimeSeconds"] == pytest.approx(20, abs=5)
        assert await connection.fetchval("SELECT count(*) FROM outages") == 1
    finally:
        await connection.close()


@pytest.mark.parametrize(("away_seconds", "is_worth_a_warning"), [(10, False), (40, True)])
async def test_a_restart_that_no_node_could_go_stale_in_is_no_warning(
    away_seconds: int,
    is_worth_a_warning: bool,
    database_url: str,
    settings: Settings,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each is recorded as an outage; only a long one is logged as a warning."""
    async with open_api(database_url, settings):
        pass
    connection = await connect(database_url)
    try:
        await connection.execute("UPDATE replicas SET seen_at = now() - make_interval(secs => $1)", away_seconds)
    finally:
        await connection.close()
    async with open_api(database_url, settings) as after:
        await eventually(lambda: bool(after.replica.fleet.outages))
    told = [record.levelname for record in caplog.records if "no replica could take heartbeats" in record.message]
    assert ("WARNING" in told) is is_worth_a_warning


async def test_a_row_that_cannot_be_read_holds_up_no_other(api: Api, database_url: str) -> None:
    """Written by a newer version, or by hand: it is left out, and everything after it is followed."""
    connection = await connect(database_url)
    try:
        await connection.execute(
            """INSERT INTO passports (id, type, owner, name, metadata)
               VALUES (gen_random_uuid(), 'compute', 'acme', 'odd', '{"vram": {"unheard": "of"}}')"""
        )
        kept = await insert_node(connection, "kept")
        await eventually(lambda: api.replica.fleet.find_node(kept) is not None)
        assert (await api.http.get("/readyz")).status_code == 200
    finally:
        await connection.close()


async def test_every_change_of_what_replicas_hold_wakes_them(api: Api, database_url: str) -> None:
    """Each of these requests sends a notification when it commits."""
    woken = asyncio.Event()
    listener = await connect(database_url)
    await listener.add_listener(CHANGES_CHANNEL, lambda *_: woken.set())

    async def wakes(method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        woken.clear()
        answer = await api.http.request(method, path, json=body)
        assert answer.is_success, (path, answer.text)
        async with asyncio.timeout(5):
            await woken.wait()
        return dict(answer.json()) if answer.content else {}

    try:
        node = (await wakes("POST", "/passports", GUIDE_PASSPORT))["id"]
        key = (await wakes("POST", "/keys", {"name": "k", "owner": "acme", "scopes": ["compute"]}))["id"]
        await wakes("PUT", f"/compute/models/{node}", {"models": [{"id": "m"}]})
        await wakes("POST", f"/compute/drain/{node}")
        await wakes("POST", f"/compute/resume/{node}")
        await wakes("PATCH", f"/passports/{node}", {"description": "changed"})
        await wakes("DELETE", f"/passports/{node}")
        await wakes("POST", f"/keys/{key}/rotate", {})
        await wakes("DELETE", f"/keys/{key}")
    finally:
        await listener.close()
