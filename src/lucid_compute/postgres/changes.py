"""NOTIFY for other replicas: it wakes their change feeds, so they read a change at once and not at the next poll."""

from __future__ import annotations

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

CHANGES_CHANNEL = "lucid_changes"
_NOTIFY = f"NOTIFY {CHANGES_CHANNEL}"


async def announce(connection: AsyncConnection | asyncpg.Connection[asyncpg.Record]) -> None:
    """Wake the change feed of every replica when the connection's transaction commits.

    Call it in each transaction that changes what replicas keep in memory: passports, nodes and keys.
    """
    if isinstance(connection, AsyncConnection):
        await connection.execute(text(_NOTIFY))
    else:
        await connection.execute(_NOTIFY)
