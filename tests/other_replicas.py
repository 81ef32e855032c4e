"""What time and other replicas do to a database, done here in SQL, as a test's replica then sees it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import uuid4

from lucid_compute.postgres.database import connect
from tests.api import Api

APPLIED_NOTHING = "3:3:"
APPLIED_EVERYTHING = "1000000000:1000000000:"


async def run_sql(api: Api, statement: str, *arguments: Any) -> list[Any]:
    """Run one statement on a connection of its own; return its rows."""
    connection = await connect(api.replica.database.url, application="lucid tests")
    try:
        return list(await connection.fetch(statement, *arguments))
    finally:
        await connection.close()


async def let_pass(api: Api, passport_id: str, seconds: float) -> None:
    """Make the node's newest heartbeat `seconds` old, as the replica reads it."""
    await run_sql(
        api,
        "UPDATE heartbeats SET received_at = clock_timestamp() - make_interval(secs => $2), revision = revision + 1 "
        "WHERE passport_id = $1",
        passport_id,
        seconds,
    )
    await run_sql(
        api,
        "INSERT INTO heartbeat_batches (replica_id, passport_ids) VALUES ($1, ARRAY[$2::uuid])",
        str(uuid4()),
        passport_id,
    )

    async def is_seen() -> bool:
        return float((await api.health(passport_id))["heartbeatAgeSeconds"]) >= seconds

    await until(is_seen)


async def add_lease(api: Api, *, applied: str = APPLIED_EVERYTHING, in_flight: dict[str, int] | None = None) -> str:
    """Let another replica live for the next ten seconds; return its id once this replica has seen it."""
    replica_id = str(uuid4())
    seen = api.replica.fleet.replicas.count()
    await run_sql(
        api,
        "INSERT INTO replicas (id, applied_snapshot, in_flight) VALUES ($1, $2, $3::jsonb)",
        replica_id,
        applied,
        json.dumps(in_flight or {}),
    )

    async def is_seen() -> bool:
        return api.replica.fleet.replicas.count() > seen

    await until(is_seen)
    return replica_id


async def change_lease(api: Api, replica_id: str, *, applied: str, in_flight: dict[str, int] | None = None) -> None:
    """Let another replica renew its lease with what it has applied and what runs on it now."""
    await run_sql(
        api,
        "UPDATE replicas SET seen_at = clock_timestamp(), applied_at = clock_timestamp(), applied_snapshot = $2, "
        "in_flight = $3::jsonb WHERE id = $1",
        replica_id,
        applied,
        json.dumps(in_flight or {}),
    )


async def until(is_so: Callable[[], Awaitable[bool]], deadline_seconds: float = 5.0) -> None:
    """Wait until `is_so` answers true.

    Raises:
        TimeoutError: it did not within `deadline_seconds`.
    """
    async with asyncio.timeout(deadline_seconds):
        while not await is_so():  # noqa: ASYNC110 - another replica sets no event of ours
            await asyncio.sleep(0.02)
