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


async def find_break(
    connection: asyncpg.Connection[asyncpg.Record],
    replica_id: str,
    identity: Identity,
    progress: Progress,
    *,
    away: timedelta,
) -> str | None:
    """Return why the replica can't read on where it stopped, in words; None when it can.

    `away` is how long ago that was by this machine's clock, as Postgres's may have stepped.
    """
    if any(None not in pair and pair[0] != pair[1] for pair in zip(identity, progress.identity, strict=False)):
        return "it is another database, or another timeline of it"
    ((snapshot, now, lease),) = await connection.fetch(_NOW, replica_id)
    if not Snapshot.parse(snapshot).covers(progress.snapshot) or lease is None or lease < progress.lease:
        return "it lost commits"
    if max(now - progress.read_at, away) > RESUME_WITHIN:
        return "it was not read for too long"
    return None


async def _find(connection: asyncpg.Connection[asyncpg.Record], statement: str) -> str | None:
    try:
        value: str | None = await connection.fetchval(statement)
    except asyncpg.PostgresError as error:
        if is_transient(error):
            raise
        return None
    return value
