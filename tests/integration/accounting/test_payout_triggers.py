"""The triggers that bill jobs: their definition in the code equals that of a migrated database."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from uuid import uuid4

import asyncpg
import pytest

from lucid_compute.accounting import usage
from lucid_compute.accounting.payouts import sql
from lucid_compute.postgres.database import connect

_FUNCTIONS = """
    SELECT DISTINCT p.proname AS name, pg_get_functiondef(p.oid) AS text
    FROM pg_trigger JOIN pg_proc p ON p.oid = tgfoid
    WHERE NOT tgisinternal AND (tgrelid = 'jobs'::regclass OR tgrelid::regclass::text LIKE 'payout%')
"""
_TRIGGERS = """
    SELECT tgname AS name, pg_get_triggerdef(oid) AS text FROM pg_trigger
    WHERE NOT tgisinternal AND (tgrelid = 'jobs'::regclass OR tgrelid::regclass::text LIKE 'payout%')
"""
FUNCTIONS, TRIGGERS = {**sql.FUNCTIONS, **usage.FUNCTIONS}, {**sql.TRIGGERS, **usage.TRIGGERS}
_COLUMNS = (
    *("id", "attempt", "replica_id", "model_id", "model_name", "node_id", "node_owner", "key_id", "consumer"),
    *("endpoint", "is_stream", "started_at", "outcome", "are_tokens_counted", "price_usd"),
)
_CLOSE = """
    WITH period AS (
        INSERT INTO public.payout_periods (id, starts_on, ends_on, closed_by) VALUES ($1, $2, $3, 'key')
    )
    INSERT INTO public.payout_lines (period_id, node_id, day, model_id, node_owner, jobs, tokens_in, tokens_out,
        gross_usd, model_owner_usd, protocol_usd, node_name, model_name)
    SELECT $1, node_id, day, model_id, node_owner, jobs, tokens_in, tokens_out, gross_usd, model_owner_usd,
        protocol_usd, 'rack', 'm' FROM public.payout_open
"""


async def found(connection: asyncpg.Connection[asyncpg.Record], statement: str) -> dict[str, str]:
    """Definitions by name, as Postgres prints them, whatever their line breaks."""
    rows = await connection.fetch(statement)
    return {row["name"]: " ".join(row["text"].replace("$function$", " ").split()) for row in rows}


async def test_a_migrated_database_bills_by_the_text_that_the_code_shows(database_url: str) -> None:
    """Putting the code's functions and triggers in place of those that are there changes nothing."""
    connection = await connect(database_url)
    try:
        functions, triggers = await found(connection, _FUNCTIONS), await found(connection, _TRIGGERS)
        assert (functions.keys(), triggers.keys()) == (FUNCTIONS.keys(), TRIGGERS.keys())
        for name, body in FUNCTIONS.items():
            head = f"CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql"
            await connection.execute(f"{head} SET search_path = public, pg_temp AS $${body}$$")
        for name, text in TRIGGERS.items():
            await connection.execute(f"CREATE OR REPLACE TRIGGER {name} {text}")
        assert await found(connection, _FUNCTIONS) == functions
        assert await found(connection, _TRIGGERS) == triggers
    finally:
        await connection.close()


@pytest.mark.parametrize("search_path", ["''", "pg_catalog", "elsewhere, pg_temp, public"])
async def test_a_session_with_another_search_path_bills_what_it_copies(database_url: str, search_path: str) -> None:
    """As pg_dump's scripts, replication and tools do; tables of the same name elsewhere are left alone."""
    ids = [uuid4() for _ in range(5)]
    job = (1, ids[0], ids[1], "m", ids[2], "olga", "key", "carl", "chat/completions", False)
    rows = [(id_, *job, datetime.now(UTC), "completed", True, Decimal("0.5")) for id_ in ids]
    connection = await connect(database_url)
    try:
        await connection.execute("CREATE SCHEMA elsewhere; CREATE TABLE elsewhere.payout_open (LIKE payout_open)")
        await connection.execute("CREATE TABLE elsewhere.payout_terms (LIKE payout_terms)")
        await connection.execute("CREATE TEMPORARY TABLE payout_open (LIKE payout_open)")
        await connection.execute(f"SET search_path = {search_path}")
        await connection.copy_records_to_table("jobs", schema_name="public", records=rows, columns=_COLUMNS)
        line = await connection.fetchrow("SELECT jobs, gross_usd FROM public.payout_open")
        assert tuple(line or ()) == (5, Decimal("2.5"))
        async with connection.transaction():
            await connection.execute(_CLOSE, ids[0], date(2026, 11, 1), date(2026, 12, 1))
    finally:
        await connection.close()


async def test_every_trigger_function_has_a_search_path_of_its_own(database_url: str) -> None:
    """A migration that replaces one has to say it again: CREATE OR REPLACE forgets it."""
    ours = "SELECT proname, proconfig FROM pg_proc WHERE pronamespace = 'public'::regnamespace AND prorettype = $1"
    connection = await connect(database_url)
    try:
        rows = await connection.fetch(ours, await connection.fetchval("SELECT 'trigger'::regtype::oid"))
        assert {row["proname"] for row in rows} >= {*FUNCTIONS, "audit_log_is_append_only"}
        assert [row["proname"] for row in rows if row["proconfig"] != ["search_path=public, pg_temp"]] == []
    finally:
        await connection.close()
