"""Metrics over time on the wire: series in steps, uptimes and error budgets. Null is unknown, never 0."""

from __future__ import annotations

from pydantic import Field

from lucid_compute.accounting.jobs import Outcome
from lucid_compute.wire import AnswerShape, Instant, Pagination

Figure = int | float | str | None


class OutageView(AnswerShape):
    """A span in which the registry itself could not take heartbeats: ours, and left out of every uptime."""

    started_at: Instant
    ended_at: Instant


class SeriesAnswer(AnswerShape):
    """What was measured, step by step; each list has a figure for each of `times`, the start of a step.

    `totals` are of all steps together: percentiles are those of all jobs, not averages of the steps'. `failures` are
    jobs that a node failed, by reason. Null is unknown: not measured, kept no longer, or yet to come.
    """

    passport_id: str | None = Field(description="The node; null for a fleet.")
    owner: str | None = Field(description="Whose nodes; null for everyone's.")
    model: str | None = Field(description="The id of the one model whose jobs are counted; null for all.")
    from_: Instant = Field(alias="from", description="Where the first step begins.")
    to: Instant = Field(description="Where the last step ends.")
    step: str = Field(examples=["1m"])
    step_seconds: int
    times: list[Instant]
    series: dict[str, list[Figure]]
    failures: dict[str, list[int | None]] | None = Field(description="By reason; null when it was not asked for.")
    totals: dict[str, Figure]
    failure_totals: dict[str, int] | None
    outages: list[OutageView] = Field(description="The registry's own, within the span.")


class ErrorBudget(AnswerShape):
    """How long the node may be unhealthy in the window and still reach the target, and how much of that is used."""

    allowed_seconds: float
    used_seconds: float
    remaining: float | None = Field(description="The share that is left; below 0 it is overspent.")


class UptimeWindow(AnswerShape):
    """One window that ends now. Time that was the registry's outage, a drain, or before the first heartbeat is no part
    of uptime: it is healthy time over healthy and unhealthy time.
    """

    days: int
    uptime: float | None = Field(description="0 to 1; null when nothing is known.")
    healthy_seconds: float
    unhealthy_seconds: float
    draining_seconds: float
    registry_outage_seconds: float
    error_budget: ErrorBudget | None = Field(description="Null when nothing is known.")


class NodeUptime(AnswerShape):
    """A node's uptime over one, seven and thirty days."""

    passport_id: str
    name: str
    target: float
    windows: list[UptimeWindow]


class FleetUptime(AnswerShape):
    """The uptime of nodes: `windows` of all of them, by the time of one node each, and a page of them, newest first."""

    owner: str | None
    target: float
    windows: list[UptimeWindow]
    nodes: list[NodeUptime]
    pagination: Pagination


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
