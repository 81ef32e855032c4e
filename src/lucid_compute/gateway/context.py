"""What attempts to serve a request work with."""

from __future__ import annotations

from typing import NamedTuple

from lucid_compute.accounting.ledger import JobLedger
from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.request_metrics import RequestMetrics
from lucid_compute.gateway.tracing import Tracer
from lucid_compute.gateway.upstreams import Upstreams
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.fleet.fleet import Fleet


class GatewayContext(NamedTuple):
    """One replica's fleet and clock, its way out and what it knows of nodes, the ledger and the tally."""

    fleet: Fleet
    clock: DatabaseClock
    client: HttpClient
    targets: Upstreams
    traffic: FleetStats
    ledger: JobLedger
    deadlines: Deadlines
    tally: RequestMetrics
    tracer: Tracer | None = None
