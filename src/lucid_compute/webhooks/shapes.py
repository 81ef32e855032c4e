"""Requests and responses of the webhook routes, and the message that a receiver gets."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from lucid_compute.egress.policy import MAX_URL_CHARACTERS
from lucid_compute.registry.domain.event_types import WebhookEvent
from lucid_compute.wire import Flag, Identifier, Instant, Pagination, ResponseShape, WireShape

MAX_PASSPORTS = 100  # of a webhook


class WebhookStatus(StrEnum):
    """Whether a webhook gets events."""

    ACTIVE = "active"
    DISABLED = "disabled"


class DeliveryState(StrEnum):
    """The state of a delivery."""

    WAITING = "waiting"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


class WebhookCreate(WireShape):
    """A webhook to create. Without `events` it gets all kinds of events that exist now."""

    model_config = {
        "json_schema_extra": {
            "examples": [{"url": "https://ops.example.com/lucid", "events": ["node.unhealthy", "node.recovered"]}]
        }
    }

    url: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]+$", max_length=MAX_URL_CHARACTERS)] = Field(
        description="http or https, as provider URLs are, with a query if wanted: a public address, no user name."
    )
    events: Annotated[list[WebhookEvent], Field(min_length=1, max_length=32)] | None = None
    passport_ids: Annotated[list[Identifier], Field(min_length=1, max_length=MAX_PASSPORTS)] | None = Field(
        default=None, description="Send events of these nodes and models alone."
    )
    owner: Identifier | None = Field(default=None, description="Another owner than the key's; admins only.")
    all_owners: Flag = Field(default=False, description="Send events of every owner's nodes and models; admins only.")


class WebhookRotate(WireShape):
    """How to rotate: with `now` the previous secret ends at once, else it signs as well for 24 hours."""

    model_config = {"json_schema_extra": {"examples": [{"now": True}]}}

    now: Flag = False


class WebhookView(ResponseShape):
    """A webhook without its secret."""

    id: str
    url: str = Field(description="With `***` for each value in its query, for these are often tokens.")
    owner: str
    all_owners: bool
    events: list[str]
    passport_ids: list[str] | None
    status: WebhookStatus
    failing_since: Instant | None = Field(description="Since when no delivery succeeded; null when the last one did.")
    disabled_at: Instant | None
    disabled_reason: str | None
    created_at: Instant


class NewWebhook(WebhookView):
    """A webhook with the secret that signs its deliveries. The secret is shown once."""

    secret: str
    notice: str | None = Field(default=None, description="What to know about it: for example that it covers no node.")


class WebhookList(ResponseShape):
    """A page of webhooks."""

    webhooks: list[WebhookView]
    pagination: Pagination


class DeliveryAttempt(ResponseShape):
    """One attempt. `result` is the class of the status, such as `2xx`, or why there was none: `connect_failed`."""

    at: Instant
    result: str
    milliseconds: float


class DeliveryView(ResponseShape):
    """The delivery of an event to a webhook. `id` is the event's, the same in each attempt and for each webhook."""

    id: str
    type: str
    passport_id: str | None = Field(description="The node or the model; null for a test.")
    occurred_at: Instant
    state: DeliveryState
    attempts: int
    next_attempt_at: Instant | None
    last_attempts: list[DeliveryAttempt] = Field(description="The last ten, newest first.")


class DeliveryList(ResponseShape):
    """A page of deliveries, newest first."""

    deliveries: list[DeliveryView]
    pagination: Pagination


class WebhookMessage(ResponseShape):
    """The message that a receiver gets: an event, the same in each attempt and for each webhook."""

    id: str
    type: str
    occurred_at: Instant
    passport_id: str = Field(description="The node or the model; in a test the webhook.")
    owner: str | None = Field(default=None, description="The owner of the node or model; null in a test.")
    name: str | None = None
    reason: str | None = None
    details: dict[str, Any] = {}


class WebhookTest(ResponseShape):
    """The outcome of a test."""

    event_id: str
    delivered: bool
    result: str
    milliseconds: float
    message: str
