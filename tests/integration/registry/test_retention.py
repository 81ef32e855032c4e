"""Events, boots and audit rows are deleted when they are old, in batches, and nothing else can delete audit rows."""

from __future__ import annotations

import asyncio
import logging
from datetime import timedelta
from typing import Any

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError

from lucid_compute.accounting.node_states import NodeStateRecorder
from lucid_compute.postgres.batch_deletion import RETENTION_LOCK
from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.cleaning import RULES, Cleaner
from lucid_compute.registry.retention import HistoryRetention
from lucid_compute.server.settings import Settings, SettingsNotUsable, read_settings
from tests.api import Adjust, Api, open_api, without_sweeps
from tests.other_replicas import run_sql

ADD_AUDIT_ROWS = """
    INSERT INTO audit_log (at, action, target_type, target_id)
    SELECT now() - make_interval(days => $1), 'old', 'node', n::text FROM generate_series(1, $2) n
"""
AGE_EVENTS = "UPDATE node_events SET at = at - make_interval(days => $2) WHERE passport_id = $1"


@pytest.fixture
def adjust() -> Adjust:
    """No sweep adds events."""
    return without_sweeps


def retention_on(api: Api, *, event_days: int = 90, audit_days: int = 400) -> HistoryRetention:
    """The retention of the replica, with these settings."""
    return HistoryRetention(api.replica.database, event_days=event_days, audit_days=audit_days)


async def events_of(api: Api, node: str) -> list[str]:
    """The types of the node's events, newest first."""
    answer = await api.http.get(f"/compute/events/{node}", params={"perPage": 100})
    return [event["type"] for event in answer.json()["events"]]


async def count(api: Api, table: str, where: str = "true") -> int:
    """How many rows of a table there are."""
    return int((await run_sql(api, f"SELECT count(*) FROM {table} WHERE {where}"))[0][0])


async def test_old_events_go_and_others_stay(api: Api) -> None:
    """In batches that do not divide the number; 0 days keep all for ever."""
    node = await api.register()
    for number in range(25):
        await api.http.put(f"/compute/models/{node}", json={"models": [{"id": str(number)}]})
    await run_sql(api, AGE_EVENTS, node, 91)
    await api.http.post(f"/compute/drain/{node}")
    assert await retention_on(api, event_days=0, audit_days=0).remove_all(batch=7) == 0
    assert len(await events_of(api, node)) == 27
    assert await retention_on(api).remove_all(batch=7) == 26
    assert await events_of(api, node) == ["draining"]
    await run_sql(api, AGE_EVENTS, node, 89)
    assert await retention_on(api).remove_all(batch=7) == 0


async def test_old_audit_rows_go_by_the_retention_alone(api: Api) -> None:
    """Whoever else deletes, also with the retention's own permission, is refused what is younger than 30 days."""
    await run_sql(api, ADD_AUDIT_ROWS, 401, 25)
    await run_sql(api, ADD_AUDIT_ROWS, 399, 1)
    await run_sql(api, ADD_AUDIT_ROWS, 29, 1)
    for permission in ("off", "on"):
        statement = f"SELECT set_config('lucid.retention', '{permission}', false)"
        connection = await connect(api.replica.database.url, session=statement)
        for target in ("true", "at > now() - interval '30 days'", "id = (SELECT max(id) FROM audit_log)"):
            with pytest.raises(asyncpg.RaiseError, match="append-only"):
                await connection.execute(f"DELETE FROM audit_log WHERE {target}")
        for statement in ("UPDATE audit_log SET at = at - interval '2 years'", "TRUNCATE audit_log"):
            with pytest.raises(asyncpg.RaiseError, match="append-only"):
                await connection.execute(statement)
        await connection.close()
    with pytest.raises(asyncpg.RaiseError, match="append-only"):
        await run_sql(api, "DELETE FROM audit_log WHERE action = 'old' AND at < now() - interval '400 days'")
    assert await retention_on(api, audit_days=0).remove_all() == 0
    assert await retention_on(api).remove_all(batch=7) == 25
    assert await count(api, "audit_log", "action = 'old'") == 2
    with pytest.raises(DBAPIError, match="append-only"):  # the floor holds for the service too
        await retention_on(api, audit_days=1).remove_all()


async def test_former_boots_are_refused_until_they_are_old(api: Api) -> None:
    """The current one stays however old it is; those of a node that ended go at once."""
    node, other = await api.register(), await api.register("other")
    for boot in ("a", "b", "c"):
        assert (await api.beat(node, bootId=boot, sequence=1)).status_code == 200
    await api.beat(other, bootId="x", sequence=1)
    retention = retention_on(api)
    assert await retention.remove_all(batch=2) == 0
    assert (await api.beat(node, bootId="a", sequence=2)).status_code == 422
    await run_sql(api, "UPDATE node_boots SET first_seen_at = now() - interval '91 days' WHERE boot_id <> 'b'")
    assert await retention.remove_all(batch=2) == 1
    assert sorted(row[0] for row in await run_sql(api, "SELECT boot_id FROM node_boots")) == ["b", "c", "x"]
    assert (await api.beat(node, bootId="b", sequence=2)).status_code == 422
    assert (await api.beat(node, bootId="c", sequence=2)).status_code == 200
    await api.http.post(f"/compute/deregister/{other}?force=true")
    await retention.remove_all(batch=2)
    assert await count(api, "node_boots", "boot_id = 'x'") == 0


async def test_one_replica_deletes_at_a_time(api: Api) -> None:
    await run_sql(api, ADD_AUDIT_ROWS, 401, 5)
    other = await connect(api.replica.database.url)
    async with other.transaction():
        await other.execute(f"SELECT pg_advisory_xact_lock({RETENTION_LOCK})")
        assert await retention_on(api).remove_all() == 0
    await other.close()
    removed = await asyncio.gather(*(retention_on(api).remove_all(batch=2) for _ in range(3)))
    removed.append(await retention_on(api).remove_all())
    assert sum(removed) == 5


async def test_a_batch_that_takes_too_long_is_made_smaller_and_what_fails_is_logged(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    """Each row takes 50 ms here, as on a disk that is overloaded, and a transaction may take 300 ms."""
    await run_sql(api, ADD_AUDIT_ROWS, 401, 30)
    await run_sql(
        api,
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(current_setting('lucid.slow')::float); RETURN OLD; END $$",
    )
    await run_sql(
        api,
        "CREATE TRIGGER slow BEFORE DELETE ON audit_log FOR EACH ROW WHEN (OLD.action = 'old') EXECUTE FUNCTION slow()",
    )
    name = (await run_sql(api, "SELECT current_database()"))[0][0]
    await run_sql(api, f"ALTER DATABASE {name} SET lucid.slow = '0.05'")
    database = Database(api.replica.database.url, timeout_seconds=1.4)
    retention = HistoryRetention(database, event_days=0, audit_days=400)
    with caplog.at_level(logging.WARNING):
        assert await retention.remove_all(batch=200) == 30
    assert not caplog.records
    await database.close()
    await run_sql(api, ADD_AUDIT_ROWS, 401, 30)
    await run_sql(api, f"ALTER DATABASE {name} SET lucid.slow = '9'")
    database = Database(api.replica.database.url, timeout_seconds=0.3)
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="database"):
        await HistoryRetention(database, event_days=0, audit_days=400).remove_all()
    assert "old audit rows could not be deleted" in caplog.text
    await database.close()


def test_an_audit_trail_shorter_than_a_month_is_refused() -> None:
    """The database would refuse it each minute."""
    for days in (0, 30, 400):
        assert read_settings(audit_retention_days=days).audit_retention_days == days
    with pytest.raises(SettingsNotUsable, match=r"LUCID_AUDIT_RETENTION_DAYS: Set 30 days or more, or 0"):
        read_settings(audit_retention_days=29)


async def test_ended_nodes_leave_memory_and_stay_readable(api: Api) -> None:
    """After five minutes; their owner with the last of them."""
    fleet, owner = api.replica.fleet, await api.new_key("acme", ["compute"])
    node, kept = await owner.register(), await api.register("kept")
    await owner.http.post(f"/compute/deregister/{node}")
    await _let_age(api, node, timedelta(minutes=4, seconds=50))
    await api.replica.sweep.keep_up()
    assert fleet.find_node(node) is not None
    await _let_age(api, node, timedelta(minutes=5, seconds=10))
    await api.replica.sweep.keep_up()
    assert (fleet.find_node(node), list(fleet._nodes_by_owner)) == (None, ["admin"])
    assert fleet.find_node(kept) is not None
    assert (await owner.http.get(f"/passports/{node}")).json()["id"] == node
    assert (await events_of(owner, node))[0] == "deregistered"
    assert (await owner.beat(node)).status_code == 410


async def _let_age(api: Api, node: str, age: timedelta) -> Any:
    """Let the node have ended so long ago."""
    statement = (
        "UPDATE passports SET updated_at = now() - $2::interval, revision = revision + 1, "
        "changed_xid = pg_current_xact_id() WHERE id = $1"
    )
    await run_sql(api, statement, node, age)
    await api.replica.feed.catch_up()


async def test_keys_that_ended_more_than_a_day_ago_are_not_loaded(api: Api, settings: Settings) -> None:
    """By a replica that starts; one that ended just now is, so that no older copy revives it."""
    ids = {}
    for name, statement in {
        "live": "SELECT $1::text",
        "expires later": "UPDATE api_keys SET expires_at = now() + interval '1 day' WHERE id = $1",
        "revoked today": "UPDATE api_keys SET revoked_at = now() - interval '23 hours' WHERE id = $1",
        "revoked": "UPDATE api_keys SET revoked_at = now() - interval '25 hours' WHERE id = $1",
        "expired": "UPDATE api_keys SET expires_at = now() - interval '25 hours' WHERE id = $1",
        "both": "UPDATE api_keys SET expires_at = now() + interval '1 day', revoked_at = now() - interval '2 days' "
        "WHERE id = $1",
    }.items():
        key = (await api.new_key("acme", ["compute"])).key or ""
        ids[name] = key.split("_")[2]
        await run_sql(api, statement, ids[name])
    async with open_api(api.replica.database.url, settings) as second:
        loaded = set(second.replica.keys._keys)
    assert {name for name, id_ in ids.items() if id_ in loaded} == {"live", "expires later", "revoked today"}


async def test_a_running_replica_forgets_ended_keys_when_it_cleans(api: Api) -> None:
    key = (await api.new_key("acme", ["compute"])).key or ""
    key_id = key.split("_")[2]
    await run_sql(
        api,
        "UPDATE api_keys SET revoked_at = now() - interval '2 days', revision = 2, changed_xid = pg_current_xact_id() "
        "WHERE id = $1",
        key_id,
    )
    await api.replica.feed.catch_up()
    assert key_id in api.replica.keys._keys
    await api.replica.sweep.keep_up()
    assert key_id not in api.replica.keys._keys
    assert (await api.with_key(key).http.get("/compute")).status_code == 401


async def test_states_of_nodes_that_went_before_they_settled_are_forgotten(api: Api) -> None:
    recorder = NodeStateRecorder(api.replica.database, api.replica.fleet)
    node = await api.register()
    await api.beat(node)
    await recorder.find_changes(api.replica.clock.now())
    assert set(recorder._seen) == {node}
    api.replica.fleet.forget_node(api.replica.fleet.get_node(node, owner=None))
    await recorder.refresh()
    assert not recorder._seen


async def test_rows_of_shares_that_nobody_confirms_are_deleted(api: Api) -> None:
    await run_sql(
        api,
        "INSERT INTO key_shares (key_id, unit, changed_at) VALUES ('old', 'tokens', now() - interval '6 minutes'), "
        "('new', 'tokens', now() - interval '4 minutes')",
    )
    await Cleaner(api.replica.database, RULES).clean()
    assert [row[0] for row in await run_sql(api, "SELECT key_id FROM key_shares")] == ["new"]
