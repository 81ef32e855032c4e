"""Builds the parts of one replica from its settings, and connects them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple
from uuid import uuid4

from lucid_compute.accounting.gauges import GaugeRecorder
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.ledger import JobLedger, LostJobs
from lucid_compute.accounting.node_states import NodeStateRecorder
from lucid_compute.accounting.overview import OverviewCache
from lucid_compute.accounting.payouts.closer import PayoutCloser
from lucid_compute.accounting.payouts.store import PayoutStore
from lucid_compute.accounting.refusals import RefusalRecorder
from lucid_compute.accounting.retention import JobRetention
from lucid_compute.accounting.rollup_reader import RollupReader
from lucid_compute.accounting.rollups import Retention, RollupKeeper
from lucid_compute.accounting.usage import build_usage
from lucid_compute.egress.client import HttpClient
from lucid_compute.egress.connection import Deadlines, ResponseLimits
from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.gateway.context import GatewayContext
from lucid_compute.gateway.gateway import Gateway
from lucid_compute.gateway.node_stats import FleetStats
from lucid_compute.gateway.prober import Prober
from lucid_compute.gateway.request_metrics import RequestMetrics
from lucid_compute.gateway.request_queue import RequestQueue
from lucid_compute.gateway.stored_responses import ResponseIds
from lucid_compute.gateway.tracing import Tracer
from lucid_compute.gateway.upstreams import Upstreams
from lucid_compute.gateway.watchdog import Watchdog
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.dedicated_connection import DedicatedConnection, Purpose
from lucid_compute.postgres.queries import read_response_secret
from lucid_compute.registry.cleaning import RULES, Cleaner
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.events import NodeEvents
from lucid_compute.registry.fleet.change_feed import ChangeFeed, OwnHeartbeats
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.fleet.in_flight_broadcast import InFlightBroadcast
from lucid_compute.registry.fleet.key_ring import KeyRing
from lucid_compute.registry.heartbeat_writer import HeartbeatWriter
from lucid_compute.registry.keys.audit import AuditTrail
from lucid_compute.registry.keys.authentication import Authenticator
from lucid_compute.registry.keys.key_rates import KeyRates
from lucid_compute.registry.keys.limit_shares import LimitShares
from lucid_compute.registry.keys.rate_limits import ProbeRate, WriteRates
from lucid_compute.registry.keys.store import KeyStore
from lucid_compute.registry.passport_quota import PassportQuota
from lucid_compute.registry.passport_store import PassportStore
from lucid_compute.registry.retention import HistoryRetention
from lucid_compute.registry.sweep import Sweep, SweepFollower
from lucid_compute.registry.tunnel_watch import TunnelWatch
from lucid_compute.server.replica import BackgroundTask, Replica
from lucid_compute.server.settings import Settings
from lucid_compute.tunnel.tunnels import Tunnels
from lucid_compute.webhooks.model_states import OLD_MODEL_STATES, ModelStateRecorder
from lucid_compute.webhooks.sender import build_webhooks

MIB = 1024 * 1024


class _SharedParts(NamedTuple):
    """Parts that several others are built from."""

    settings: Settings
    url: str
    replica_id: str
    database: Database
    clock: DatabaseClock
    fleet: Fleet
    keys: KeyRing
    policy: EgressPolicy
    tunnels: Tunnels


def build_replica(settings: Settings, database_url: str) -> Replica:
    """Return one replica on the database at `database_url`; it opens no connection yet."""
    _, _, _, database, clock, fleet, keys, _, tunnels = shared = _build_shared_parts(settings, database_url)
    feed, heartbeats, gauges = _build_followers(shared)
    context, spend = _build_gateway_context(shared), ProbeRate(fleet.replicas).spend
    retention, key_store, payouts = _retention(settings), KeyStore(database, keys), PayoutStore(database)
    rollups, job_search = RollupReader(database, retention), JobSearch(database, is_known=fleet.has_node)
    return Replica(
        settings=settings,
        database=database,
        clock=clock,
        fleet=fleet,
        keys=keys,
        feed=feed,
        heartbeats=heartbeats,
        gauges=gauges,
        rollup_keeper=RollupKeeper(database_url, retention),
        rollups=rollups,
        overviews=OverviewCache(fleet, clock, rollups),
        sweep=_build_sweep(shared, key_store),
        registry=_build_registry(shared, feed, heartbeats, job_search),
        passports=PassportStore(database, fleet, shared.policy, PassportQuota(settings.passports_per_owner)),
        key_store=key_store,
        events=NodeEvents(database),
        audit=AuditTrail(database),
        authenticator=Authenticator(keys, feed, clock, settings.auth_failures_per_minute),
        jobs=context.ledger,
        job_search=job_search,
        payouts=payouts,
        refusals=RefusalRecorder(database_url, clock, timeout_seconds=settings.database_timeout_seconds),
        rates=KeyRates(fleet.replicas, LimitShares(database_url, replica_id=shared.replica_id)),
        usage=build_usage(database),
        writes=_build_write_rates(settings),
        gateway=Gateway(context, queue=_build_queue(settings)),
        prober=Prober(context.upstreams, context.client, spend),
        watchdog=Watchdog(keys, context, slow_reader_seconds=settings.slow_reader_seconds),
        tunnel_watch=TunnelWatch(tunnels, fleet, keys, feed, clock),
        webhooks=build_webhooks(database, shared.policy, clock, context.client.own_endpoints, spend),
        background=_build_background(shared, payouts),
    )


def _build_queue(settings: Settings) -> RequestQueue | None:
    most = settings.inference_queue
    return RequestQueue(most, settings.inference_queue_seconds) if most else None


def _build_sweep(shared: _SharedParts, keys: KeyStore) -> Sweep:
    database, fleet = shared.database, shared.fleet
    followers: list[SweepFollower] = [
        LostJobs(database),
        NodeStateRecorder(database, fleet),
        ModelStateRecorder(database, fleet),
    ]
    return Sweep(database, fleet, shared.clock, keys, followers)


def _build_registry(
    shared: _SharedParts, feed: ChangeFeed, heartbeats: HeartbeatWriter, job_search: JobSearch
) -> ComputeRegistry:
    return ComputeRegistry(
        shared.database,
        shared.fleet,
        shared.clock,
        feed=feed,
        heartbeats=heartbeats,
        statistics=job_search.last_statistics,
    )


def _build_shared_parts(settings: Settings, url: str) -> _SharedParts:
    size, timeout = settings.database_pool_size, settings.database_timeout_seconds
    database = Database(url, pool_size=size, timeout_seconds=timeout)
    policy = EgressPolicy(
        allow_loopback=settings.is_bound_to_loopback,
        allowed=settings.egress_allow,
        require_https=settings.require_https_nodes,
    )
    replica_id, fleet = str(uuid4()), Fleet()
    tunnels = Tunnels(replica_id, lambda node, is_connected: fleet.set_connected(node, is_connected=is_connected))
    return _SharedParts(settings, url, replica_id, database, DatabaseClock(), fleet, KeyRing(), policy, tunnels)


def _build_followers(shared: _SharedParts) -> tuple[ChangeFeed, HeartbeatWriter, GaugeRecorder]:
    """Return the feed that follows Postgres, the writer of heartbeats, and the recorder of their samples."""
    settings, url, replica_id, _, clock, fleet, keys, _, _ = shared
    own, timeout = OwnHeartbeats(), settings.database_timeout_seconds
    listens = settings.feed_follows_notifications
    feed = ChangeFeed(url, fleet, keys, clock, replica_id=replica_id, own=own, listens=listens)
    gauges = GaugeRecorder(url, fleet, replica_id=replica_id, timeout_seconds=timeout)
    return feed, HeartbeatWriter(url, fleet, clock, own=own, on_commit=gauges.record, timeout_seconds=timeout), gauges


def _build_background(shared: _SharedParts, payouts: PayoutStore) -> Mapping[str, BackgroundTask]:
    """Return the tasks that no route needs: broadcast in-flight counts, close payouts, delete old rows."""
    settings, database = shared.settings, shared.database
    when, after_days = settings.payouts_close, settings.payouts_close_after_days
    in_flight = DedicatedConnection(shared.url, Purpose.IN_FLIGHT)
    return {
        "in-flight broadcast": InFlightBroadcast(in_flight, shared.fleet, replica_id=shared.replica_id),
        "payouts": PayoutCloser(database, payouts, when=when, after_days=after_days),
        "cleaning": Cleaner(database, [*RULES, OLD_MODEL_STATES]),
        "job retention": JobRetention(database, days=settings.job_retention_days),
        "history retention": HistoryRetention(
            database, event_days=settings.event_retention_days, audit_days=settings.audit_retention_days
        ),
    }


def _build_gateway_context(shared: _SharedParts) -> GatewayContext:
    settings, url, replica_id, database, clock, fleet, _, policy, tunnels = shared
    return GatewayContext(
        fleet=fleet,
        clock=clock,
        client=HttpClient(policy, tunnels=tunnels, response_limits=_response_limits(settings)),
        upstreams=Upstreams(fleet, policy, replica_id),
        stats=FleetStats(fleet),
        ledger=JobLedger(url, replica_id=replica_id, timeout_seconds=settings.database_timeout_seconds),
        deadlines=Deadlines(
            first_byte_seconds=settings.first_byte_timeout_seconds,
            between_seconds=settings.between_bytes_timeout_seconds,
            total_seconds=settings.total_timeout_seconds,
            answer_seconds=settings.answer_timeout_seconds,
        ),
        metrics=RequestMetrics(),
        response_ids=ResponseIds(partial(read_response_secret, database)),
        tracer=_build_tracer(settings, replica_id),
        max_event_bytes=settings.event_max_mib * MIB,
    )


def _response_limits(settings: Settings) -> ResponseLimits:
    return ResponseLimits(settings.answer_max_mib * MIB, settings.stream_max_mib * MIB)


def _build_tracer(settings: Settings, replica_id: str) -> Tracer | None:
    """Return the tracer; None, which costs nothing, without a collector."""
    if settings.otlp_endpoint is None:
        return None
    from lucid_compute.gateway.otlp_tracer import OtlpTracer  # noqa: PLC0415 - it needs the packages of an extra

    return OtlpTracer(settings.otlp_endpoint, settings.trace_share, replica_id)


def _build_write_rates(settings: Settings) -> WriteRates:
    return WriteRates(
        key_per_second=settings.key_writes_per_second,
        owner_per_second=settings.owner_writes_per_second,
        burst=settings.writes_burst,
    )


def _retention(settings: Settings) -> Retention:
    """Return how long the settings keep records."""
    return Retention(
        settings.records_minutes_kept_hours, settings.records_hours_kept_days, settings.records_days_kept_days
    )
