"""One replica of the service, put together: what its routes use, and the tasks that run beside them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from lucid_compute.api.authentication import Authenticator
from lucid_compute.api.overviews import Overviews
from lucid_compute.api.rate_limits import KeyRates, ProbeRate
from lucid_compute.api.settings import Settings
from lucid_compute.egress.http_client import HttpClient
from lucid_compute.egress.http_connection import Deadlines
from lucid_compute.egress_policy import EgressPolicy
from lucid_compute.errors import DatabaseUnavailable, NodeDeregistered, NodeNotFound, PassportNotFound
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.fleet.key_ring import KeyRing
from lucid_compute.inference.gateway import Gateway
from lucid_compute.inference.prober import Prober
from lucid_compute.inference.request_tally import RequestTally
from lucid_compute.inference.targets import Targets
from lucid_compute.inference.tools import Tools
from lucid_compute.inference.tracing import Tracer
from lucid_compute.inference.traffic import Traffic
from lucid_compute.inference.watchdog import Watchdog
from lucid_compute.passports import Passport, PassportType
from lucid_compute.storage import schema
from lucid_compute.storage.audit import AuditTrail
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.compute_registry import ComputeRegistry
from lucid_compute.storage.database import Database
from lucid_compute.storage.feed import Feed
from lucid_compute.storage.gauge_recorder import GaugeRecorder
from lucid_compute.storage.heartbeat_writer import HeartbeatWriter, OwnHeartbeats
from lucid_compute.storage.in_flight_news import InFlightNews
from lucid_compute.storage.job_ledger import JobLedger
from lucid_compute.storage.job_retention import JobRetention
from lucid_compute.storage.job_search import JobSearch
from lucid_compute.storage.key_store import KeyStore
from lucid_compute.storage.node_events import NodeEvents
from lucid_compute.storage.passport_store import PassportStore
from lucid_compute.storage.payout_closer import PayoutCloser
from lucid_compute.storage.payout_store import PayoutStore
from lucid_compute.storage.record_keeper import RecordKeeper, Retention
from lucid_compute.storage.record_reader import RecordReader
from lucid_compute.storage.refusal_recorder import RefusalRecorder
from lucid_compute.storage.sweep import Sweep
from lucid_compute.webhooks.webhooks import Webhooks, build_webhooks

_LOAD_DEADLINE_SECONDS = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Service:
    """Everything that one replica holds."""

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
    news: InFlightNews
    sweep: Sweep
    registry: ComputeRegistry
    passports: PassportStore
    key_store: KeyStore
    events: NodeEvents
    audit: AuditTrail
    authenticator: Authenticator
    jobs: JobLedger
    job_search: JobSearch
    job_retention: JobRetention
    payouts: PayoutStore
    payout_closer: PayoutCloser
    rates: KeyRates
    gateway: Gateway
    prober: Prober
    watchdog: Watchdog
    webhooks: Webhooks
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    async def get_registered_node(self, passport_id: str, *, sees: str | None) -> FleetNode:
        """Answer the owner's node that has not ended, also one that another replica has only just registered.

        Raises:
            NodeNotFound: there is none.
            NodeDeregistered: it was deregistered or revoked, however long ago.
            DatabaseUnavailable: it is there, and this replica could not catch up with it in time.
        """
        if self.fleet.find_node(passport_id) is None:
            await self.feed.catch_up()
        if self.fleet.find_node(passport_id) is None:
            if (await self._get_node_passport(passport_id, sees=sees)).has_ended:
                raise NodeDeregistered(passport_id)
            raise DatabaseUnavailable
        return self.fleet.get_registered_node(passport_id, owner=sees)

    async def require_node_passport(self, passport_id: str, *, sees: str | None) -> Passport:
        """Answer the passport of the owner's node, also of one that ended long ago and is no longer in the fleet.

        Raises:
            NodeNotFound: there is none.
        """
        if (node := self.fleet.find_node(passport_id)) is not None:
            return self.fleet.get_node(node.state.id, owner=sees).record
        return await self._get_node_passport(passport_id, sees=sees)

    async def _get_node_passport(self, passport_id: str, *, sees: str | None) -> Passport:
        try:
            passport = await self.passports.get(passport_id, sees=sees)
        except PassportNotFound:
            raise NodeNotFound(passport_id) from None
        if passport.type is not PassportType.COMPUTE:
            raise NodeNotFound(passport_id)
        return passport

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


def build_service(settings: Settings, database_url: str) -> Service:
    """Put one replica together on the database at `database_url`; nothing is connected to yet."""
    timeout = settings.database_timeout_seconds
    database = Database(database_url, pool_size=settings.database_pool_size, timeout_seconds=timeout)
    clock, fleet, keys, own, replica_id = DatabaseClock(), Fleet(), KeyRing(), OwnHeartbeats(), str(uuid4())
    listens = settings.feed_follows_notifications
    feed = Feed(database_url, fleet, keys, clock, replica_id=replica_id, own=own, listens=listens)
    jobs = JobLedger(database_url, replica_id=replica_id, timeout_seconds=timeout)
    key_store = KeyStore(database, keys)
    tools = _build_tools(settings, fleet, clock, jobs, replica_id)
    records = RecordReader(database, retention_of(settings))
    gauges = GaugeRecorder(database_url, fleet, replica_id=replica_id, timeout_seconds=timeout)
    policy, spend = egress_policy(settings), ProbeRate(fleet.replicas).spend
    return Service(
        settings=settings,
        database=database,
        clock=clock,
        fleet=fleet,
        keys=keys,
        feed=feed,
        heartbeats=HeartbeatWriter(database_url, fleet, clock, own=own, gauges=gauges, timeout_seconds=timeout),
        gauges=gauges,
        record_keeper=RecordKeeper(database_url, retention_of(settings)),
        records=records,
        overviews=Overviews(fleet, clock, records),
        news=InFlightNews(database_url, fleet, replica_id=replica_id),
        sweep=Sweep(database, fleet, clock, key_store),
        registry=ComputeRegistry(database, fleet, clock),
        **_histories(database),
        **_payouts(database, settings, clock),
        passports=PassportStore(database, fleet, policy),
        key_store=key_store,
        authenticator=Authenticator(keys, feed, clock, settings.auth_failures_per_minute),
        jobs=jobs,
        rates=KeyRates(fleet.replicas),
        gateway=Gateway(tools),
        prober=Prober(tools.targets, tools.client, spend),
        watchdog=Watchdog(keys, tools),
        webhooks=build_webhooks(database, policy, clock, tools.client.own_endpoints, spend),
    )


def _histories(database: Database) -> dict[str, Any]:
    """Answer what only reads what happened, by its place in the service."""
    return {
        "events": NodeEvents(database),
        "audit": AuditTrail(database),
        "job_search": JobSearch(database),
    }


def _payouts(database: Database, settings: Settings, clock: DatabaseClock) -> dict[str, Any]:
    """Answer what reads payouts, closes them, deletes their jobs later and counts refusals, by its place."""
    store = PayoutStore(database)
    when, after_days = settings.payouts_close, settings.payouts_close_after_days
    return {
        "payouts": store,
        "payout_closer": PayoutCloser(database, store, when=when, after_days=after_days),
        "refusals": RefusalRecorder(database.url, clock, timeout_seconds=settings.database_timeout_seconds),
        "job_retention": JobRetention(database, days=settings.job_retention_days),
    }


def _build_tools(settings: Settings, fleet: Fleet, clock: DatabaseClock, ledger: JobLedger, replica_id: str) -> Tools:
    policy = egress_policy(settings)
    return Tools(
        fleet=fleet,
        clock=clock,
        client=HttpClient(policy),
        targets=Targets(fleet, policy, replica_id),
        traffic=Traffic(fleet),
        ledger=ledger,
        deadlines=Deadlines(
            first_byte_seconds=settings.first_byte_timeout_seconds,
            between_seconds=settings.between_bytes_timeout_seconds,
            total_seconds=settings.total_timeout_seconds,
            answer_seconds=settings.answer_timeout_seconds,
        ),
        tally=RequestTally(),
        tracer=_build_tracer(settings, replica_id),
    )


def _build_tracer(settings: Settings, replica_id: str) -> Tracer | None:
    """Answer what makes traces; None when the operator wants none, which costs nothing."""
    if settings.otlp_endpoint is None:
        return None
    from lucid_compute.api.otlp_tracer import OtlpTracer  # noqa: PLC0415 - the packages that it needs are an extra

    return OtlpTracer(settings.otlp_endpoint, settings.trace_share, replica_id)


def retention_of(settings: Settings) -> Retention:
    """Answer how long records are kept by these settings."""
    return Retention(
        settings.records_minutes_kept_hours, settings.records_hours_kept_days, settings.records_days_kept_days
    )


def egress_policy(settings: Settings) -> EgressPolicy:
    """Answer which provider URLs these settings allow."""
    return EgressPolicy(
        allow_loopback=settings.is_bound_to_loopback,
        allowed=settings.egress_allow,
        require_https=settings.require_https_nodes,
    )


@asynccontextmanager
async def running(service: Service) -> AsyncIterator[None]:
    """Run the replica's tasks for as long as the block runs; it begins when the fleet is loaded."""
    tasks = [
        asyncio.create_task(service.feed.run(), name="feed"),
        asyncio.create_task(service.heartbeats.run(), name="heartbeats"),
        asyncio.create_task(service.sweep.run(), name="sweep"),
        asyncio.create_task(service.news.run(), name="news"),
        asyncio.create_task(service.job_retention.run(), name="job retention"),
        asyncio.create_task(service.payout_closer.run(), name="payouts"),
        asyncio.create_task(service.watchdog.run(), name="watchdog"),
        asyncio.create_task(service.record_keeper.run(), name="records"),
        asyncio.create_task(service.webhooks.sender.run(), name="webhooks"),
    ]
    # The last to end: they write what the others still told them.
    writers = [
        asyncio.create_task(service.jobs.run(), name="jobs"),
        asyncio.create_task(service.gauges.run(), name="gauges"),
        asyncio.create_task(service.refusals.run(), name="refusals"),
    ]
    service.tasks.extend([*tasks, *writers])
    for task in service.tasks:
        task.add_done_callback(_log_end)
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


async def _wait_until_loaded(service: Service) -> None:
    """Wait for the first load of the fleet, a minute at most: then serve and let /readyz say what is missing."""
    with suppress(TimeoutError):
        await asyncio.wait_for(service.feed.loaded.wait(), _LOAD_DEADLINE_SECONDS)


def _log_end(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        _log.critical("the %s task ended", task.get_name(), exc_info=task.exception())
