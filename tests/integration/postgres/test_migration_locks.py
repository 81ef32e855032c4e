"""Migrations beside replicas that write: what they lock, what they do meanwhile, and that they can be interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
from sqlalchemy import Connection, Engine, event

from lucid_compute.postgres import revisions, schema
from lucid_compute.postgres.database import connect
from tests.landed import LANDED, MODEL, NODE, WEBHOOK, all_rows, grow, write_rows
from tests.ledger import read

# Tables of a few rows, which may be locked while they are rewritten.
SMALL = {
    "alembic_version": "one row",
    "webhooks": "at most 50 an owner",
    "payout_terms": "a row for each change of the terms",
    "payout_periods": "a row a month",
    "record_marks": "one row",
}
# Long locks that stay, by revision and table:
# Older replicas write each job with a row of `job_minutes`, which is dropped: they wait for what takes its place.
INHERENT = {("records", "job_minutes")}
STRONG = "('ShareLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')"
_LOCKED = f"""
    SELECT DISTINCT relname FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
    WHERE l.pid = pg_backend_pid() AND l.granted AND l.mode IN {STRONG} AND c.relkind = 'r'
        AND relnamespace = 'public'::regnamespace
"""
_WORK = """
    SELECT coalesce(sum(seq_tup_read + idx_tup_fetch + n_tup_ins + n_tup_upd + n_tup_del), 0)
    FROM pg_stat_xact_user_tables WHERE NOT relname = ANY(%s)
"""
_MANY = f"""
INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
    is_stream, started_at, outcome, status, latency_ms, are_tokens_counted)
SELECT gen_random_uuid(), 1, gen_random_uuid(), '{MODEL}', 'm', '{NODE}', 'olga', 'key', 'carl', 'responses', false,
    now() - interval '2 days', 'cancelled', 200, 400, true FROM generate_series(1, 50)
"""
_WAITING = f"""
INSERT INTO webhook_deliveries (webhook_id, event_id, subject_id, type, occurred_at, payload)
SELECT '{WEBHOOK}', gen_random_uuid(), '{NODE}', 'node.unhealthy', now(), '{{}}' FROM generate_series(1, 50)
"""
_MORE = {"job_ledger": _MANY, "signals": _WAITING}  # by the revision from which on they can be written
_WITHOUT_LINES = f"""
ALTER TABLE jobs DISABLE TRIGGER USER;
INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
    is_stream, started_at, outcome, status, latency_ms, tokens_in, tokens_out, are_tokens_counted, price_usd)
SELECT gen_random_uuid(), 1, gen_random_uuid(), '{MODEL}', 'm', '{NODE}', 'olga', 'key', 'carl', 'responses', false,
    now() - interval '3 minutes', 'completed', 200, 400, 1, 2, true, 0.25 FROM generate_series(1, 3);
ALTER TABLE jobs ENABLE TRIGGER USER
"""
_BILLED = "SELECT (SELECT sum(gross_usd) FROM payout_open), (SELECT sum(price_usd) FROM jobs)"


class Held(NamedTuple):
    """A statement that read or wrote rows while its transaction kept writers from a table."""

    tables: frozenset[str]
    statement: str


@contextmanager
def watched(before: set[str]) -> Iterator[list[Held]]:
    """Yield what statements of migrations do while they lock tables of `before`, which replicas know."""
    held: list[Held] = []
    state = {"is_looking": False, "work": 0}

    def look(connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if state["is_looking"]:
            return
        state["is_looking"] = True
        try:
            locked = {row[0] for row in connection.exec_driver_sql(_LOCKED)} & before - set(SMALL)
            names = "ARRAY[" + ", ".join(f"'{name}'" for name in SMALL) + "]::name[]"
            work = int(connection.exec_driver_sql(_WORK % names).scalar_one())
            if locked and work > state["work"]:
                held.append(Held(frozenset(locked), statement.strip()))
            state["work"] = work
        finally:
            state["is_looking"] = False

    event.listen(Engine, "after_cursor_execute", look)
    try:
        yield held
    finally:
        event.remove(Engine, "after_cursor_execute", look)


async def fill(url: str, revision: str) -> None:
    """Put more rows into the tables that grow."""
    for since in LANDED[: LANDED.index(revision) + 1]:
        if since in _MORE:
            await run(url, _MORE[since])


async def run(url: str, statement: str) -> None:
    """Run statements on a connection of their own."""
    connection = await connect(url)
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


async def test_a_migration_does_no_work_while_it_keeps_replicas_from_a_busy_table(empty_url: str) -> None:
    """Only changes of the catalogue, which take no longer for a large table. A new table that is large counts as well.

    It would fail for a SHARE lock (CREATE INDEX), or an ACCESS EXCLUSIVE one (ALTER TABLE), beside reading rows.
    """
    found: dict[tuple[str, str], str] = {}
    await grow(empty_url, LANDED[0])
    for revision in LANDED[1:]:
        with watched(set(await all_rows(empty_url))) as held:
            await schema.upgrade(empty_url, revision)
        found |= {(revision, table): each.statement for each in held for table in each.tables}
        await write_rows(empty_url, revision)
        if revision in _MORE:
            await run(empty_url, _MORE[revision])
    assert not {key: statement for key, statement in found.items() if key not in INHERENT}
    assert set(found) >= INHERENT


@pytest.mark.parametrize("revision", ["job_retention", "money", "closings"])
async def test_a_migration_that_was_interrupted_goes_on(empty_url: str, revision: str) -> None:
    """After its first statements were committed, and with an index that was not completed."""
    await grow(empty_url, LANDED[LANDED.index(revision) - 1])
    await fill(empty_url, LANDED[LANDED.index(revision) - 1])

    class Killed(Exception):
        pass

    built: list[str] = []

    def kill(_connection: Connection, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("CREATE INDEX CONCURRENTLY"):
            built.append(statement)
        elif built and "lock_timeout" not in statement and "pg_index" not in statement:
            raise Killed

    event.listen(Engine, "before_cursor_execute", kill)
    try:
        with pytest.raises(Killed):
            await schema.upgrade(empty_url, revision)
    finally:
        event.remove(Engine, "before_cursor_execute", kill)
    (name,) = {statement.split()[3] for statement in built[:1]}
    await run(empty_url, f"UPDATE pg_index SET indisvalid = false WHERE indexrelid = '{name}'::regclass")
    assert await revisions.current_revision(empty_url) == LANDED[LANDED.index(revision) - 1]
    await schema.upgrade(empty_url)
    await schema.check(empty_url)
    assert await read(empty_url, "SELECT indexrelid::regclass::text FROM pg_index WHERE NOT indisvalid") == []
    (sums,) = await read(empty_url, _BILLED)
    assert sums[0] == sums[1]


async def test_jobs_that_were_left_out_are_billed_beside_a_replica_that_writes(empty_url: str) -> None:
    """Each once: those that an older replica wrote without lines, and those of a replica that goes on meanwhile."""
    await grow(empty_url, "revenue")
    await run(empty_url, _WITHOUT_LINES)
    connection = await connect(empty_url)
    one = _WITHOUT_LINES.split(";")[1].replace("generate_series(1, 3)", "generate_series(1, 1)")
    line = f"""
        INSERT INTO payout_open VALUES ('{NODE}', (now() AT TIME ZONE 'UTC' - interval '3 minutes')::date, '{MODEL}',
            'olga', 1, 1, 2, 0.25, 0.05, 0.025)
        ON CONFLICT (node_id, day, model_id, node_owner) DO UPDATE SET
            jobs = payout_open.jobs + 1, gross_usd = payout_open.gross_usd + 0.25
    """
    ended = asyncio.Event()

    async def write() -> int:
        written = 0
        while not ended.is_set():
            async with connection.transaction():
                await connection.execute(one)
                await connection.execute(line)
            written += 1
        return written

    writing = asyncio.create_task(write())
    try:
        await asyncio.sleep(0.1)
        await schema.upgrade(empty_url, "money")
        await asyncio.sleep(0.1)
    finally:
        ended.set()
        written = await writing
        await connection.close()
    assert written > 2
    (sums,) = await read(empty_url, _BILLED)
    assert sums[0] == sums[1]
