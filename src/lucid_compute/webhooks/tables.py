"""The tables of webhooks: subscriptions, the outbox of deliveries, and changes of models' availability."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    Table,
    Text,
    false,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, UUID

from lucid_compute.postgres.tables import VACUUMED_OFTEN, metadata
from lucid_compute.webhooks.shapes import DeliveryState

_NOW = func.now()

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", UUID(as_uuid=False), primary_key=True),
    Column("owner", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("former_secret", Text),
    Column("former_secret_until", DateTime(timezone=True)),
    Column("older_secrets", JSONB, nullable=False, server_default=text("'[]'")),  # each with its `until`
    Column("events", ARRAY(Text), nullable=False),
    Column("all_owners", Boolean, nullable=False, server_default=false()),
    Column("passport_ids", ARRAY(UUID(as_uuid=False))),
    Column("failing_since", DateTime(timezone=True)),
    Column("disabled_at", DateTime(timezone=True)),
    Column("disabled_reason", Text),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    Index("webhooks_newest_idx", "owner", text("created_at DESC"), "id"),
    Index("webhooks_all_owners_idx", "id", postgresql_where=text("all_owners")),
)

# A row for each event and webhook, written with the event. Only the oldest waiting row of a node or model can be due.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("position", BigInteger, Identity(), primary_key=True),
    Column("webhook_id", UUID(as_uuid=False), ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False),
    Column("event_id", UUID(as_uuid=False), nullable=False),
    Column("subject_id", UUID(as_uuid=False), nullable=False),
    Column("type", Text, nullable=False),
    Column("occurred_at", DateTime(timezone=True), nullable=False),
    Column("payload", JSONB, nullable=False),
    Column("state", Text, nullable=False, server_default=DeliveryState.WAITING.value),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("last_attempts", JSONB, nullable=False, server_default=text("'[]'")),
    Column("first_attempt_at", DateTime(timezone=True)),
    Column("next_attempt_at", DateTime(timezone=True), nullable=False, server_default=_NOW),
    Column("claimed_until", DateTime(timezone=True)),
    Column("ended_at", DateTime(timezone=True)),
    Index(
        "webhook_deliveries_waiting_idx",
        "webhook_id",
        "subject_id",
        "position",
        postgresql_where=text(f"state = '{DeliveryState.WAITING}'"),
    ),
    Index(
        "webhook_deliveries_due_idx",
        "webhook_id",
        "next_attempt_at",
        "position",
        postgresql_where=text(f"state = '{DeliveryState.WAITING}'"),
    ),
    Index(
        "webhook_deliveries_claimed_idx",
        "webhook_id",
        "claimed_until",
        postgresql_where=text(f"state = '{DeliveryState.WAITING}' AND claimed_until IS NOT NULL"),
    ),
    Index("webhook_deliveries_newest_idx", "webhook_id", text("position DESC")),
    Index("webhook_deliveries_ended_idx", "ended_at"),
    postgresql_with=VACUUMED_OFTEN,
)

# A row for each change of a model's availability that became an event. A model's first row is where it began: no event.
model_states = Table(
    "model_states",
    metadata,
    Column("model_id", UUID(as_uuid=False), primary_key=True),
    Column("since", DateTime(timezone=True), primary_key=True),
    Column("is_available", Boolean, nullable=False),
    Column("is_first", Boolean, nullable=False),
    Index("model_states_since_idx", "since"),
)
