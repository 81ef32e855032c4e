"""The tables of the rollups: sums of jobs, of heartbeats' samples and of consumption, and states of nodes.

There are no foreign keys to passports: rollups outlive nodes and models, as the ledger does.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    Index,
    Integer,
    Numeric,
    Table,
    Text,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, REAL, UUID

from lucid_compute.accounting.rollup_columns import (
    GAUGE_COLUMNS,
    JOB_COLUMNS,
    JOB_COUNTS,
    NARROW,
    WIDE,
    RollupColumn,
    Width,
)
from lucid_compute.postgres.tables import VACUUMED_OFTEN, metadata

_TYPES: dict[str, Any] = {
    "integer": Integer,
    "bigint": BigInteger,
    "real": REAL,
    "double precision": Double,
    "numeric": Numeric,
    "jsonb": JSONB,
    "integer[]": ARRAY(Integer),
    "bigint[]": ARRAY(BigInteger),
}
USAGE_COUNTS = ("requests", "completed", "failed", "rejected", "cancelled", "tokens_in", "tokens_out")
_ALWAYS_KNOWN = {*JOB_COUNTS, "samples"}


def _key(name: str) -> Column[Any]:
    return Column(name, UUID(as_uuid=False), primary_key=True)


def _bucket() -> Column[Any]:
    return Column("bucket", DateTime(timezone=True), primary_key=True)


def _values(columns: tuple[RollupColumn, ...], width: Width) -> list[Column[Any]]:
    return [
        Column(column.name, _TYPES[column.sql_type(width)], nullable=column.name not in _ALWAYS_KNOWN)
        for column in columns
    ]


# The minutes that are not moved yet: few rows, each updated in place many times.
job_open = Table(
    "job_open",
    metadata,
    _key("node_id"),
    _bucket(),
    _key("model_id"),
    Column("node_owner", Text, primary_key=True),
    *_values(JOB_COLUMNS, NARROW),
    postgresql_with={"fillfactor": "50"},
)
gauge_open = Table(
    "gauge_open",
    metadata,
    _key("node_id"),
    _bucket(),
    Column("node_owner", Text, nullable=False),
    *_values(GAUGE_COLUMNS, NARROW),
    postgresql_with={"fillfactor": "50"},
)

# Written once and read by their keys, which begin with time: new rows are stored together, and so are old ones.
for _tier, _width in (("minutes", NARROW), ("hours", WIDE), ("days", WIDE)):
    _options: Any = {"postgresql_with": VACUUMED_OFTEN} if _tier == "minutes" else {}
    _job_keys = (_bucket(), _key("scope_id"), _key("model_id"))
    Table(f"job_{_tier}", metadata, *_job_keys, *_values(JOB_COLUMNS, _width), **_options)
    Table(f"gauge_{_tier}", metadata, _bucket(), _key("scope_id"), *_values(GAUGE_COLUMNS, _width), **_options)

# The last flush of each writer, of samples or of refusals (`exactly_once`).
gauge_flushes = Table(
    "gauge_flushes",
    metadata,
    _key("replica_id"),
    Column("number", BigInteger, nullable=False),
    Column("at", DateTime(timezone=True), nullable=False, server_default=func.now()),
)

# One row: since when there are rollups, and up to where minutes and hours have been added up. A part is of the next
# hour or day while it is being added up; an older version, which knows no parts, can't raise the mark over it.
record_marks = Table(
    "record_marks",
    metadata,
    Column("is_only", Boolean, primary_key=True, server_default=text("true")),
    Column("began_at", DateTime(timezone=True), nullable=False),
    Column("hours_until", DateTime(timezone=True), nullable=False),
    Column("days_until", DateTime(timezone=True), nullable=False),
    Column("hours_part", DateTime(timezone=True)),
    Column("days_part", DateTime(timezone=True)),
    CheckConstraint("hours_part > hours_until AND days_part > days_until", name="record_marks_keep_parts"),
)

# A row for each change of a node's status: uptime is computed from these.
node_states = Table(
    "node_states",
    metadata,
    _key("node_id"),
    Column("since", DateTime(timezone=True), primary_key=True),
    Column("state", Text, nullable=False),
    Column("owner", Text, nullable=False),
    Index("node_states_since_idx", "since"),
)

# What each key consumed on a UTC day, by model. Only a trigger of `jobs` writes it, in the statement that writes the
# jobs (`usage`). Requests are counted by their first attempt, everything else by attempt.
usage_days = Table(
    "usage_days",
    metadata,
    Column("consumer", Text, primary_key=True),
    Column("day", Date, primary_key=True),
    Column("key_id", Text, primary_key=True),
    _key("model_id"),
    *(Column(name, BigInteger, nullable=False) for name in USAGE_COUNTS),
    Column("price_usd", Numeric, nullable=False),
    Index("usage_days_of_key_idx", "key_id", "day"),
    Index("usage_days_day_idx", "day"),
    postgresql_with={"fillfactor": "50", **VACUUMED_OFTEN},
)

# One row: jobs that started before this instant are not counted by the trigger, but by the migration that fills in
# what was there before. It is -infinity when that is done.
usage_marks = Table(
    "usage_marks",
    metadata,
    Column("is_only", Boolean, primary_key=True, server_default=text("true")),
    Column("filled_since", DateTime(timezone=True), nullable=False),
)
