"""One replica of the service: what its routes use, and the tasks that run beside them. `assembly` puts it together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from lucid_compute.api.authentication import Authenticator
from lucid_compute.api.overviews import Overviews
from lucid_compute.api.rate_limits import KeyRates
from lucid_compute.api.settings import Settings
from lucid_compute.errors import DatabaseUnavailable
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.fleet.key_ring import KeyRing
from lucid_compute.inference.gateway import Gateway
from lucid_compute.inference.prober import Prober
from lucid_compute.inference.watchdog import Watchdog
from lucid_compute.storage import schema
from lucid_compute.storage.audit import AuditTrail
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.compute_registry import ComputeRegistry
from lucid_compute.storage.database import Database
from lucid_compute.storage.feed import Feed
from lucid_compute.storage.gauge_recorder import GaugeRecorder
from lucid_compute.storage.heartbeat_writer import HeartbeatWriter
from lucid_compute.storage.job_ledger import JobLedger
from lucid_compute.storage.job_search import JobSearch
from lucid_compute.storage.key_store import KeyStore
from lucid_compute.storage.node_events import NodeEvents
from lucid_compute.storage.passport_store import PassportStore
from lucid_compute.storage.payout_store import PayoutStore
from lucid_compute.storage.record_keeper import RecordKeeper
from lucid_compute.storage.record_reader import RecordReader
from lucid_compute.storage.refusal_recorder import RefusalRecorder
from lucid_compute.storage.sweep import Sweep
from lucid_compute.webhooks.webhooks import Webhooks

_LOAD_DEADLINE_SECONDS = 60.0

_log = logging.getLogger(__name__)


class Runs(Protocol):
    """What works for as long as its task runs."""

    async def run(self) -> None:
        """Work until it is cancelled."""


@dataclass(frozen=True)
class Service:
    """Everything that one replica holds; `beside` is what nobody asks for anything, by the names of its tasks."""

    settings: Settings
    database: Database
    clock: DatabaseClock
    fleet: Fleet
    keys: KeyRing
    feed: Feed
    heartbeats: HeartbeatWriter
    gauges: GaugeRecorder
    refusals: RefusalRecorder
    record_keeper: RecordKeeper
    records: RecordReader
    overviews: Overviews
    sweep: Sweep
    registry: ComputeRegistry
    passports: PassportStore
    key_store: KeyStore
    events: NodeEvents
    audit: AuditTrail
    authenticator: Authenticator
    jobs: JobLedger
    job_search: JobSearch
    payouts: PayoutStore
    rates: KeyRates
    gateway: Gateway
    prober: Prober
    watchdog: Watchdog
    webhooks: Webhooks
    beside: Mapping[str, Runs]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def get_registered_node(self, passport_id: str, *, sees: str | None) -> FleetNode:
        """Return what `ComputeRegistry.get_node` does; the heartbeat lane still asks here."""
        return await self.registry.get_node(passport_id, sees=sees)

    async def require_ready(self) -> None:
        """Refuse unless the database answers, its schema is this version's, and the fleet is loaded and followed.

        Raises:
            DatabaseUnavailable: one of them is not so.
        """
        if not self.feed.is_current() or any(task.done() for task in self.tasks):
            raise DatabaseUnavailable
        async with self.database.transaction() as connection:
            if await schema.revision_of(connection) != schema.head_revision():
                raise DatabaseUnavailable


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Run the replica's tasks for as long as the block runs; it begins when the fleet is loaded."""
    tasks = _start(
        feed=service.feed,
        heartbeats=service.heartbeats,
        sweep=service.sweep,
        watchdog=service.watchdog,
        records=service.record_keeper,
        webhooks=service.webhooks.sender,
        **service.beside,
    )
    # The last to end: they write what the others tell them.
    writers = _start(jobs=service.jobs, gauges=service.gauges, refusals=service.refusals)
    service.tasks.extend([*tasks, *writers])
    try:
        await _wait_until_loaded(service)
        yield
    finally:
        for group in (tasks, writers):
            for task in group:
                task.cancel()
            await asyncio.gather(*group, return_exceptions=True)
        if (tracer := service.gateway.tools.tracer) is not None:
            await tracer.close()
        await service.database.close()


def _start(**named: Runs) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(each.run(), name=name) for name, each in named.items()]
    for task in tasks:
        task.add_done_callback(_log_end)
    return tasks


async def _wait_until_loaded(service: Service) -> None:
    """Wait for the first load of the fleet, a minute at most: then serve and let /readyz say what is missing."""
    with suppress(TimeoutError):
        await asyncio.wait_for(service.feed.loaded.wait(), _LOAD_DEADLINE_SECONDS)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.critical("the %s task ended", task.get_name(), exc_info=task.exception())
