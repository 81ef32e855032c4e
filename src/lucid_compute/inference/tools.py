"""What attempts to serve a request work with."""

from __future__ import annotations

from typing import NamedTuple

from lucid_compute.egress.http_client import HttpClient
from lucid_compute.egress.http_connection import Deadlines
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.inference.request_tally import RequestTally
from lucid_compute.inference.targets import Targets
from lucid_compute.inference.tracing import Tracer
from lucid_compute.inference.traffic import Traffic
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.job_ledger import JobLedger


class Tools(NamedTuple):
    """One replica's fleet and clock, its way out and what it knows of nodes, the ledger and the tally."""

    fleet: Fleet
    clock: DatabaseClock
    client: HttpClient
    targets: Targets
    traffic: Traffic
    ledger: JobLedger
    deadlines: Deadlines
    tally: RequestTally
    tracer: Tracer | None = None
