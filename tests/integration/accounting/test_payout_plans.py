"""What a report of payouts reads: an owner's lines, however many others there are."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any

from lucid_compute.accounting.payouts.sql import OF_DAYS
from lucid_compute.accounting.payouts.store import PayoutStore
from lucid_compute.postgres.database import Database, connect
from lucid_compute.postgres.dedicated_connection import Purpose

LINES = 20_000
FILL = f"""
    SET session_replication_role = replica;
    INSERT INTO payout_open
    SELECT gen_random_uuid(), current_date, gen_random_uuid(), 'owner-' || n % 200, 1, 1, 1, 1, 0, 0
    FROM generate_series(1, {LINES}) n;
    RESET session_replication_role;
"""
OWN = LINES // 200


def rows_read(plan: dict[str, Any]) -> int:
    """Return how many rows of open lines a plan has looked at."""
    read = sum(rows_read(part) for part in plan.get("Plans", ()))
    if plan.get("Relation Name") == "payout_open":
        read += (plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)) * plan["Actual Loops"]
    return int(read)


async def test_a_report_reads_the_lines_of_its_owner_alone(database_url: str) -> None:
    """Also from the sixth call on, when Postgres may keep a plan for every owner, and on one connection."""
    connection = await connect(database_url)
    await connection.execute(FILL)
    await connection.execute("VACUUM ANALYZE payout_open")
    database = Database(database_url)
    store, today = PayoutStore(database), datetime.now(UTC).date()
    since, until = today - timedelta(days=2), today + timedelta(days=2)
    for _ in range(8):
        earned = await store.sums(since, until, owner="owner-7")
        assert [line.jobs for line in earned.totals] == [OWN]
    assert len((await store.sums(since, until, owner=None)).totals) > 1
    async with store.long_transactions.snapshot() as snapshot:
        assert (await snapshot.exec_driver_sql("SHOW plan_cache_mode")).scalar() == "force_custom_plan"
    opened = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = $1"
    assert await connection.fetchval(opened, Purpose.LONG_TRANSACTIONS.application) == 1

    for query in (OF_DAYS.parties, OF_DAYS.nodes):
        statement = query
        for name, value in {"since": since, "until": until, "owner": "owner-7", "models": "{}"}.items():
            statement = re.sub(rf"(?<!:):{name}\b", f"'{value}'", statement)
        (plan,) = json.loads(await connection.fetchval(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}"))
        assert 0 < rows_read(plan["Plan"]) <= 2 * OWN
    await connection.close()
    await store.long_transactions.close()
    await database.close()
