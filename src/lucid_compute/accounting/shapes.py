"""Responses of the metrics, uptime, job and overview routes. Null is unknown, never 0."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from lucid_compute.accounting.jobs import Outcome, UsageGroup
from lucid_compute.accounting.series import Figure
from lucid_compute.registry.domain.key_limits import BudgetPeriod
from lucid_compute.wire import Day, Instant, Money, Pagination, ResponseShape


class OutageView(ResponseShape):
    """A span in which the registry itself could not receive heartbeats. It does not count in any uptime."""

    started_at: Instant
    ended_at: Instant


class SeriesAnswer(ResponseShape):
    """Metrics in steps. Each list has a value for each of `times`, which are the starts of the steps.

    `totals` are of all steps together: percentiles are of all jobs, not averages of the steps. `failures` counts jobs
    that a node failed, by reason. Null is unknown: not measured, deleted, or in the future.
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
    failures: dict[str, list[int | None]] | None = Field(description="By reason; null when it was not requested.")
    totals: dict[str, Figure]
    failure_totals: dict[str, int] | None
    outages: list[OutageView] = Field(description="The registry's own, within the span.")


class ErrorBudget(ResponseShape):
    """How long the node may be unhealthy in the window to reach the target, and how much of that is used."""

    allowed_seconds: float
    used_seconds: float
    remaining: float | None = Field(description="The share that is left; 0 when it is spent, or overspent.")


class UptimeWindow(ResponseShape):
    """One window that ends now. Uptime is healthy time divided by healthy and unhealthy time.

    Outages of the registry, drains, and the time before the first heartbeat do not count.
    """

    days: int
    uptime: float | None = Field(description="0 to 1; null when nothing is known.")
    healthy_seconds: float
    unhealthy_seconds: float
    draining_seconds: float
    registry_outage_seconds: float
    error_budget: ErrorBudget | None = Field(description="Null when less than an hour is known.")


class NodeUptime(ResponseShape):
    """A node's uptime over one, seven and thirty days."""

    passport_id: str
    name: str
    target: float
    windows: list[UptimeWindow]


class FleetUptime(ResponseShape):
    """The uptime of nodes: `windows` of all of them together, and a page of nodes, newest first."""

    owner: str | None
    target: float
    windows: list[UptimeWindow]
    nodes: list[NodeUptime]
    pagination: Pagination


class JobView(ResponseShape):
    """One attempt of one request on one node; `attempt` counts from 1. Null is unknown, or not known yet."""

    id: str
    attempt: int
    passport_id: str | None = Field(description="The node; null for a model that is served by its upstream.")
    owner: str | None = Field(description="The node's owner; null if it is another one, and you are no admin.")
    model_id: str
    model: str
    outcome: Outcome
    reason: str | None
    status: int | None = Field(description="The status of the node's response.")
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
    consumer: str | None = Field(description="The owner of the key that sent the request: you, or you are an admin.")
    key_id: str | None = Field(description="The key that sent the request; null if `consumer` is.")


class JobList(ResponseShape):
    """A page of jobs, newest first."""

    jobs: list[JobView]
    pagination: Pagination


_USAGE_SUMS = {
    "requests": 1204,
    "completed": 1190,
    "errors": 9,
    "cancelled": 5,
    "tokensIn": 913_002,
    "tokensOut": 301_220,
    "priceUsd": "2.428444",
}
_USAGE_EXAMPLE: dict[str, Any] = {
    "owner": "acme",
    "from": "2026-11-01",
    "to": "2026-12-01",
    "groupBy": ["day", "model"],
    "usage": [
        {
            "day": "2026-11-24",
            "modelId": "7a1b8a52-6a6c-4a4c-9d43-0d0a3f8d7c11",
            "model": "llama-3-70b",
            "keyId": None,
            "key": None,
            "owner": None,
            **_USAGE_SUMS,
        }
    ],
    "total": _USAGE_SUMS,
    "budgets": [
        {
            "keyId": "3kXz81bQ0aLm",
            "name": "ci",
            "budgetUsd": "20",
            "budgetPeriod": "month",
            "spentUsd": "2.428444",
            "resetsAt": "2026-12-01T00:00:00.000Z",
        }
    ],
}


class UsageTotal(ResponseShape):
    """Sums of requests that have ended. A request counts once, however often it was tried again on other nodes."""

    requests: int
    completed: int
    errors: int = Field(description="Requests that were neither completed nor cancelled.")
    cancelled: int = Field(description="Requests whose client left.")
    tokens_in: int
    tokens_out: int
    price_usd: str = Field(description="Exact US dollars, at the prices of the nodes that served them.")


class UsageEntry(UsageTotal):
    """The sums of one group. What usage is not grouped by is null; so is the name of a key that is unknown."""

    day: Day | None
    model_id: str | None
    model: str | None = Field(description="The model's current name.")
    key_id: str | None
    key: str | None = Field(description="The key's name.")
    owner: str | None = Field(description="Whose key.")


class KeyBudget(ResponseShape):
    """The budget of one key, and what it has spent of it in the period that is under way."""

    key_id: str
    name: str
    budget_usd: Money
    budget_period: BudgetPeriod
    spent_usd: str = Field(description="Exact US dollars.")
    resets_at: Instant


class UsageReport(ResponseShape):
    """What an owner's keys have used on some days of UTC, in lines that `groupBy` says, and in all."""

    model_config = {"json_schema_extra": {"examples": [_USAGE_EXAMPLE]}}

    owner: str | None = Field(description="Whose keys; null for everyone's.")
    from_: Day = Field(alias="from", description="The first day.")
    to: Day = Field(description="The day after the last one.")
    group_by: list[UsageGroup]
    usage: list[UsageEntry]
    total: UsageTotal
    budgets: list[KeyBudget] | None = Field(description="The owner's keys that have a budget; null for everyone's.")


class NodeCounts(ResponseShape):
    """Numbers of nodes by status, without deregistered ones. Only `fresh` nodes make a model `available`."""

    total: int
    healthy: int
    unhealthy: int
    draining: int
    fresh: int


class ModelCounts(ResponseShape):
    """Numbers of models of all owners: all, those that a node can run now, and those that are served now."""

    total: int
    available: int
    served: int


class HourTotals(ResponseShape):
    """The requests of the last hour that have ended. Null is unknown, or there was nothing to measure."""

    requests: int
    completed: int
    failed: int
    error_rate: float | None = Field(description="0 to 1, of completed and failed ones.")
    latency_p50_ms: float | None
    latency_p95_ms: float | None
    tokens_in: int | None
    tokens_out: int | None
    revenue_usd: str | None = Field(description="Exact US dollars.")


class Overview(ResponseShape):
    """The fleet now: a provider sees its own nodes, an admin all."""

    owner: str | None = Field(description="Whose nodes; null for everyone's.")
    nodes: NodeCounts
    models: ModelCounts
    in_flight: int = Field(description="Requests in flight on these nodes, through any replica.")
    replicas: int = Field(description="Replicas of the service that are alive.")
    last_hour: HourTotals | None = Field(description="Null only while the database is unavailable.")
    outage_since: Instant | None = Field(
        description="Since when the registry itself can't receive heartbeats; null if it can."
    )
    outages: list[OutageView] = Field(description="The registry's own, of the last day, newest first.")
