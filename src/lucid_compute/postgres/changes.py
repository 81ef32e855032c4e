"""What change feeds follow: NOTIFY, so that they read a change at once, and the numbers of the rows' transactions."""

from __future__ import annotations

import asyncpg
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.postgres.database import SLOW_CONNECT_TIMEOUT_SECONDS, connect

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


async def adopt_rows(connection: asyncpg.Connection[asyncpg.Record]) -> None:
    """Assign the current transaction to rows whose transaction numbers are ahead of this cluster's.

    Such rows come from a dump of another cluster. Without this, the feed would read them at every poll, and a drain
    among them would never count as applied.
    """
    for table in ("passports", "nodes", "api_keys", "heartbeat_batches"):
        ahead = f"UPDATE {table} SET changed_xid = pg_current_xact_id() WHERE changed_xid > pg_current_xact_id()"
        await connection.execute(ahead)
    await connection.execute("UPDATE nodes SET drain_xid = pg_current_xact_id() WHERE drain_xid > pg_current_xact_id()")


async def adopt_restored_rows(url: str) -> None:
    """Call `adopt_rows` on a connection of its own."""
    connection = await connect(url, lock_timeout_seconds=0, timeout_seconds=SLOW_CONNECT_TIMEOUT_SECONDS)
    try:
        await adopt_rows(connection)
    finally:
        await connection.close()
