"""Metrics over time: what happened on nodes, by the minute, hour or day. `GET /metrics`, Prometheus's, is elsewhere."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from fastapi import APIRouter, Query, Response

from lucid_compute.api.csv_answers import CSV_RESPONSE, CsvDependency
from lucid_compute.api.dependencies import OrderDependency, PageDependency, Reader, ServiceDependency, owner_of
from lucid_compute.api.error_responses import declare
from lucid_compute.api.metrics_query import MetricsQuery, MetricsQueryDependency
from lucid_compute.api.metrics_views import (
    WINDOW_LENGTHS,
    view_series,
    view_windows,
    write_series_csv,
    write_uptime_csv,
)
from lucid_compute.api.node_search import sorted_by
from lucid_compute.api.service import Service
from lucid_compute.errors import NodeNotFound
from lucid_compute.field_types import Text
from lucid_compute.passports import Passport
from lucid_compute.storage.passport_search import ids_are_uuids
from lucid_compute.storage.record_reader import Wanted
from lucid_compute.wire.metrics import FleetUptime, NodeUptime, SeriesAnswer

router = APIRouter(prefix="/compute", tags=["metrics"])
_UNKNOWN_MODEL = "00000000-0000-4000-8000-000000000000"

Model = Annotated[Text | None, Query(description="Count the jobs of one model alone: its id, name or alias.")]
Owner = Annotated[Text | None, Query(description="Another owner than the key's; admins only.")]
Target = Annotated[
    float | None,
    Query(gt=0, lt=1, allow_inf_nan=False, description="The share of time to be healthy; else `LUCID_UPTIME_TARGET`."),
]


@router.get("/metrics", response_model=SeriesAnswer, responses={**declare(), **CSV_RESPONSE})
async def get_fleet_metrics(
    service: ServiceDependency,
    principal: Reader,
    query: MetricsQueryDependency,
    is_csv: CsvDependency,
    model: Model = None,
    owner: Owner = None,
) -> SeriesAnswer | Response:
    """Read what happened on all of one's own nodes together; an admin's are all, and models' upstreams with them.

    Gauges are averages over the nodes' heartbeats, `…Max` the highest of any. A job counts in the minute in which it
    started, as soon as it has ended, so that counts are those of `GET /compute/jobs` with the same span.
    """
    wanted = Wanted(owner=owner_of(principal, owner, "metrics"), model_id=_model_id(service, model))
    return await _answer(service, wanted, query, is_csv=is_csv)


@router.get("/metrics/{passport_id}", response_model=SeriesAnswer, responses={**declare(NodeNotFound), **CSV_RESPONSE})
async def get_node_metrics(
    passport_id: str,
    service: ServiceDependency,
    principal: Reader,
    query: MetricsQueryDependency,
    is_csv: CsvDependency,
    model: Model = None,
) -> SeriesAnswer | Response:
    """Read what happened on a node; an ended one's records stay readable for as long as they are kept."""
    node = await service.registry.get_passport(passport_id, sees=principal.sees)
    wanted = Wanted(node_id=node.id, model_id=_model_id(service, model))
    return await _answer(service, wanted, query, is_csv=is_csv, node=node)


@router.get("/uptime", response_model=FleetUptime, responses={**declare(), **CSV_RESPONSE})
async def get_fleet_uptime(
    service: ServiceDependency,
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    is_csv: CsvDependency,
    target: Target = None,
    owner: Owner = None,
) -> FleetUptime | Response:
    """Read the uptime of one's own nodes over 1, 7 and 30 days, with what is left of their error budgets.

    As CSV the page of nodes alone.
    """
    whose, aim = owner_of(principal, owner, "metrics"), target or service.settings.uptime_target
    nodes = [node for node in service.fleet.nodes(owner=whose) if not node.record.has_ended]
    shown = [node.record for node in page.slice_of(sorted_by(order, nodes))]
    uptimes = await _uptimes(service, shown, aim)
    if is_csv:
        return write_uptime_csv(uptimes)
    fleet = await service.records.states(Wanted(owner=whose), WINDOW_LENGTHS, now=service.clock.now())
    return FleetUptime(
        owner=whose, target=aim, windows=view_windows(fleet, aim), nodes=uptimes, pagination=page.pagination(len(nodes))
    )


@router.get("/uptime/{passport_id}", response_model=NodeUptime, responses={**declare(NodeNotFound), **CSV_RESPONSE})
async def get_node_uptime(
    passport_id: str, service: ServiceDependency, principal: Reader, is_csv: CsvDependency, target: Target = None
) -> NodeUptime | Response:
    """Read a node's uptime over 1, 7 and 30 days, with what is left of its error budget.

    Uptime is healthy time over healthy and unhealthy time: drains, outages of the registry and what lies before the
    first heartbeat are left out.
    """
    node = await service.registry.get_passport(passport_id, sees=principal.sees)
    (uptime,) = await _uptimes(service, [node], target or service.settings.uptime_target)
    return write_uptime_csv([uptime]) if is_csv else uptime


async def _answer(
    service: Service, wanted: Wanted, query: MetricsQuery, *, is_csv: bool, node: Passport | None = None
) -> SeriesAnswer | Response:
    now = service.clock.now()
    timeline = query.timeline(now)
    known_since = None if node is None else node.created_at
    measurement = await service.records.measure(wanted, timeline, now=now, known_since=known_since)
    owner = wanted.owner if node is None else node.owner
    answer = view_series(
        timeline, measurement, query.series, passport_id=wanted.node_id, owner=owner, model=wanted.model_id
    )
    return write_series_csv(answer) if is_csv else answer


async def _uptimes(service: Service, nodes: list[Passport], target: float) -> list[NodeUptime]:
    now = service.clock.now()
    found = await service.records.states_of_nodes([node.id for node in nodes], WINDOW_LENGTHS, now=now)
    return [
        NodeUptime(passport_id=node.id, name=node.name, target=target, windows=view_windows(found[node.id], target))
        for node in nodes
    ]


def _model_id(service: Service, model: str | None) -> str | None:
    """Answer the model's id; that of no model when there is none, so that nothing is counted."""
    if model is None:
        return None
    known = service.fleet.find_model(model)
    if known is not None:
        return known.id
    return model if ids_are_uuids(model) and UUID(model).int else _UNKNOWN_MODEL  # 0 stands for all models together
