"""Puts one replica of the service together, by its settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple
from uuid import uuid4

from lucid_compute.api.authentication import Authenticator
from lucid_compute.api.overviews import Overviews
from lucid_compute.api.rate_limits import KeyRates, ProbeRate
from lucid_compute.api.service import Runs, Service
from lucid_compute.api.settings import Settings
from lucid_compute.egress.http_client import HttpClient
from lucid_compute.egress.http_connection import Deadlines
from lucid_compute.egress_policy import EgressPolicy
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.fleet.key_ring import KeyRing
from lucid_compute.inference.gateway import Gateway
from lucid_compute.inference.prober import Prober
from lucid_compute.inference.request_tally import RequestTally
from lucid_compute.inference.targets import Targets
from lucid_compute.inference.tools import Tools
from lucid_compute.inference.tracing import Tracer
from lucid_compute.inference.traffic import Traffic
from lucid_compute.inference.watchdog import Watchdog
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
from lucid_compute.webhooks.webhooks import build_webhooks


class _Ground(NamedTuple):
    """What the parts of a replica share."""

    settings: Settings
    url: str
    replica_id: str
    database: Database
    clock: DatabaseClock
    fleet: Fleet
    keys: KeyRing
    policy: EgressPolicy


def build_service(settings: Settings, database_url: str) -> Service:
    """Put one replica together on the database at `database_url`; nothing is connected to yet."""
    ground = _lay_ground(settings, database_url)
    database, clock, fleet, keys = ground.database, ground.clock, ground.fleet, ground.keys
    feed, heartbeats, gauges = _build_followers(ground)
    tools, spend = _build_tools(ground), ProbeRate(fleet.replicas).spend
    retention, key_store, payouts = _retention(settings), KeyStore(database, keys), PayoutStore(database)
    records = RecordReader(database, retention)
    return Service(
        settings=settings,
        database=database,
        clock=clock,
        fleet=fleet,
        keys=keys,
        feed=feed,
        heartbeats=heartbeats,
        gauges=gauges,
        record_keeper=RecordKeeper(database_url, retention),
        records=records,
        overviews=Overviews(fleet, clock, records),
        sweep=Sweep(database, fleet, clock, key_store),
        registry=ComputeRegistry(database, fleet, clock, feed=feed, heartbeats=heartbeats),
        passports=PassportStore(database, fleet, ground.policy),
        key_store=key_store,
        events=NodeEvents(database),
        audit=AuditTrail(database),
        authenticator=Authenticator(keys, feed, clock, settings.auth_failures_per_minute),
        jobs=tools.ledger,
        job_search=JobSearch(database),
        payouts=payouts,
        refusals=RefusalRecorder(database_url, clock, timeout_seconds=settings.database_timeout_seconds),
        rates=KeyRates(fleet.replicas),
        gateway=Gateway(tools),
        prober=Prober(tools.targets, tools.client, spend),
        watchdog=Watchdog(keys, tools),
        webhooks=build_webhooks(database, ground.policy, clock, tools.client.own_endpoints, spend),
        beside=_build_beside(ground, payouts),
    )


def _lay_ground(settings: Settings, url: str) -> _Ground:
    size, timeout = settings.database_pool_size, settings.database_timeout_seconds
    database = Database(url, pool_size=size, timeout_seconds=timeout)
    policy = EgressPolicy(
        allow_loopback=settings.is_bound_to_loopback,
        allowed=settings.egress_allow,
        require_https=settings.require_https_nodes,
    )
    return _Ground(settings, url, str(uuid4()), database, DatabaseClock(), Fleet(), KeyRing(), policy)


def _build_followers(ground: _Ground) -> tuple[Feed, HeartbeatWriter, GaugeRecorder]:
    """Answer what keeps the fleet in memory in step with Postgres, what writes heartbeats, and what samples them."""
    settings, url, replica_id, _, clock, fleet, keys, _ = ground
    own, timeout = OwnHeartbeats(), settings.database_timeout_seconds
    listens = settings.feed_follows_notifications
    feed = Feed(url, fleet, keys, clock, replica_id=replica_id, own=own, listens=listens)
    gauges = GaugeRecorder(url, fleet, replica_id=replica_id, timeout_seconds=timeout)
    return feed, HeartbeatWriter(url, fleet, clock, own=own, gauges=gauges, timeout_seconds=timeout), gauges


def _build_beside(ground: _Ground, payouts: PayoutStore) -> Mapping[str, Runs]:
    """Answer what tells other replicas of requests under way, closes payouts, and later deletes their jobs."""
    settings, database = ground.settings, ground.database
    when, after_days = settings.payouts_close, settings.payouts_close_after_days
    return {
        "news": InFlightNews(ground.url, ground.fleet, replica_id=ground.replica_id),
        "payouts": PayoutCloser(database, payouts, when=when, after_days=after_days),
        "job retention": JobRetention(database, days=settings.job_retention_days),
    }


def _build_tools(ground: _Ground) -> Tools:
    settings, url, replica_id, _, clock, fleet, _, policy = ground
    return Tools(
        fleet=fleet,
        clock=clock,
        client=HttpClient(policy),
        targets=Targets(fleet, policy, replica_id),
        traffic=Traffic(fleet),
        ledger=JobLedger(url, replica_id=replica_id, timeout_seconds=settings.database_timeout_seconds),
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


def _retention(settings: Settings) -> Retention:
    """Answer how long records are kept by these settings."""
    return Retention(
        settings.records_minutes_kept_hours, settings.records_hours_kept_days, settings.records_days_kept_days
    )
