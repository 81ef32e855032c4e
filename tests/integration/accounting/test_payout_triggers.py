"""The triggers that bill jobs: their definition in the code equals that of a migrated database."""

from __future__ import annotations

import asyncpg

from lucid_compute.accounting.payouts.sql import FUNCTIONS, TRIGGERS
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
            await connection.execute(f"{head} AS $${body}$$")
        for name, text in TRIGGERS.items():
            await connection.execute(f"CREATE OR REPLACE TRIGGER {name} {text}")
        assert await found(connection, _FUNCTIONS) == functions
        assert await found(connection, _TRIGGERS) == triggers
    finally:
        await connection.close()
