"""The fleet at a glance, on the wire."""

from __future__ import annotations

from pydantic import Field

from lucid_compute.field_types import AnswerShape, Instant
from lucid_compute.wire.metrics import OutageView


class NodeCounts(AnswerShape):
    """How many nodes there are that have not ended, by their status; `fresh` ones count for `available`."""

    total: int
    healthy: int
    unhealthy: int
    draining: int
    fresh: int


class ModelCounts(AnswerShape):
    """How many models there are, whoever owns them, and how many can be run and reached right now."""

    total: int
    available: int
    served: int


class HourTotals(AnswerShape):
    """The last hour's requests that have ended. Null is unknown, or none to be measured."""

    requests: int
    completed: int
    failed: int
    error_rate: float | None = Field(description="0 to 1, of completed and failed ones.")
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    revenue_usd: str | None = Field(description="Exact US dollars.")


class Overview(AnswerShape):
    """What one sees of the fleet right now: a provider its own nodes, an admin all."""

    owner: str | None = Field(description="Whose nodes; null for everyone's.")
    nodes: NodeCounts
    models: ModelCounts
    in_flight: int = Field(description="Requests that run on these nodes through any replica.")
    replicas: int = Field(description="Replicas of the service that are alive.")
    last_hour: HourTotals | None = Field(description="Null only while the database is away.")
    outage_since: Instant | None = Field(description="Since when the registry itself can't take heartbeats, if so.")
    outages: list[OutageView] = Field(description="The registry's own, of the last day, newest first.")
