"""Jobs on the wire: what providers and admins are shown of the ledger."""

from __future__ import annotations

from pydantic import Field

from lucid_compute.field_types import AnswerShape, Instant
from lucid_compute.jobs import Outcome
from lucid_compute.wire.lists import Pagination


class JobView(AnswerShape):
    """One attempt of one request on one node; `attempt` counts the request's from 1. Null is unknown, or not yet."""

    id: str
    attempt: int
    passport_id: str | None = Field(description="The node; null for a model that is served by its upstream.")
    owner: str | None = Field(description="The node's owner.")
    model_id: str
    model: str
    outcome: Outcome
    reason: str | None
    status: int | None = Field(description="What the node answered.")
    endpoint: str
    stream: bool
    tokens_in: int | None
    tokens_out: int | None
    tokens_counted: bool = Field(description="We counted the tokens, because the node did not say.")
    price_usd: str | None = Field(description="Exact US dollars at the node's price; null when it names none.")
    first_byte_ms: float | None
    latency_ms: float | None
    started_at: Instant
    created_at: Instant = Field(description="The same as `startedAt`: what lists are ordered by.")
    consumer: str | None = Field(description="Whose key asked; admins only.")
    key_id: str | None = Field(description="The key that asked; admins only.")


class JobList(AnswerShape):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    pagination: Pagination
