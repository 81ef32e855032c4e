"""What is known of a node: its heartbeat, declaration and jobs, and the status that follows from them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Annotated, NamedTuple

from pydantic import Field

from lucid_compute.registry.domain.passports import ComputePassport, normalise_runtime
from lucid_compute.wire import (
    Count,
    ForgivingShape,
    Fraction,
    Identifier,
    Instant,
    Label,
    ModelId,
    NonNegative,
    Number,
    Text,
)

FRESH_SECONDS = 30
LIVE_SECONDS = 120
FRESH_WINDOW = timedelta(seconds=FRESH_SECONDS)
LIVE_WINDOW = timedelta(seconds=LIVE_SECONDS)
HEARTBEAT_INTERVAL_SECONDS = 9.0
HEARTBEAT_JITTER = 0.1

NO_MODELS: Mapping[str, DeclaredModel] = {}


class ReportedStatus(StrEnum):
    """The status that a node reports in a heartbeat."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"


class NodeStatus(StrEnum):
    """The status of a node in the registry."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    DEREGISTERED = "deregistered"


class ReportedRuntime(ForgivingShape):
    """The inference runtime that a node reports."""

    name: Label
    version: Label | None = None


class GpuReading(ForgivingShape):
    """One GPU at one moment. None is unknown, never 0."""

    index: Annotated[int, Field(strict=True, ge=0, le=1023)]
    name: Label | None = None
    utilization: Fraction | None = Field(default=None, description="0.0 to 1.0")
    memory_used_mb: NonNegative | None = None
    memory_total_mb: NonNegative | None = None
    temperature_c: Annotated[Number, Field(ge=-273.15, le=1000)] | None = None
    power_w: NonNegative | None = None


class Heartbeat(ForgivingShape):
    """One heartbeat as a node sends it. Unknown fields are ignored; None is unknown, never 0."""

    passport_id: Identifier
    status: ReportedStatus
    load: Fraction | None = Field(description="How busy the node is, 0.0 to 1.0; null when unknown.")
    available_models: Annotated[list[ModelId], Field(max_length=1000)] = Field(
        description="Ids of the models that are loaded now; replaces the last report."
    )
    queue_depth: Count | None = Field(description="Requests waiting on the node; null when unknown.")
    boot_id: Label | None = Field(default=None, description="A new one at each start of the sender.")
    sequence: Count | None = Field(default=None, description="Grows with each heartbeat of one bootId.")
    sent_at: Instant | None = Field(default=None, description="The sender's clock, used only to warn about skew.")
    in_flight: Count | None = None
    runtime: ReportedRuntime | None = None
    gpus: Annotated[list[GpuReading], Field(max_length=64)] | None = None
    jobs_completed: Count | None = None
    jobs_failed: Count | None = None
    avg_latency_ms: NonNegative | None = None
    tokens_generated: Count | None = None
    detail: Text | None = Field(default=None, description="Why the node is as it is, in a sentence.")


class DeclaredModel(NamedTuple):
    """A model that a node declares it can serve, under the id the node knows it by."""

    id: str
    max_tokens: int | None = None
    quantization: str | None = None


class Receipt(NamedTuple):
    """A committed heartbeat, with times of the database's clock.

    `up_since` is the first heartbeat since the node was last unhealthy, None while it reports that it is.
    """

    heartbeat: Heartbeat
    received_at: datetime
    up_since: datetime | None
    revision: int


class JobStatistics(NamedTuple):
    """What a node did with the jobs that were routed to it: `jobs_completed` in its life, the rest in the last hour.

    None is unknown: no job in that hour, or for `jobs_completed` a database that is away.
    """

    jobs_completed: int | None
    avg_latency_ms: float | None
    error_rate: float | None


class NodeState(NamedTuple):
    """A node at one moment: its passport, what its operator asked of it, and its last heartbeat.

    `is_connected`: this replica can send it requests. It is True for every node with an address; for an outbound one
    while its agent keeps a connection to this replica.
    """

    passport: ComputePassport
    declared: Mapping[str, DeclaredModel] = NO_MODELS
    draining_since: datetime | None = None
    last_heartbeat: Receipt | None = None
    is_connected: bool = True

    @property
    def id(self) -> str:
        """The passport's id."""
        return self.passport.record.id

    @property
    def runtimes(self) -> frozenset[str]:
        """The runtimes that the passport names and that the node reports, together."""
        reported = self.last_heartbeat.heartbeat.runtime if self.last_heartbeat else None
        return self.passport.runtimes | {normalise_runtime(reported.name)} if reported else self.passport.runtimes

    @property
    def reported_models(self) -> frozenset[str]:
        """The ids of the models that the newest heartbeat reports as loaded."""
        return frozenset(self.last_heartbeat.heartbeat.available_models) if self.last_heartbeat else frozenset()

    @property
    def reported_status(self) -> ReportedStatus | None:
        """The status in the newest heartbeat; None when there was none."""
        return self.last_heartbeat.heartbeat.status if self.last_heartbeat else None

    @property
    def is_draining(self) -> bool:
        """Return whether its operator drains it, or the node reports that it drains."""
        return self.draining_since is not None or self.reported_status is ReportedStatus.DRAINING

    def is_fresh(self, now: datetime) -> bool:
        """Return whether the newest heartbeat is at most 30 s old."""
        return self.last_heartbeat is not None and now - self.last_heartbeat.received_at <= FRESH_WINDOW

    def is_live(self, live_since: datetime) -> bool:
        """Return whether the newest heartbeat came at `live_since` (120 s ago, our outages left out) or later."""
        return self.last_heartbeat is not None and self.last_heartbeat.received_at >= live_since

    def has_stopped(self, live_since: datetime) -> bool:
        """Return whether the node said that it stops, by reporting a drain, and is silent since."""
        return self.reported_status is ReportedStatus.DRAINING and not self.is_live(live_since)

    def status(self, live_since: datetime) -> NodeStatus:
        """Return the node's status; `live_since` as in `is_live`. Silence comes before a drain."""
        # Called for complete fleets: looking each value up once halves the cost.
        if self.passport.record.has_ended:
            return NodeStatus.DEREGISTERED
        receipt = self.last_heartbeat
        if receipt is None or receipt.received_at < live_since:
            return NodeStatus.UNHEALTHY
        reported = receipt.heartbeat.status
        if self.draining_since is not None or reported is ReportedStatus.DRAINING:
            return NodeStatus.DRAINING
        return NodeStatus.HEALTHY if reported is ReportedStatus.HEALTHY else NodeStatus.UNHEALTHY
