"""Response bodies of the routes for operators."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lucid_compute.wire import Instant, ResponseShape


class Liveness(ResponseShape):
    """The process runs."""

    status: Literal["ok"]


class Readiness(ResponseShape):
    """The replica can serve. `feed_age_seconds` is the longest time that its memory may be behind Postgres.

    `version` is the service's own, `python` that of the Python that runs it. `compiled`: its busiest modules are
    compiled. Older versions say none of these.
    """

    status: Literal["ready"]
    nodes: int
    models: int
    replicas: int
    feed_age_seconds: float
    version: str | None
    python: str | None
    compiled: bool | None


class ReplicaView(ResponseShape):
    """A live replica (each worker is one), when it last renewed its lease, and the requests that run on nodes by it."""

    id: str
    answers: bool = Field(description="It is the one that sent this response.")
    started_at: Instant
    seen_at: Instant
    in_flight: int


class SettingView(ResponseShape):
    """A setting of this replica: its variable, its value as text (null: unset) and its meaning; secrets are hidden."""

    variable: str
    value: str | None
    is_default: bool
    meaning: str


class ServiceView(ResponseShape):
    """The service as its operator sees it: what runs, where, and with which settings."""

    version: str
    python: str
    compiled: bool
    replicas: list[ReplicaView]
    settings: list[SettingView]
