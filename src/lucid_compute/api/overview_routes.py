"""The fleet at a glance: counts from memory, and the last hour's totals from the records."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from lucid_compute.api.dependencies import Reader, ServiceDependency
from lucid_compute.api.error_responses import declare
from lucid_compute.api.service import Service
from lucid_compute.errors import DatabaseUnavailable, Forbidden
from lucid_compute.field_types import Text
from lucid_compute.fleet.fleet import Fleet
from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.fleet.outages import OUTAGE_AFTER
from lucid_compute.metric_series import figures_of
from lucid_compute.node_state import FRESH_WINDOW, NodeStatus
from lucid_compute.records import Measured
from lucid_compute.storage.record_reader import Wanted
from lucid_compute.timeline import STEPS, Timeline
from lucid_compute.wire.metrics import OutageView
from lucid_compute.wire.overview import HourTotals, ModelCounts, NodeCounts, Overview

router = APIRouter(prefix="/compute", tags=["metrics"])
_NODES_A_TURN = 2000
_TOTALS = {
    "requests": "requests",
    "completed": "completed",
    "failed": "failed",
    "error_rate": "errorRate",
    "latency_p50_ms": "latencyP50Ms",
    "latency_p95_ms": "latencyP95Ms",
    "tokens_in": "tokensIn",
    "tokens_out": "tokensOut",
    "revenue_usd": "revenueUsd",
}
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since the ETag in If-None-Match"}}


@router.get("/overview", response_model=Overview, responses={**declare(), **_UNCHANGED})
async def get_overview(
    service: ServiceDependency,
    principal: Reader,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    known: Annotated[str | None, Header(alias="If-None-Match", include_in_schema=False)] = None,
) -> Response:
    """Read how the fleet is right now, in one small answer: one's own nodes, an admin's are all; and every model.

    It carries an ETag: sent back as `If-None-Match`, it is answered 304 for as long as nothing has changed.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden("Only an admin may look at another owner's nodes. Leave owner out.")
    body = (await _view_overview(service, owner or principal.sees)).model_dump_json().encode()
    headers = {"ETag": f'W/"{hashlib.sha256(body).hexdigest()[:24]}"', "Cache-Control": "no-store"}
    if known == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


async def _view_overview(service: Service, owner: str | None) -> Overview:
    now, fleet = service.clock.now(), service.fleet
    nodes = [node for node in fleet.nodes(owner=owner) if not node.record.has_ended]
    outages = [outage for outage in fleet.outages if outage.ended_at > now - timedelta(days=1)]
    renewed_at = fleet.lease_renewed_at
    return Overview(
        owner=owner,
        nodes=await _count_nodes(fleet, nodes, now),
        models=_count_models(fleet, now),
        in_flight=sum(fleet.in_flight(node.state.id) for node in nodes),
        replicas=fleet.replicas.count(),
        last_hour=await _read_last_hour(service, owner, now),
        outage_since=renewed_at if renewed_at is not None and now - renewed_at > OUTAGE_AFTER else None,
        outages=[OutageView(started_at=outage.started_at, ended_at=outage.ended_at) for outage in reversed(outages)],
    )


async def _count_nodes(fleet: Fleet, nodes: list[FleetNode], now: datetime) -> NodeCounts:
    """Count nodes by their status; others are answered in between."""
    live_since, fresh_since = fleet.live_since(now), now - FRESH_WINDOW
    found: Counter[NodeStatus] = Counter()
    fresh = 0
    for first in range(0, len(nodes), _NODES_A_TURN):
        states = [node.state for node in nodes[first : first + _NODES_A_TURN]]
        found.update(state.status(live_since) for state in states)
        fresh += sum(state.receipt is not None and state.receipt.received_at >= fresh_since for state in states)
        await asyncio.sleep(0)
    return NodeCounts(
        total=len(nodes),
        healthy=found[NodeStatus.HEALTHY],
        unhealthy=found[NodeStatus.UNHEALTHY],
        draining=found[NodeStatus.DRAINING],
        fresh=fresh,
    )


def _count_models(fleet: Fleet, now: datetime) -> ModelCounts:
    models = fleet.models_newest_first()
    return ModelCounts(
        total=len(models),
        available=sum(fleet.are_available(models, now)),
        served=sum(fleet.is_served(model, now) for model in models),
    )


async def _read_last_hour(service: Service, owner: str | None, now: datetime) -> HourTotals | None:
    timeline = Timeline.around(now - timedelta(hours=1), now, STEPS["1m"])
    try:
        steps = await service.records.measure_jobs(Wanted(owner=owner), timeline, now=now)
    except DatabaseUnavailable:
        return None
    whole = Measured()
    for step in steps:
        whole.add(step)
    figures = figures_of(tuple(_TOTALS.values()), whole)
    return HourTotals.model_validate({field: figures[series] for field, series in _TOTALS.items()})
