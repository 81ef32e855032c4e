"""The feed after a lost connection: it reads on, or replaces everything when the database lost what was read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.postgres.database import connect
from lucid_compute.registry.fleet.change_feed import UNSEEN
from lucid_compute.registry.fleet.continuity import RESUME_WITHIN, Progress, find_break, read_identity
from lucid_compute.registry.fleet.replicas import Snapshot
from lucid_compute.server.settings import Settings
from tests.api import Adjust, Api, open_api, without_sweeps
from tests.other_replicas import run_sql, until

END_FEED = """
    SELECT pg_terminate_backend(pid) FROM pg_stat_activity
    WHERE application_name = 'lucid feed' AND datname = current_database()
"""
FORGET_LEASE = "UPDATE replicas SET seen_at = seen_at - interval '1 second'"
GATE = 0x67617465  # an advisory lock: whoever holds it holds each read of the feed up, after its snapshot
MAKE_GATE = f"""
    ALTER TABLE outages RENAME TO outages_behind_the_gate;
    INSERT INTO outages_behind_the_gate (started_at, ended_at)
        VALUES (now() - interval '9 days', now() - interval '9 days');
    CREATE VIEW outages AS SELECT * FROM outages_behind_the_gate WHERE pg_advisory_xact_lock_shared({GATE})::text = '';
"""
IS_HELD = """
    SELECT max(pid) FROM pg_stat_activity
    WHERE application_name = 'lucid feed' AND datname = current_database() AND wait_event_type = 'Lock'
"""


@pytest.fixture
def adjust() -> Adjust:
    """No sweep writes states into the rows of the tests."""
    return without_sweeps


async def lose(api: Api, statements: str) -> None:
    """Do to the database what a failover that loses commits does, and wait until the replica has read it again."""
    connection, before = await connect(api.replica.database.url, application="lucid tests"), api.replica.feed.read_at
    try:
        async with connection.transaction():
            await connection.execute(FORGET_LEASE)
            await connection.execute(END_FEED)
            await connection.execute(statements)
    finally:
        await connection.close()
    await read_since(api, before)


async def read_since(api: Api, before: object) -> None:
    """Wait until the feed has read the database again."""

    async def is_read() -> bool:
        return api.replica.feed.read_at != before

    await until(is_read, 20)
    await api.replica.feed.catch_up()


@asynccontextmanager
async def held_reads(database_url: str) -> AsyncIterator[asyncpg.Connection[asyncpg.Record]]:
    """Hold each read of the feed up, after it took its snapshot, until the block ends."""
    connection = await connect(database_url, application="lucid tests")
    try:
        await connection.execute(f"SELECT pg_advisory_lock({GATE})")
        yield connection
    finally:
        await connection.close()


async def wait_until_held(connection: asyncpg.Connection[asyncpg.Record], before: int | None = None) -> int:
    """Wait until the feed stands at the gate, in another session than `before`; return the session."""
    session: int | None = None

    async def is_held() -> bool:
        nonlocal session
        session = await connection.fetchval(IS_HELD)
        return session not in {None, before}

    await until(is_held, 20)
    assert session is not None
    return session


async def test_a_connection_that_broke_is_no_reason_to_load_everything(api: Api) -> None:
    """What changed meanwhile is read, and nothing else: a row that was changed without a transaction number is not."""
    node, other = await api.register("one"), await api.register("two")
    before = api.replica.feed.read_at
    await run_sql(api, "UPDATE passports SET description = 'unseen' WHERE id = $1", node)
    await run_sql(
        api,
        "UPDATE passports SET description = 'seen', revision = 2, changed_xid = pg_current_xact_id() WHERE id = $1",
        other,
    )
    await run_sql(api, END_FEED)
    await read_since(api, before)
    fleet = api.replica.fleet
    assert fleet.get_node(other, owner=None).record.description == "seen"
    assert fleet.get_node(node, owner=None).record.description is None


async def test_everything_is_as_the_database_has_it_after_it_lost_commits(api: Api, settings: Settings) -> None:
    """An edit, a declaration, a drain, a node, a model and a key; and the running replica says what a new one says."""
    node = await api.register("kept")
    lost_node, lost_model = await api.register("lost"), await api.add_model("lost-model")
    assert (await api.beat(node)).status_code == 200
    models = {"models": [{"id": "m-lost", "maxTokens": None, "quantization": None}]}
    assert (await api.http.put(f"/compute/models/{node}", json=models)).status_code == 200
    assert (await api.http.post(f"/compute/drain/{node}")).status_code == 202
    assert (await api.http.patch(f"/passports/{node}", json={"description": "lost"})).status_code == 200
    lost_key = await api.new_key("acme", ["admin"])
    assert (await lost_key.http.get("/keys")).status_code == 200
    await lose(
        api,
        f"""
        UPDATE nodes SET declared_models = '[{{"id": "m-kept", "maxTokens": null, "quantization": null}}]',
            draining_since = NULL, drain_xid = NULL, revision = 1 WHERE passport_id = '{node}';
        UPDATE passports SET description = 'kept', revision = 0 WHERE id = '{node}';
        DELETE FROM api_keys WHERE owner = 'acme';
        DELETE FROM nodes WHERE passport_id = '{lost_node}';
        DELETE FROM heartbeats WHERE passport_id = '{lost_node}';
        DELETE FROM node_events WHERE passport_id = '{lost_node}';
        DELETE FROM model_names WHERE passport_id = '{lost_model}';
        DELETE FROM passports WHERE id IN ('{lost_node}', '{lost_model}');
        """,
    )
    async with open_api(api.replica.database.url, settings) as new:
        for path in (f"/passports/{node}", f"/compute/models/{node}", "/compute?status=draining", "/models"):
            here, there = (await api.http.get(path)).json(), (await new.http.get(path)).json()
            assert here == there, path
    assert (await api.http.get(f"/compute/models/{node}")).json()["models"][0]["id"] == "m-kept"
    assert (await api.http.get(f"/compute/health/{lost_node}")).status_code == 404
    assert (await lost_key.http.get("/keys")).status_code == 401


async def test_acknowledged_heartbeats_count_at_once_after_lost_commits(api: Api) -> None:
    """However many were lost: health shows the next one, its content and its age."""
    node = await api.register()
    for _ in range(4):
        assert (await api.beat(node, load=0.1)).status_code == 200
    ((outages,),) = await run_sql(api, "SELECT count(*) FROM outages")
    await lose(
        api, "UPDATE heartbeats SET revision = 1, received_at = received_at - interval '200 s' WHERE revision > 0"
    )
    assert (await api.health(node))["fresh"] is True  # it was heard, though the database lost it
    assert (await api.beat(node, load=0.9)).status_code == 200
    health = await api.health(node)
    assert (health["fresh"], health["load"]) == (True, 0.9)
    assert health["heartbeatAgeSeconds"] < 30
    assert await run_sql(api, "SELECT count(*) FROM outages") == [(outages,)]


async def test_a_lease_that_was_lost_is_no_outage(api: Api) -> None:
    """The standby lagged by 42 s, in which this replica took heartbeats."""
    await lose(api, "UPDATE replicas SET seen_at = seen_at - interval '42 s'")
    assert await run_sql(api, "SELECT FROM outages") == []
    assert api.replica.fleet.outages == ()


async def test_what_is_made_while_a_load_runs_stays(api: Api, database_url: str) -> None:
    """The load's snapshot is from before a node, a model, a key, a drain and a heartbeat."""
    node = await api.register("before")
    await run_sql(api, "SELECT 1")
    gate = await connect(database_url, application="lucid tests")
    await gate.execute(MAKE_GATE)
    await gate.close()
    before = api.replica.feed.read_at
    async with held_reads(database_url) as connection:
        async with connection.transaction():
            await connection.execute(FORGET_LEASE)
            await connection.execute(END_FEED)
        await wait_until_held(connection)
        made, model = await api.register("meanwhile"), await api.add_model("meanwhile-model")
        key = await api.new_key("acme", ["passports:read"])
        assert (await api.http.post(f"/compute/drain/{node}")).status_code == 202
        assert (await api.beat(node, load=0.9)).status_code == 200
    await read_since(api, before)
    fleet = api.replica.fleet
    assert fleet.find_node(made) is not None
    assert fleet.find_model(model) is not None
    assert (await key.http.get("/passports")).status_code == 200
    health = await api.health(node)
    assert (health["status"], health["load"]) == ("draining", 0.9)


async def test_a_heartbeat_in_doubt_is_read_back_also_when_the_first_try_fails(api: Api, database_url: str) -> None:
    """Its batch is this replica's own, so nothing else would bring it."""
    node = await api.register()
    assert (await api.beat(node, load=0.1)).status_code == 200
    gate = await connect(database_url, application="lucid tests")
    await gate.execute(MAKE_GATE)
    await gate.close()
    async with held_reads(database_url) as connection:
        session = await wait_until_held(connection)
        await connection.execute("UPDATE heartbeats SET report = report || '{\"load\": 0.7}', revision = revision + 1")
        api.replica.feed._own.mark_unsure([node])
        await connection.execute(END_FEED)
        await wait_until_held(connection, session)
        await connection.execute(END_FEED)

    async def is_read_back() -> bool:
        return bool((await api.health(node))["load"] == 0.7)

    await until(is_read_back, 20)


async def test_the_clock_is_right_after_a_load_that_took_long(database_url: str, settings: Settings) -> None:
    """The load says what time it was when it began; the 30 seconds of freshness are not longer by its length."""
    gate = await connect(database_url, application="lucid tests")
    await gate.execute(MAKE_GATE)
    opened = asyncio.Event()

    async def open_and_compare() -> None:
        async with open_api(database_url, settings) as api:
            opened.set()
            now = await gate.fetchval("SELECT clock_timestamp()")
            assert api.replica.clock.now() >= now - timedelta(seconds=0.5)

    async with held_reads(database_url) as connection:
        opening = asyncio.create_task(open_and_compare())
        await wait_until_held(connection)
        await asyncio.sleep(1.5)
        assert not opened.is_set()
    await opening
    await gate.close()


async def test_a_restored_table_is_loaded_without_a_lost_connection(api: Api) -> None:
    """As when an operator empties the tables and restores data below a running replica."""
    node = await api.register()
    connection = await connect(api.replica.database.url, application="lucid tests")
    try:
        async with connection.transaction():
            await connection.execute("CREATE TEMPORARY TABLE kept ON COMMIT DROP AS SELECT * FROM passports")
            await connection.execute("TRUNCATE passports CASCADE")
            await connection.execute("UPDATE kept SET description = 'restored', revision = 0, changed_xid = '5'")
            await connection.execute("INSERT INTO passports SELECT * FROM kept")
    finally:
        await connection.close()

    async def is_restored() -> bool:
        return api.replica.fleet.get_node(node, owner=None).record.description == "restored"

    await until(is_restored)


async def test_an_identity_that_a_host_does_not_tell_is_left_out(database_url: str) -> None:
    """Hosted Postgres may refuse its control file and its log: leases and snapshots then say what is lost."""
    connection = await connect(database_url)
    try:
        whole = await read_identity(connection)
        assert len(whole) == 3
        assert all(whole)
        role = f"guest_{connection.get_server_pid()}"
        await connection.execute(f"CREATE ROLE {role}")
        functions = ("pg_control_system()", "pg_walfile_name(pg_lsn)")
        for function in functions:
            await connection.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
        await connection.execute(f"SET ROLE {role}")
        assert await read_identity(connection) == (None, None, whole[2])
        await connection.execute("RESET ROLE")
        await connection.execute(f"DROP ROLE {role}")
    finally:
        await connection.close()


LONG = RESUME_WITHIN + timedelta(seconds=30)
BREAKS: dict[str, tuple[dict[str, Any], timedelta, str | None]] = {
    "nothing happened": ({}, timedelta(0), None),
    "another system": ({"identity": ("another", "00000001", "5/6")}, timedelta(0), "another database"),
    "another timeline": ({"identity": ("system", "00000002", "5/6")}, timedelta(0), "another timeline"),
    "another file": ({"identity": ("system", "00000001", "5/7")}, timedelta(0), "another database"),
    "a host that tells nothing": ({"identity": (None, None, "5/6")}, timedelta(0), None),
    "a host that told nothing": ({"identity": ()}, timedelta(0), None),
    "commits that are lost": ({"snapshot": Snapshot.parse("900000000:900000000:")}, timedelta(0), "lost commits"),
    "a lease that is lost": ({"lease": timedelta(microseconds=1)}, timedelta(0), "lost commits"),
    "a lease in doubt that was renewed": ({"lease": -timedelta(seconds=1)}, timedelta(0), None),
    "long ago by its clock": ({"read_at": -LONG}, timedelta(0), "too long"),
    "long ago by ours": ({}, LONG, "too long"),
    "a clock that stepped back": ({"read_at": timedelta(hours=1)}, timedelta(0), None),
}


@pytest.mark.parametrize(("changes", "away", "says"), BREAKS.values(), ids=BREAKS)
async def test_a_replica_reads_on_only_in_the_same_database_with_all_that_it_read(
    database_url: str, changes: dict[str, Any], away: timedelta, says: str | None
) -> None:
    """Each sign is enough by itself: a host may hide some, and the others may have caught up."""
    connection, replica_id = await connect(database_url), str(uuid4())
    try:
        lease = await connection.fetchval(
            "INSERT INTO replicas (id, applied_snapshot) VALUES ($1, '3:3:') RETURNING seen_at", replica_id
        )
        snapshot = Snapshot.parse(await connection.fetchval("SELECT pg_current_snapshot()::text"))
        times = {name: lease + value for name, value in changes.items() if isinstance(value, timedelta)}
        identity = ("system", "00000001", "5/6")
        progress = Progress(identity, snapshot, lease, lease)._replace(**{**changes, **times})
        found = await find_break(connection, replica_id, identity, progress, away=away)
        assert found is None if says is None else says in str(found)
        lost = await find_break(connection, str(uuid4()), identity, progress, away=timedelta(0))
        assert lost is not None
    finally:
        await connection.close()


async def test_a_replica_that_was_away_for_too_long_loads_everything(api: Api) -> None:
    """The batches that say whose heartbeats changed are deleted after five minutes."""
    node = await api.register()
    await run_sql(api, "UPDATE passports SET description = 'unseen' WHERE id = $1", node)
    before = api.replica.feed.read_at
    connection = await connect(api.replica.database.url, application="lucid tests")
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE replicas")  # so that no read comes between
            api.replica.feed._progress_at -= LONG.total_seconds()
            await connection.execute(END_FEED)
    finally:
        await connection.close()
    await read_since(api, before)
    assert api.replica.fleet.get_node(node, owner=None).record.description == "unseen"


async def test_rows_of_a_restored_dump_are_read_once_and_their_drains_apply(api: Api) -> None:
    """Their transaction numbers are those of another cluster, far ahead of this one's."""
    node = await api.register()
    await lose(
        api,
        f"""
        UPDATE passports SET changed_xid = '900000000' WHERE id = '{node}';
        UPDATE nodes SET changed_xid = '900000000', drain_xid = '900000000', draining_since = now()
            WHERE passport_id = '{node}';
        """,
    )
    rows = await run_sql(api, "SELECT FROM passports WHERE changed_xid > pg_current_xact_id()")
    assert rows == []
    health = await api.health(node)
    assert (health["drained"], health["reasons"] != []) == (True, True)
    fleet_node = api.replica.fleet.get_node(node, owner=None)
    assert fleet_node.drain_xid is not None
    assert fleet_node.drain_xid < 900_000_000


async def test_a_lease_names_nothing_of_a_database_that_is_gone(api: Api) -> None:
    """Its snapshot would say that this replica has applied drains that are still to come."""
    gate = await connect(api.replica.database.url, application="lucid tests")
    await gate.execute(MAKE_GATE)
    await gate.close()
    async with held_reads(api.replica.database.url) as connection:
        async with connection.transaction():
            await connection.execute(FORGET_LEASE)
            await connection.execute(END_FEED)
        await wait_until_held(connection)
        own = "SELECT applied_snapshot FROM replicas WHERE id = $1"
        assert await connection.fetchval(own, api.replica.feed.replica_id) == "3:3:"


async def test_a_clock_that_stepped_back_keeps_nothing_alive(api: Api) -> None:
    """A dead node, a dead replica and an outage of an hour ahead: each is of now at the latest, for good."""
    node = await api.register()
    assert (await api.beat(node)).status_code == 200
    await run_sql(
        api,
        "INSERT INTO outages (started_at, ended_at) VALUES "
        "(now() - interval '5 s', now() + interval '1 h'), (now() + interval '30 min', now() + interval '40 min')",
    )
    await run_sql(
        api,
        "INSERT INTO replicas (id, applied_snapshot, seen_at) "
        "VALUES (gen_random_uuid(), '1:1:', now() + interval '1 h')",
    )
    await run_sql(api, "UPDATE heartbeats SET received_at = now() + interval '1 h', revision = revision + 1")
    await run_sql(
        api,
        "INSERT INTO heartbeat_batches (replica_id, passport_ids) "
        "SELECT gen_random_uuid(), array_agg(passport_id) FROM heartbeats",
    )

    async def is_clipped() -> bool:
        rows = await run_sql(
            api,
            "SELECT (SELECT count(*) FROM outages WHERE ended_at > clock_timestamp()) "
            "+ (SELECT count(*) FROM replicas WHERE seen_at > clock_timestamp())",
        )
        return rows == [(0,)]

    await until(is_clipped)
    await api.replica.feed.catch_up()
    assert (await api.health(node))["heartbeatAgeSeconds"] >= 0
    now = api.replica.clock.now()
    receipt = api.replica.fleet.get_node(node, owner=None).state.last_heartbeat
    assert receipt is not None
    assert receipt.received_at <= now
    assert [outage.ended_at <= now for outage in api.replica.fleet.outages] == [True]


async def test_the_clock_of_memory_steps_back_with_the_databases(api: Api) -> None:
    """Heartbeats that were received at a later time, by the clock of then, are of now."""
    node = await api.register()
    assert (await api.beat(node)).status_code == 200
    replica = api.replica
    receipt = replica.fleet.get_node(node, owner=None).state.last_heartbeat
    assert receipt is not None
    ahead = receipt.received_at + timedelta(hours=1)
    replica.fleet.apply_receipt(node, receipt._replace(received_at=ahead, revision=receipt.revision + 1))
    replica.clock.set(ahead)
    before = replica.feed.read_at
    await read_since(api, before)
    state = replica.fleet.get_node(node, owner=None).state
    assert state.last_heartbeat is not None
    assert state.last_heartbeat.received_at <= replica.clock.now() < ahead - timedelta(minutes=30)


@pytest.mark.parametrize("snapshot", ["10:20:10,14", "10:10:", "10:11:10", "7:30:7,8,29"])
async def test_what_is_unseen_is_exactly_what_the_snapshot_does_not_show(database_url: str, snapshot: str) -> None:
    connection = await connect(database_url)
    try:
        differing = await connection.fetch(
            f"SELECT n FROM (SELECT n, n::text::xid8 AS changed_xid FROM generate_series(3, 40) n) rows "
            f"WHERE ({UNSEEN}) <> (NOT pg_visible_in_snapshot(changed_xid, $1::text::pg_snapshot))",
            snapshot,
        )
        assert differing == []
    finally:
        await connection.close()


async def test_a_poll_reads_only_what_its_snapshot_did_not_show(database_url: str) -> None:
    """Not all since the oldest transaction that is open, wherever that is: a long one makes no poll dear."""
    slow, quick = await connect(database_url), await connect(database_url, session="SET enable_seqscan = off")
    batch = "INSERT INTO heartbeat_batches (replica_id, passport_ids) VALUES (gen_random_uuid(), '{}')"
    try:
        async with slow.transaction():
            await slow.execute(batch)
            for _ in range(50):
                await quick.execute(batch)
            snapshot = await quick.fetchval("SELECT pg_current_snapshot()::text")
            await quick.execute(batch)
        explain = f"EXPLAIN (ANALYZE, FORMAT JSON) SELECT FROM heartbeat_batches WHERE {UNSEEN}"
        plan = nodes_of(json.loads(await quick.fetchval(explain, snapshot))[0]["Plan"])
        assert plan[0]["Actual Rows"] == 2
        assert {node["Node Type"] for node in plan} & {"Index Scan", "Bitmap Index Scan", "Index Only Scan"}
        assert not any(node.get("Rows Removed by Filter") for node in plan)
        assert max(node["Actual Rows"] for node in plan if "heartbeat" in str(node.get("Index Name", ""))) <= 2
    finally:
        await slow.close()
        await quick.close()


def nodes_of(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Every node of a plan."""
    return [plan, *(node for below in plan.get("Plans", []) for node in nodes_of(below))]
