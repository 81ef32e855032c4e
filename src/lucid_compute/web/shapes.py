"""Response bodies of the routes for operators."""

from __future__ import annotations

from typing import Literal

from lucid_compute.wire import ResponseShape


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
