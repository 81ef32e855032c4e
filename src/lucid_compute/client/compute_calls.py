"""Calls about nodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypedDict, Unpack

from lucid_compute.accounting.shapes import JobList, JobView, Overview
from lucid_compute.client.call import ApiCall, PagedCall, body_of, given, path_of, query_of, write
from lucid_compute.gateway.shapes import NodeRouting, ProbeAnswer
from lucid_compute.registry.domain.node_state import GpuReading, Heartbeat, ReportedRuntime
from lucid_compute.registry.shapes import (
    Declaration,
    DeclareModels,
    DeregisterAnswer,
    DrainAnswer,
    EventList,
    EventView,
    FleetEventList,
    FleetEventView,
    HeartbeatAnswer,
    ModelDeclaration,
    NodeHealth,
    NodeList,
    NodeView,
)

PROBE_SECONDS = 13.0  # the longest probe of the service


class HeartbeatExtras(TypedDict, total=False):
    """The optional fields of a heartbeat. Left out or None means unknown."""

    boot_id: str | None
    sequence: int | None
    sent_at: datetime | None
    in_flight: int | None
    runtime: ReportedRuntime | Mapping[str, Any] | None
    gpus: Sequence[GpuReading | Mapping[str, Any]] | None
    jobs_completed: int | None
    jobs_failed: int | None
    avg_latency_ms: float | None
    tokens_generated: int | None
    detail: str | None


def heartbeat(
    *,
    passport_id: str,
    status: str,
    load: float | None,
    available_models: Sequence[str],
    queue_depth: int | None,
    **extras: Unpack[HeartbeatExtras],
) -> ApiCall[HeartbeatAnswer]:
    """Report the state of a node. Send the next heartbeat after `next_heartbeat_in_seconds`. None is unknown, never 0.

    `load` is 0.0 to 1.0. `available_models` replaces the last report. With `boot_id` and `sequence`, a late or repeated
    heartbeat changes nothing.

    Raises:
        NodeDeregistered: the node has ended; stop, or register it again.
    """
    always = {"passport_id": passport_id, "status": status, "load": load, "queue_depth": queue_depth}
    return _heartbeat_call(body_of(Heartbeat, **always, available_models=list(available_models), **given(**extras)))


def send(heartbeat: Heartbeat) -> ApiCall[HeartbeatAnswer]:
    """Send a heartbeat that is ready."""
    return _heartbeat_call(write(heartbeat))


def health(passport_id: str) -> ApiCall[NodeHealth]:
    """Read a node's health, counted from what the service routed. `reported` is what the node says about itself."""
    return ApiCall(method="GET", path=path_of("compute", "health", passport_id), answer=NodeHealth)


def update_models(passport_id: str, *, models: Sequence[ModelDeclaration | Mapping[str, Any]]) -> ApiCall[Declaration]:
    """Replace the node's declaration. Each model is `{"id", "max_tokens", "quantization"}`; only `id` is required."""
    body = body_of(DeclareModels, models=list(models))
    return ApiCall(method="PUT", path=path_of("compute", "models", passport_id), body=body, answer=Declaration)


def declared_models(passport_id: str) -> ApiCall[Declaration]:
    """Read the models that a node declares, each with the model passport that it resolves to."""
    return ApiCall(method="GET", path=path_of("compute", "models", passport_id), answer=Declaration)


def drain(passport_id: str) -> ApiCall[DrainAnswer]:
    """Start no more requests on the node. Call it again to see whether the node is `drained`."""
    return ApiCall(method="POST", path=path_of("compute", "drain", passport_id), answer=DrainAnswer)


def resume(passport_id: str) -> ApiCall[NodeHealth]:
    """End a drain. A drain that the node itself reports ends when the node reports otherwise."""
    return ApiCall(method="POST", path=path_of("compute", "resume", passport_id), answer=NodeHealth)


def deregister(
    passport_id: str, *, force: bool = False, wait_seconds: float | None = None
) -> ApiCall[DeregisterAnswer]:
    """Deregister a node; this is final. `force` cuts requests off, else they are awaited up to `wait_seconds`.

    Raises:
        RequestsInFlight: requests still run and the node continues; `in_flight` is their number.
    """
    return ApiCall(
        method="POST",
        path=path_of("compute", "deregister", passport_id),
        query=query_of(force=force or None, wait_seconds=wait_seconds),
        answer=DeregisterAnswer,
        waits_seconds=wait_seconds or 0.0,
    )


def probe(passport_id: str) -> ApiCall[ProbeAnswer]:
    """Have the service connect to the node, and read the result. The service probes a host once in ten seconds."""
    path = path_of("compute", "probe", passport_id)
    return ApiCall(method="POST", path=path, answer=ProbeAnswer, waits_seconds=PROBE_SECONDS)


def overview(*, owner: str | None = None) -> ApiCall[Overview]:
    """Read the state of the fleet now: counts of nodes and models, requests in flight, totals of the last hour."""
    return ApiCall(method="GET", path="/compute/overview", query=query_of(owner=owner), answer=Overview)


def list_(
    *,
    status: str | None = None,
    region: str | None = None,
    runtime: str | None = None,
    min_vram: float | None = None,
    gpu: str | None = None,
    model: str | None = None,
    owner: str | None = None,
    search: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[NodeList, NodeView]:
    """Iterate over your own nodes and their health; an admin sees all nodes. `min_vram` is in GB."""
    query = query_of(
        status=status,
        region=region,
        runtime=runtime,
        min_vram=min_vram,
        gpu=gpu,
        model=model,
        owner=owner,
        search=search,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(path="/compute", query=query, answer=NodeList, items=lambda page: page.nodes)


def events(
    passport_id: str,
    *,
    since: datetime | None = None,
    type: str | None = None,  # noqa: A002 - the contract's name
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[EventList, EventView]:
    """Iterate over the events of a node, newest first. The events of an ended node stay readable."""
    return PagedCall(
        path=path_of("compute", "events", passport_id),
        query=query_of(since=since, type=type, sort_by=sort_by, sort_order=sort_order),
        answer=EventList,
        items=lambda page: page.events,
    )


def routing(passport_id: str) -> ApiCall[NodeRouting]:
    """Say whether a node would be sent a request now, for each of its models, and whether its breaker is open."""
    return ApiCall(method="GET", path=path_of("compute", "routing", passport_id), answer=NodeRouting)


def fleet_events(
    *,
    passport_id: str | None = None,
    type: str | None = None,  # noqa: A002 - the contract's name
    since: datetime | None = None,
    until: datetime | None = None,
    owner: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[FleetEventList, FleetEventView]:
    """Iterate over the events of all nodes, newest first; without `since`, of the last seven days."""
    query = query_of(
        passport_id=passport_id,
        type=type,
        since=since,
        until=until,
        owner=owner,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(path="/compute/events", query=query, answer=FleetEventList, items=lambda page: page.events)


def jobs(
    *,
    passport_id: str | None = None,
    model: str | None = None,
    outcome: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    owner: str | None = None,
    consumer: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[JobList, JobView]:
    """Iterate over the attempts on your own nodes, newest first; an admin sees all of them.

    `consumer` is the owner of the keys that sent the requests: with your own owner, these are your own requests, on
    anybody's nodes.
    Give `until` to read a fixed span. Without it, new jobs push older ones to later pages.
    """
    query = query_of(
        passport_id=passport_id,
        model=model,
        outcome=outcome,
        since=since,
        until=until,
        owner=owner,
        consumer=consumer,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(
        path="/compute/jobs",
        query=query,
        answer=JobList,
        items=lambda page: page.jobs,
        identity=lambda job: (job.id, job.attempt),
    )


def _heartbeat_call(body: bytes) -> ApiCall[HeartbeatAnswer]:
    return ApiCall(method="POST", path="/compute/heartbeat", body=body, answer=HeartbeatAnswer)
