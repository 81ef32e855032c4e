"""The tables of the registry and the job ledger, and the metadata that every `tables.py` adds to.

Two columns serve the change feed. `revision` grows with each write of a row, so that a replica can tell which of two
copies is newer. `changed_xid` is the transaction of the last write, so that it can tell which rows it has not seen.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Double,
    ForeignKey,
    Identity,
    Index,
    LargeBinary,
    MetaData,
    Numeric,
    SmallInteger,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID
from sqlalchemy.dialects.postgresql.base import ischema_names
from sqlalchemy.types import UserDefinedType

JOB_IS_FAULT = "outcome <> 'completed'"

metadata = MetaData(
    naming_convention={
        "ix": "%(table_name)s_%(column_0_N_name)s_idx",
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
    }
)


VACUUMED_OFTEN = {f"autovacuum_{each}_scale_factor": "0.01" for each in ("vacuum", "vacuum_insert", "analyze")}
"""For tables that grow without a bound: by default a fifth of their rows is dead or new before they are vacuumed."""


class TransactionId(UserDefinedType[Any]):
    """Postgres's `xid8`: a transaction's number, never reused."""

    cache_ok = True

    def get_col_spec(self, **_: object) -> str:
        """Return the type's name in SQL."""
        return "xid8"


ischema_names["xid8"] = TransactionId  # SQLAlchemy can't read such columns back without it


def _instant(name: str, *, nullable: bool = False, default: bool = False) -> Column[Any]:
    server_default = func.now() if default else None
    return Column(name, DateTime(timezone=True), nullable=nullable, server_default=server_default)


def _id(name: str = "id", **options: Any) -> Column[Any]:
    return Column(name, UUID(as_uuid=False), **options)


def _passport_id(**options: Any) -> Column[Any]:
    return Column("passport_id", UUID(as_uuid=False), ForeignKey("passports.id"), **options)


def _followed() -> tuple[Column[Any], Column[Any]]:
    """Return the two columns of a table that the change feed follows."""
    return (
        Column("revision", BigInteger, nullable=False, server_default=text("1")),
        Column("changed_xid", TransactionId, nullable=False, server_default=text("pg_current_xact_id()")),
    )


# One row. A migration that older replicas can't live with names its own revision there.
Table(
    "schema_compatibility",
    metadata,
    Column("only_row", Boolean, primary_key=True, server_default=text("true")),
    Column("oldest_revision", Text, nullable=False),
)

# One row. Ids of responses are sealed with it, so that a replica knows those of another: `gateway/stored_responses.py`.
response_secret = Table(
    "response_secret",
    metadata,
    Column("only_row", Boolean, primary_key=True, server_default=text("true")),
    Column("secret", LargeBinary, nullable=False),
)

passports = Table(
    "passports",
    metadata,
    _id(primary_key=True),
    Column("type", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("description", Text),
    Column("version", Text),
    Column("tags", ARRAY(Text), nullable=False, server_default=text("'{}'")),
    Column("status", Text, nullable=False, server_default=text("'active'")),
    Column("metadata", JSONB, nullable=False, server_default=text("'{}'")),
    Column("secrets", JSONB, nullable=False, server_default=text("'{}'")),
    _instant("created_at", default=True),
    _instant("updated_at", default=True),
    _instant("deregistered_at", nullable=True),
    *_followed(),
    Index(
        "passports_name_in_use_key",
        "owner",
        "type",
        "name",
        unique=True,
        postgresql_where=text("status <> 'revoked' AND deregistered_at IS NULL"),
    ),
    Index("passports_newest_idx", "owner", text("created_at DESC"), "id"),
    Index("passports_newest_of_type_idx", "type", text("created_at DESC"), "id"),
    Index("passports_changed_idx", "changed_xid"),
)

model_names = Table(
    "model_names",
    metadata,
    Column("name", Text, primary_key=True),
    _passport_id(nullable=False, index=True),
)

nodes = Table(
    "nodes",
    metadata,
    _passport_id(primary_key=True),
    Column("declared_models", JSONB, nullable=False, server_default=text("'[]'")),
    _instant("draining_since", nullable=True),
    Column("drain_xid", TransactionId),
    Column("recorded_state", Text, nullable=False, server_default=text("'registered'")),
    *_followed(),
    Index("nodes_changed_idx", "changed_xid"),
)

# Every heartbeat updates its row in place. Free space on each page, and no index on what changes, keep the update HOT.
heartbeats = Table(
    "heartbeats",
    metadata,
    _passport_id(primary_key=True),
    _instant("received_at", nullable=True),
    _instant("up_since", nullable=True),
    Column("status", Text),
    Column("boot_id", Text),
    Column("sequence", BigInteger),
    Column("report", JSONB),
    Column("revision", BigInteger, nullable=False, server_default=text("0")),
    postgresql_with={"fillfactor": "50"},
)

node_boots = Table(
    "node_boots",
    metadata,
    _passport_id(primary_key=True),
    Column("boot_id", Text, primary_key=True),
    _instant("first_seen_at", default=True),
)

# The rows that each group commit changed, so that other replicas read those and not all of `heartbeats`.
heartbeat_batches = Table(
    "heartbeat_batches",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _id("replica_id", nullable=False),
    Column("passport_ids", ARRAY(UUID(as_uuid=False)), nullable=False),
    _instant("at", default=True),
    Column("changed_xid", TransactionId, nullable=False, server_default=text("pg_current_xact_id()")),
    Index("heartbeat_batches_changed_idx", "changed_xid"),
)

node_events = Table(
    "node_events",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _passport_id(nullable=False),
    Column("type", Text, nullable=False),
    _instant("at", default=True),
    Column("reason", Text),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Index("node_events_newest_idx", "passport_id", text("at DESC"), text("id DESC")),
    Index("node_events_at_idx", text("at DESC"), text("id DESC")),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Column("scopes", ARRAY(Text), nullable=False),
    _passport_id(),
    Column("digest", LargeBinary, nullable=False),
    Column("former_digest", LargeBinary),
    _instant("former_valid_until", nullable=True),
    Column("prefix", Text, nullable=False),
    Column("last_four", Text, nullable=False),
    Column("limits", JSONB),
    Column("is_bootstrap", Boolean, nullable=False, server_default=text("false")),
    _instant("expires_at", nullable=True),
    _instant("created_at", default=True),
    _instant("rotated_at", nullable=True),
    _instant("revoked_at", nullable=True),
    _instant("last_used_at", nullable=True),
    *_followed(),
    Index("api_keys_newest_idx", text("created_at DESC"), "id"),
    Index("api_keys_changed_idx", "changed_xid"),
)

# The share of a key's limit that each replica holds: `share_out_limits` reads and writes it. Nothing of it outlives a
# crash of Postgres, and need not: replicas tell it again.
key_shares = Table(
    "key_shares",
    metadata,
    Column("key_id", Text, primary_key=True),
    Column("unit", Text, primary_key=True),
    Column("shares", JSONB, nullable=False, server_default=text("'{}'")),
    _instant("changed_at", default=True),
    prefixes=["UNLOGGED"],
    postgresql_with={"fillfactor": "50"},
)

audit_log = Table(
    "audit_log",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _instant("at", default=True),
    Column("actor_key_id", Text),
    Column("actor_owner", Text),
    Column("action", Text, nullable=False),
    Column("target_type", Text, nullable=False),
    Column("target_id", Text, nullable=False),
    Column("before_hash", Text),
    Column("after_hash", Text),
    Column("ip", Text),
    Column("request_id", Text),
    Column("details", JSONB, nullable=False, server_default=text("'{}'")),
    Index("audit_log_newest_idx", text("at DESC"), text("id DESC")),
    Index("audit_log_target_idx", "target_id"),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("owner", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("body_hash", LargeBinary, nullable=False),
    Column("result_id", Text),
    _instant("created_at", default=True),
    Index("idempotency_keys_created_idx", "created_at"),
)

replicas = Table(
    "replicas",
    metadata,
    _id(primary_key=True),
    _instant("started_at", default=True),
    _instant("seen_at", default=True),
    _instant("applied_at", default=True),
    Column("applied_snapshot", Text, nullable=False),
    Column("in_flight", JSONB, nullable=False, server_default=text("'{}'")),
)

outages = Table(
    "outages",
    metadata,
    Column("id", BigInteger, Identity(), primary_key=True),
    _instant("started_at"),
    _instant("ended_at"),
    Index("outages_ended_idx", "ended_at"),
)

# One row per attempt of a request on a node, without foreign keys: the ledger outlives nodes and models. `running` rows
# are of jobs that took longer than a second, or whose replica died. A node's faults are few: they have small indexes.
jobs = Table(
    "jobs",
    metadata,
    _id(primary_key=True),
    Column("attempt", SmallInteger, primary_key=True, autoincrement=False),
    _id("replica_id", nullable=False),
    _id("model_id", nullable=False),
    Column("model_name", Text, nullable=False),
    _id("node_id", nullable=True),
    Column("node_owner", Text),
    Column("key_id", Text, nullable=False),
    Column("consumer", Text, nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("is_stream", Boolean, nullable=False),
    _instant("started_at"),
    Column("outcome", Text, nullable=False),
    Column("reason", Text),
    Column("status", SmallInteger),
    Column("first_byte_ms", Double),
    Column("latency_ms", Double),
    *(Column(name, BigInteger) for name in ("tokens_in", "tokens_out")),
    Column("are_tokens_counted", Boolean, nullable=False),
    Column("price_usd", Numeric),
    Index("jobs_newest_idx", text("started_at DESC")),
    Index("jobs_newest_of_owner_idx", "node_owner", text("started_at DESC")),
    Index("jobs_newest_of_consumer_idx", "consumer", text("started_at DESC")),
    Index("jobs_newest_of_node_idx", "node_id", text("started_at DESC")),
    Index("jobs_newest_of_model_idx", "model_id", text("started_at DESC"), postgresql_include=["node_owner"]),
    Index("jobs_open_idx", "outcome", "replica_id", postgresql_where=text("outcome IN ('running', 'lost')")),
    Index("jobs_faults_of_owner_idx", "node_owner", text("started_at DESC"), postgresql_where=text(JOB_IS_FAULT)),
    Index("jobs_faults_of_node_idx", "node_id", text("started_at DESC"), postgresql_where=text(JOB_IS_FAULT)),
    postgresql_with=VACUUMED_OFTEN,
)

# Sums over `jobs`, written in the statement that writes the rows, so they always agree. Updated in place.
# `job_totals` counts every job that ended, `job_removals` those no longer in `jobs`. Rollups have the sums by minute.
job_totals, job_removals = (
    Table(
        name,
        metadata,
        *(_id("node_id", primary_key=True), Column("node_owner", Text)),
        *(Column(outcome, BigInteger, nullable=False) for outcome in ("completed", "failed", "rejected", "cancelled")),
        postgresql_with={"fillfactor": "50"},
    )
    for name in ("job_totals", "job_removals")
)
