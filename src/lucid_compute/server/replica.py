"""One replica of the service: the parts that its routes use, and its background tasks. `wiring` builds it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Protocol

from lucid_compute.accounting.gauges import GaugeRecorder
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.ledger import JobLedger
from lucid_compute.accounting.overview import OverviewCache
from lucid_compute.accounting.payouts.store import PayoutStore
from lucid_compute.accounting.refusals import RefusalRecorder
from lucid_compute.accounting.rollup_reader import RollupReader
from lucid_compute.accounting.rollups import RollupKeeper
from lucid_compute.accounting.series_routes import UptimeTarget
from lucid_compute.accounting.usage import UsageParts
from lucid_compute.errors import DatabaseUnavailable, NotReady
from lucid_compute.gateway.gateway import Gateway
from lucid_compute.gateway.prober import Prober
from lucid_compute.gateway.watchdog import Watchdog
from lucid_compute.postgres import revisions
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database, explain_unavailable, write_nothing
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.events import NodeEvents
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.registry.heartbeat_writer import HeartbeatWriter
from lucid_compute.registry.keys.audit import AuditTrail
from lucid_compute.registry.keys.authentication import Authenticator
from lucid_compute.registry.keys.key_rates import KeyRates
from lucid_compute.registry.keys.rate_limits import WriteRates
from lucid_compute.registry.keys.store import KeyStore
from lucid_compute.registry.passport_store import PassportStore
from lucid_compute.registry.sweep import Sweep
from lucid_compute.registry.tunnel_watch import TunnelWatch
from lucid_compute.server.settings import Settings
from lucid_compute.webhooks.sender import WebhookParts

_LOAD_DEADLINE_SECONDS = 60.0

_log = logging.getLogger(__name__)


class BackgroundTask(Protocol):
    """A part that works as long as its task runs."""

    async def run(self) -> None:
        """Work until it is cancelled."""


@dataclass(frozen=True)
class Replica:
    """The parts of one replica. `background` has the tasks that no route needs, by name."""

    settings: Settings
    database: Database
    clock: DatabaseClock
    fleet: Fleet
    keys: KeyRing
    feed: ChangeFeed
    heartbeats: HeartbeatWriter
    gauges: GaugeRecorder
    refusals: RefusalRecorder
    rollup_keeper: RollupKeeper
    rollups: RollupReader
    overviews: OverviewCache
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
    usage: UsageParts
    writes: WriteRates
    gateway: Gateway
    prober: Prober
    watchdog: Watchdog
    tunnel_watch: TunnelWatch
    webhooks: WebhookParts
    background: Mapping[str, BackgroundTask]
    tasks: list[asyncio.Task[None]] = field(default_factory=list)
    made_at: float = field(default_factory=time.monotonic)

    def parts(self) -> list[object]:
        """Return the parts that routes may ask for by type."""
        return [
            self,
            self.authenticator,
            self.audit,
            self.clock,
            self.events,
            self.feed,
            self.fleet,
            self.gateway,
            self.job_search,
            self.key_store,
            self.keys,
            self.overviews,
            self.passports,
            self.payouts,
            self.prober,
            self.rates,
            self.rollups,
            self.registry,
            self.settings,
            self.tunnel_watch,
            self.usage.reader,
            self.webhooks.store,
            self.webhooks.tester,
            self.writes,
            UptimeTarget(self.settings.uptime_target),
        ]

    async def require_ready(self) -> None:
        """Check that the replica can serve, and that the database takes writes.

        Raises:
            NotReady: it can't; the text says why.
        """
        if (ended := next((task for task in self.tasks if task.done()), None)) is not None:
            raise NotReady(f"Its task {ended.get_name()!r} ended; its log says why. Restart it.")
        if not self.feed.loaded.is_set():
            raise NotReady("It still loads the fleet.")
        if not self.feed.is_current():
            reason = explain_unavailable(self.feed.trouble)
            raise NotReady(f"For over five seconds it could not write to the database and read it. {reason}")
        try:
            async with self.database.transaction() as connection:
                await write_nothing(connection)
                misfit = await revisions.find_misfit(connection)
        except DatabaseUnavailable as error:
            raise NotReady(explain_unavailable(error)) from error
        if misfit is not None:
            raise NotReady(misfit)


@asynccontextmanager
async def running(replica: Replica) -> AsyncIterator[None]:
    """Run the replica's tasks until the end of the block, which begins when the fleet is loaded."""
    tasks = _start(
        feed=replica.feed,
        heartbeats=replica.heartbeats,
        sweep=replica.sweep,
        watchdog=replica.watchdog,
        tunnels=replica.tunnel_watch,
        rollups=replica.rollup_keeper,
        rates=replica.rates,
        budgets=replica.usage.budgets,
        webhooks=replica.webhooks.sender,
        **replica.background,
    )
    # They end last, since they write what the other tasks produce.
    writers = _start(jobs=replica.jobs, gauges=replica.gauges, refusals=replica.refusals)
    replica.tasks.extend([*tasks, *writers])
    try:
        await _wait_until_loaded(replica)
        yield
    finally:
        for group in (tasks, writers):
            for task in group:
                task.cancel()
            await asyncio.gather(*group, return_exceptions=True)
        if (tracer := replica.gateway.context.tracer) is not None:
            await tracer.close()
        await replica.payouts.long_transactions.close()
        await replica.database.close()


def _start(**named: BackgroundTask) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(each.run(), name=name) for name, each in named.items()]
    for task in tasks:
        task.add_done_callback(_log_end)
    return tasks


async def _wait_until_loaded(replica: Replica) -> None:
    """Wait for the first load of the fleet, at most a minute; after that serve anyway, with /readyz at 503."""
    with suppress(TimeoutError):
        await asyncio.wait_for(replica.feed.loaded.wait(), _LOAD_DEADLINE_SECONDS)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.critical("the %s task ended", task.get_name(), exc_info=task.exception())
