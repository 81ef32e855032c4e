"""The parts of a replica that the gateway works with."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from lucid_compute.accounting.ledger import JobLedger
from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines
from lucid_compute.gateway.event_stream import MAX_EVENT_BYTES, EventStream
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.request_metrics import RequestMetrics
from lucid_compute.gateway.stored_responses import ResponseIds
from lucid_compute.gateway.tracing import Tracer
from lucid_compute.gateway.upstreams import Upstreams
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.fleet import Fleet


class GatewayContext(NamedTuple):
    """The collaborators of every attempt to serve a request."""

    fleet: Fleet
    clock: DatabaseClock
    client: HttpClient
    upstreams: Upstreams
    stats: FleetStats
    ledger: JobLedger
    deadlines: Deadlines
    metrics: RequestMetrics
    response_ids: ResponseIds
    tracer: Tracer | None = None
    event_stream: type[EventStream] = EventStream
    max_event_bytes: int = MAX_EVENT_BYTES
    monotonic: Callable[[], float] = time.monotonic
    time_ns: Callable[[], int] = time.time_ns
