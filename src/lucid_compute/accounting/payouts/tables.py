"""The tables of payouts: open lines, closed periods, their lines and corrections, terms, and refused requests.

Triggers refuse every change of what is closed. There are no foreign keys to passports, as in the ledger.
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
    Index,
    Integer,
    LargeBinary,
    Numeric,
    Table,
    Text,
    func,
    true,
)
from sqlalchemy.dialects.postgresql import UUID

from lucid_compute.postgres.tables import VACUUMED_OFTEN, metadata

TERMS_ARE_WHOLE = "provider_bps + model_owner_bps + protocol_bps = 10000"

TERMS_ARE_PARTS = "least(provider_bps, model_owner_bps, protocol_bps) >= 0"

CORRECTION_OWNER = "(owner IS NULL) = (role = 'protocol') AND role IN ('provider', 'model_owner', 'protocol')"


def _id(name: str, **options: Any) -> Column[Any]:
    return Column(name, UUID(as_uuid=False), **options)


def _keys() -> tuple[Column[Any], ...]:
    """Return the key columns of a line: jobs that started on one UTC day, of one model on one node."""
    return (
        _id("node_id", primary_key=True),
        Column("day", Date, primary_key=True),
        _id("model_id", primary_key=True),
        Column("node_owner", Text, primary_key=True),
    )


def _sums() -> tuple[Column[Any], ...]:
    """Return the sum columns of a line. The provider's part is what the other two parts leave of `gross_usd`."""
    counts = ("jobs", "tokens_in", "tokens_out")
    amounts = ("gross_usd", "model_owner_usd", "protocol_usd")
    return (
        *(Column(name, BigInteger, nullable=False) for name in counts),
        *(Column(name, Numeric, nullable=False) for name in amounts),
    )


# Only a trigger of `jobs` writes these lines, in the statement that writes the jobs. Closing a period moves lines away.
payout_open = Table(
    "payout_open",
    metadata,
    *_keys(),
    *_sums(),
    Index("payout_open_day_idx", "day"),
    Index("payout_open_provider_idx", "node_owner", "day"),
    Index("payout_open_model_idx", "model_id", "day"),
    postgresql_with={"fillfactor": "50", **VACUUMED_OFTEN},
)

payout_periods = Table(
    "payout_periods",
    metadata,
    _id("id", primary_key=True),
    Column("starts_on", Date, nullable=False),
    Column("ends_on", Date, nullable=False),
    Column("closed_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("closed_by", Text, nullable=False),
    CheckConstraint("starts_on < ends_on", name="payout_periods_have_days"),
    Index("payout_periods_start_key", "starts_on", unique=True),
    Index("payout_periods_end_key", "ends_on", unique=True),
)

# Names and the model's owner are of the time when the period was closed, so that a statement never changes.
payout_lines = Table(
    "payout_lines",
    metadata,
    _id("period_id", primary_key=True),
    *_keys(),
    *_sums(),
    Column("node_name", Text, nullable=False),
    Column("model_name", Text, nullable=False),
    Column("model_owner", Text),
    Index("payout_lines_day_idx", "day"),
    Index("payout_lines_provider_idx", "node_owner", "day"),
    Index("payout_lines_model_owner_idx", "model_owner", "day"),
    postgresql_with=VACUUMED_OFTEN,
)

# The period that is being closed: its lines are moved in steps, and then it becomes a row of `payout_periods`.
payout_closings = Table(
    "payout_closings",
    metadata,
    _id("period_id", nullable=False),
    Column("starts_on", Date, nullable=False),
    Column("ends_on", Date, nullable=False),
    Column("begun_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("closed_by", Text, nullable=False),
    Column("is_only", Boolean, primary_key=True, server_default=true()),
    CheckConstraint("is_only", name="payout_closings_are_one"),
)

# Signed amounts that put a closed period right. `day` is in a later period.
payout_corrections = Table(
    "payout_corrections",
    metadata,
    _id("id", primary_key=True),
    Column("line", Integer, primary_key=True),
    _id("period_id", nullable=False),
    Column("day", Date, nullable=False),
    Column("role", Text, nullable=False),
    Column("owner", Text),
    Column("amount_usd", Numeric, nullable=False),
    Column("reason", Text, nullable=False),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=func.now()),
    Column("created_by", Text, nullable=False),
    Column("idempotency_key", Text),
    Column("body_hash", LargeBinary),
    CheckConstraint(CORRECTION_OWNER, name="payout_corrections_have_owners"),
    CheckConstraint("amount_usd <> 0", name="payout_corrections_change_something"),
    Index("payout_corrections_day_idx", "day"),
    Index("payout_corrections_key", "created_by", "idempotency_key", "line", unique=True),
)

# A price is split by the terms that were valid when its job started.
payout_terms = Table(
    "payout_terms",
    metadata,
    Column("since", DateTime(timezone=True), primary_key=True, server_default=func.now()),
    *(Column(name, Integer, nullable=False) for name in ("provider_bps", "model_owner_bps", "protocol_bps")),
    CheckConstraint(TERMS_ARE_WHOLE, name="payout_terms_are_whole"),
    CheckConstraint(TERMS_ARE_PARTS, name="payout_terms_are_parts"),
)

# Requests that were refused before they reached a node, by hour. `consumer` is empty when the key is unknown,
# `model_id` all zeros when the model is. Who is responsible, and the estimate, are computed when rows are read.
refusals = Table(
    "refusals",
    metadata,
    Column("hour", DateTime(timezone=True), primary_key=True),
    Column("consumer", Text, primary_key=True),
    _id("model_id", primary_key=True),
    Column("cause", Text, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    postgresql_with={"fillfactor": "50"},
)
