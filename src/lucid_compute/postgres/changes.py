"""Wakes the other replicas: what is written here they read at once, and not only at the next poll of their feed."""

from __future__ import annotations

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

CHANGES_CHANNEL = "lucid_changes"
_NOTIFY = f"NOTIFY {CHANGES_CHANNEL}"


async def announce(connection: AsyncConnection | asyncpg.Connection[asyncpg.Record]) -> None:
    """Wake the feed of every replica when the connection's transaction commits.

    Call it in each transaction that changes what replicas hold in memory: passports, nodes and keys.
    """
    if isinstance(connection, AsyncConnection):
        await connection.execute(text(_NOTIFY))
    else:
        await connection.execute(_NOTIFY)
