"""Jobs: what the ledger keeps of each time that a request is sent to a node, from dispatch to outcome. Pure."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from enum import StrEnum


class Outcome(StrEnum):
    """How a job ended."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"  # the node's fault: `reason` says which
    REJECTED = "rejected"  # the client's own: the node answered 400, 413 or 422
    CANCELLED = "cancelled"  # the client left, or its key was revoked
    LOST = "lost"  # the replica that ran it died, so nobody knows


class Job:
    """One attempt of one request on one node. Made when it is dispatched; what is known later is filled in.

    `id` is the request's, shared by its attempts, which count from 1. `node_id` and `node_owner` are None for a model
    that is served by its upstream. `consumer` owns the key `key_id` that asked. Durations are in milliseconds from
    `started_at`, which is the database's clock. `are_tokens_counted`: by us, because the node did not say.
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
        id: str,  # noqa: A002 - the ledger's word
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
