"""Cleaning: old rows go in batches, each in a transaction of its own, and one fault holds nothing else up."""

from __future__ import annotations

import pytest

from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.cleaning import CLEANING_LOCK, RULES, Cleaner, Rule
from lucid_compute.registry.sweep import SWEEP_LOCK
from tests.postgres import execute

OLD_ROWS = """
    INSERT INTO heartbeat_batches (replica_id, passport_ids, at)
        SELECT gen_random_uuid(), '{}', now() - interval '6 minutes' FROM generate_series(1, 25);
    INSERT INTO heartbeat_batches (replica_id, passport_ids, at)
        SELECT gen_random_uuid(), '{}', now() - interval '4 minutes' FROM generate_series(1, 5);
    INSERT INTO idempotency_keys (owner, key, body_hash, created_at)
        SELECT 'olga', n::text, '\\x00', now() - n * interval '20 hours' FROM generate_series(1, 3) n;
    INSERT INTO replicas (id, applied_snapshot, seen_at)
        SELECT gen_random_uuid(), '1:1:', now() - n * interval '50 minutes' FROM generate_series(1, 3) n;
"""
COUNTS = """
    SELECT (SELECT count(*) FROM heartbeat_batches), (SELECT count(*) FROM idempotency_keys),
        (SELECT count(*) FROM replicas)
"""


@pytest.fixture
async def database(database_url: str) -> Database:
    """A database with rows that are old and rows that are not; `count` counts them."""
    connection = await connect(database_url)
    try:
        await connection.execute(OLD_ROWS)
    finally:
        await connection.close()
    return Database(database_url, pool_size=1)


async def count(database: Database) -> tuple[int, ...]:
    """How many rows each table has."""
    connection = await connect(database.url)
    try:
        (counts,) = await connection.fetch(COUNTS)
        return tuple(counts)
    finally:
        await connection.close()


def in_batches_of(size: int) -> list[Rule]:
    """The rules, with small batches."""
    return [rule._replace(batch=size) for rule in RULES]


@pytest.mark.parametrize("size", [1, 10, 25, 2000])
async def test_old_rows_go_and_all_others_stay(database: Database, size: int) -> None:
    """However many batches it takes. The newest lease stays too: it says since when no replica has run."""
    assert await Cleaner(database, in_batches_of(size)).clean() == 25 + 2 + 2
    assert await count(database) == (5, 1, 1)
    await database.close()


async def test_a_rule_that_fails_keeps_what_was_deleted_and_holds_no_other_up(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The failure is logged, with the table."""
    await execute(
        database.url,
        """
        CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'not this one'; END $$;
        CREATE TRIGGER refuse BEFORE DELETE ON idempotency_keys FOR EACH ROW WHEN (OLD.key = '2')
            EXECUTE FUNCTION refuse();
        """,
    )
    rules = sorted(in_batches_of(1), key=lambda rule: rule.table != "idempotency_keys")
    assert await Cleaner(database, rules).clean() == 1 + 25 + 2
    assert await count(database) == (5, 2, 1)
    assert "old rows of idempotency_keys could not be deleted" in caplog.text
    await database.close()


async def test_a_batch_that_takes_too_long_is_tried_smaller(database_url: str) -> None:
    """Each row takes a tenth of a second: sixteen do not fit into half a second, and after two tries one does."""
    connection = await connect(database_url)
    await connection.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(0.1); RETURN OLD; END'"
    )
    await connection.execute(
        "CREATE TRIGGER slow BEFORE DELETE ON idempotency_keys FOR EACH ROW EXECUTE FUNCTION slow()"
    )
    await connection.execute(
        "INSERT INTO idempotency_keys (owner, key, body_hash, created_at) "
        "SELECT 'olga', n::text, '\\x00', now() - interval '9 days' FROM generate_series(1, 16) n"
    )
    database = Database(database_url, pool_size=1, timeout_seconds=0.5)
    cleaner = Cleaner(database, [rule._replace(batch=16) for rule in RULES if rule.table == "idempotency_keys"])
    assert await cleaner.clean() == 0
    deleted = [await cleaner.clean() for _ in range(2)]
    assert any(deleted), "no batch was small enough"
    await connection.close()
    await database.close()


async def test_one_replica_cleans_at_a_time_and_no_sweep_waits_for_it(database: Database) -> None:
    """The others find the lock taken, and leave it to that one."""
    connection = await connect(database.url)
    try:
        async with connection.transaction():
            await connection.execute(f"SELECT pg_advisory_xact_lock({CLEANING_LOCK})")
            assert await Cleaner(database, RULES).clean() == 0
        assert await Cleaner(database, RULES).clean() == 29
    finally:
        await connection.close()
        await database.close()
    assert CLEANING_LOCK != SWEEP_LOCK


async def test_a_locked_row_is_left_for_the_next_time(database: Database) -> None:
    """No batch waits for another transaction."""
    connection = await connect(database.url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT FROM idempotency_keys WHERE key = '3' FOR UPDATE")
            assert await Cleaner(database, RULES).clean() == 28
        assert await Cleaner(database, RULES).clean() == 1
    finally:
        await connection.close()
        await database.close()
