"""Tells whether a database is still the one that a replica has read, with everything that the replica has read.

It is not after an asynchronous standby was promoted, after a backup was restored under running replicas, and when the
URL leads to another server. Then revisions and transaction ids say nothing about what is newer.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import NamedTuple

import asyncpg

from lucid_compute.postgres.database import is_transient
from lucid_compute.registry.fleet.replicas import Snapshot

RESUME_WITHIN = timedelta(minutes=4)
"""A read can continue for so long after the previous one. The batches of heartbeats are kept for five minutes."""

# Some hosts refuse the first two. The name of a WAL file begins with the timeline, which a promotion changes at once;
# pg_control_checkpoint() tells of it only after the next checkpoint. A restore gives the table another file.
_IDENTITY = (
    "SELECT system_identifier::text FROM pg_control_system()",
    "SELECT substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8)",
    "SELECT concat_ws('/', oid, pg_relation_filenode('passports')) FROM pg_database WHERE datname = current_database()",
)
_NOW = """
    SELECT pg_current_snapshot()::text AS snapshot, clock_timestamp() AS now,
        (SELECT seen_at FROM replicas WHERE id = $1) AS lease
"""

Identity = tuple[str | None, ...]


class Progress(NamedTuple):
    """What a replica had read, and the last renewal of its lease that the database acknowledged."""

    identity: Identity
    snapshot: Snapshot
    read_at: datetime
    lease: datetime


async def read_identity(connection: asyncpg.Connection[asyncpg.Record]) -> Identity:
    """Return the database's system, timeline and files; None for what it does not tell us."""
    return tuple([await _find(connection, statement) for statement in _IDENTITY])


async def continues(
    connection: asyncpg.Connection[asyncpg.Record],
    replica_id: str,
    identity: Identity,
    progress: Progress,
    *,
    away: timedelta,
) -> bool:
    """Return whether the replica can read on where it stopped: nothing that it has read is lost, or too long ago.

    `away` is how long ago that was by this machine's clock, as Postgres's may have stepped.
    """
    if any(None not in pair and pair[0] != pair[1] for pair in zip(identity, progress.identity, strict=True)):
        return False
    ((snapshot, now, lease),) = await connection.fetch(_NOW, replica_id)
    is_recent = max(now - progress.read_at, away) <= RESUME_WITHIN
    has_all = Snapshot.parse(snapshot).covers(progress.snapshot) and lease is not None and lease >= progress.lease
    return is_recent and has_all


async def _find(connection: asyncpg.Connection[asyncpg.Record], statement: str) -> str | None:
    try:
        value: str | None = await connection.fetchval(statement)
    except asyncpg.PostgresError as error:
        if is_transient(error):
            raise
        return None
    return value
