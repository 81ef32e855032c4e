"""Jobs: one attempt of a request on a node, from dispatch to outcome, and what usage is added up by. Pure."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import StrEnum


class Outcome(StrEnum):
    """How a job ended."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"  # by the node: `reason` says why
    REJECTED = "rejected"  # nobody failed: the request was at fault, or its node was busy or lacks what it asks for
    CANCELLED = "cancelled"  # the client left, or its key was revoked
    LOST = "lost"  # its replica died, so the outcome is unknown


class UsageGroup(StrEnum):
    """What usage is added up by."""

    DAY = "day"
    MODEL = "model"
    KEY = "key"
    OWNER = "owner"


class Job:
    """One attempt of one request on one node. It is created at dispatch, and the outcome is filled in later.

    `id` is the request's, shared by its attempts, which count from 1. `node_id` and `node_owner` are None for a model
    that its upstream serves. `consumer` owns the key `key_id` that sent the request. Durations are in milliseconds from
    `started_at`, which is the database's time. `are_tokens_counted`: we counted the tokens, as the node did not say.
    """

    __slots__ = (
        "are_tokens_counted",
        "attempt",
        "consumer",
        "endpoint",
        "first_byte_ms",
        "id",
        "is_stream",
        "is_written",
        "key_id",
        "latency_ms",
        "model_id",
        "model_name",
        "node_id",
        "node_owner",
        "outcome",
        "price_usd",
        "reason",
        "started_at",
        "status",
        "tokens_in",
        "tokens_out",
    )

    def __init__(
        self,
        *,
        id: str,  # noqa: A002 - the column's name
        attempt: int,
        model_id: str,
        model_name: str,
        node_id: str | None,
        node_owner: str | None,
        key_id: str,
        consumer: str,
        endpoint: str,
        is_stream: bool,
        started_at: datetime,
    ) -> None:
        self.id = id
        self.attempt = attempt
        self.model_id = model_id
        self.model_name = model_name
        self.node_id = node_id
        self.node_owner = node_owner
        self.key_id = key_id
        self.consumer = consumer
        self.endpoint = endpoint
        self.is_stream = is_stream
        self.started_at = started_at
        self.outcome = Outcome.RUNNING
        self.reason: str | None = None
        self.status: int | None = None
        self.first_byte_ms: float | None = None
        self.latency_ms: float | None = None
        self.tokens_in: int | None = None
        self.tokens_out: int | None = None
        self.are_tokens_counted = False
        self.price_usd: Decimal | None = None
        self.is_written = False  # as running, while it ran
