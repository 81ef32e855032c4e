"""The claim behind the payouts: a month of ten thousand nodes is reported and closed within seconds.

On an embedded Postgres (fsync on): reports of one provider, of the owner of all models and of everybody, before and
after the month is closed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from datetime import UTC, datetime, timedelta
from typing import Any

from benchmarks.servers import data_folder, postgres_of
from lucid_compute.accounting.payouts.store import PayoutStore
from lucid_compute.postgres import schema
from lucid_compute.postgres.database import Database, connect
from lucid_compute.registry.domain.identity import SYSTEM

NODES, OWNERS, MODELS, DAYS = 10_000, 1_000, 20, 30
_NODES = f"""
    INSERT INTO passports (id, type, owner, name)
    SELECT gen_random_uuid(), 'compute', 'owner-' || g % {OWNERS}, 'node-' || g FROM generate_series(1, {NODES}) g
"""
_MODELS = f"""
    INSERT INTO passports (id, type, owner, name) SELECT gen_random_uuid(), 'model', 'lab', 'model-' || g
    FROM generate_series(1, {MODELS}) g
"""
_LINES = f"""
    INSERT INTO payout_open
    SELECT n.id, (now() AT TIME ZONE 'UTC')::date - d, m.id, n.owner, 1000, 100000, 20000, 0.123456789012345, 0.02, 0.01
    FROM generate_series(1, {DAYS}) d, passports n, LATERAL (
        SELECT id FROM passports WHERE type = 'model' AND name = 'model-' || (1 + d % {MODELS})
    ) m WHERE n.type = 'compute'
"""
_FAILURES = """
    INSERT INTO jobs (id, attempt, replica_id, model_id, model_name, node_id, node_owner, key_id, consumer, endpoint,
        is_stream, started_at, outcome, reason, are_tokens_counted)
    SELECT gen_random_uuid(), 1, n.id, m.id, m.name, n.id, n.owner, 'k', 'c', 'chat/completions', false,
        now() - interval '2 days', 'failed', 'http_503', false
    FROM passports n, passports m WHERE n.type = 'compute' AND m.type = 'model' AND m.name = 'model-1'
"""


def main() -> None:
    """Measure, and print it."""
    with data_folder() as folder, postgres_of(folder) as url:
        asyncio.run(_measure(url))


async def _measure(url: str) -> None:
    await schema.upgrade(url)
    connection = await connect(url)
    # Only a session without triggers can write lines without jobs.
    for statement in (_NODES, _MODELS, "SET session_replication_role = replica", _LINES, _FAILURES):
        await connection.execute(statement)
    await connection.execute("ANALYZE")
    await connection.close()
    database = Database(url)
    store, until = PayoutStore(database), datetime.now(UTC).date()
    since = until - timedelta(days=DAYS)
    await _report(store, since, until)
    await _time("closing the month", store.close(SYSTEM, since, until))
    await _report(store, since, until)
    await store.long_transactions.close()
    await database.close()


async def _report(store: PayoutStore, since: Any, until: Any) -> None:
    for name, owner in (
        ("a provider of ten nodes", "owner-1"),
        ("the owner of all models", "lab"),
        ("everybody", None),
    ):
        await _time(name, store.sums(since, until, owner=owner))
    await _time("what everybody lost, a failure on each node", store.losses.read(since, until, owner=None))


async def _time(name: str, work: Awaitable[object]) -> None:
    began = time.perf_counter()
    await work
    print(f"{name:<44}{time.perf_counter() - began:>10.2f} s")


if __name__ == "__main__":
    main()
