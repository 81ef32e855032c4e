"""Nodes over HTTP: health, declarations, drains, deregistration and events. `heartbeat_lane` serves heartbeats."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Depends, Query

from lucid_compute.errors import Forbidden, InvalidRequest, NodeDeregistered, NodeNotFound, RequestsInFlight
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.domain.node_state import DeclaredModel, NodeStatus
from lucid_compute.registry.events import EventQuery, NodeEvents
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.keys.dependencies import ActorDependency, ComputeWriter, Reader, owner_of
from lucid_compute.registry.search import NodeSearch, StatusFilter, sort_nodes
from lucid_compute.registry.shapes import (
    Declaration,
    DeclareModels,
    DeregisterAnswer,
    DrainAnswer,
    EventList,
    FleetEventList,
    NodeHealth,
    NodeList,
)
from lucid_compute.registry.views import view_declaration, view_drain, view_health, view_node
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import Direction, Order, OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import FieldFault, Instant, NodeSortBy, SortOrder, Text


async def get_node_order(
    sort_by: Annotated[NodeSortBy, Query(alias="sortBy")] = NodeSortBy.CREATED_AT,
    sort_order: Direction = SortOrder.DESCENDING,
) -> Order[NodeSortBy]:
    """Return the order of the list; nodes whose value is unknown come last, in both directions.

    `severity` descending is the worst first: unhealthy, silent for 30 s, draining, stopped, healthy.
    """
    return Order(sort_by, sort_order)


NodeOrderDependency = Annotated[Order[NodeSortBy], Depends(get_node_order)]
router = APIRouter(prefix="/compute", tags=["compute"])
MAX_WAIT_SECONDS = 3600
EVENTS_SHOWN = timedelta(days=7)


@router.get("", response_model=NodeList, responses=declare())
async def list_nodes(
    clock: Provided[DatabaseClock],
    fleet: Provided[Fleet],
    registry: Provided[ComputeRegistry],
    principal: Reader,
    page: PageDependency,
    order: NodeOrderDependency,
    status: Annotated[NodeStatus | None, Query(description="Only `deregistered` lists nodes that have ended.")] = None,
    region: Annotated[Text | None, Query()] = None,
    runtime: Annotated[Text | None, Query()] = None,
    min_vram: Annotated[float | None, Query(alias="minVram", ge=0, allow_inf_nan=False, description="GB")] = None,
    gpu: Annotated[Text | None, Query(description="Part of the GPU's name.")] = None,
    model: Annotated[Text | None, Query(description="Only nodes that declare or report this model.")] = None,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    search: Annotated[
        Text | None, Query(description="Part of the name or the description, or the beginning of the id.")
    ] = None,
) -> NodeList:
    """List your own nodes with their health; an admin lists all."""
    if owner is not None and not principal.is_admin and owner != principal.owner:
        message = "Only an admin may list another owner's nodes. Leave owner out."
        raise Forbidden(message)
    now = clock.now()
    criteria = NodeSearch(region=region, runtime=runtime, min_vram_gb=min_vram, gpu=gpu, model=model, text=search)
    of_status = StatusFilter(status, fleet.live_since(now))
    nodes = [
        node
        for node in fleet.nodes(owner=owner or principal.visible_owner)
        if of_status.matches(node) and criteria.matches(fleet, node)
    ]
    shown = page.slice_of(sort_nodes(fleet, order, nodes, now))
    statistics = await registry.statistics(shown)
    return NodeList(
        nodes=[view_node(registry.health(node, now), principal, statistics[node.state.id]) for node in shown],
        pagination=page.pagination(len(nodes)),
    )


@router.get("/health/{passport_id}", response_model=NodeHealth, responses=declare(NodeNotFound, NodeDeregistered))
async def get_health(passport_id: str, registry: Provided[ComputeRegistry], principal: Reader) -> NodeHealth:
    """Read a node's health, counted over what this service routed; `reported` is what the node itself reports."""
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    return await _view_health(registry, node)


@router.put(
    "/models/{passport_id}", response_model=Declaration, responses=declare(NodeNotFound, NodeDeregistered, body=True)
)
async def declare_models(
    passport_id: str,
    body: DeclareModels,
    registry: Provided[ComputeRegistry],
    fleet: Provided[Fleet],
    principal: ComputeWriter,
    actor: ActorDependency,
) -> Declaration:
    """Replace the complete declaration of a node. The response names the model passport that each entry resolves to."""
    models = [DeclaredModel(model.id, model.max_tokens, model.quantization) for model in body.models]
    _refuse_repeated(models)
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    await registry.declare(actor, passport_id, models, visible_owner=principal.visible_owner)
    return view_declaration(fleet, node)


@router.get("/models/{passport_id}", response_model=Declaration, responses=declare(NodeNotFound, NodeDeregistered))
async def get_declaration(
    passport_id: str, fleet: Provided[Fleet], registry: Provided[ComputeRegistry], principal: Reader
) -> Declaration:
    """Read the declaration of a node."""
    return view_declaration(fleet, await registry.get_node(passport_id, visible_owner=principal.visible_owner))


@router.post(
    "/drain/{passport_id}",
    status_code=202,
    response_model=DrainAnswer,
    responses=declare(NodeNotFound, NodeDeregistered),
)
async def drain(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    fleet: Provided[Fleet],
    principal: ComputeWriter,
    actor: ActorDependency,
) -> DrainAnswer:
    """Start no more requests on the node and let running ones finish; `drained` is true when none is left."""
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    await registry.drain(actor, passport_id, visible_owner=principal.visible_owner)
    return view_drain(fleet, node)


@router.post("/resume/{passport_id}", response_model=NodeHealth, responses=declare(NodeNotFound, NodeDeregistered))
async def resume(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    principal: ComputeWriter,
    actor: ActorDependency,
) -> NodeHealth:
    """End a drain. A drain that the node reports itself ends when the node reports otherwise."""
    node = await registry.get_node(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    await registry.resume(actor, passport_id, visible_owner=principal.visible_owner)
    return await _view_health(registry, node)


@router.post(
    "/deregister/{passport_id}", response_model=DeregisterAnswer, responses=declare(NodeNotFound, RequestsInFlight)
)
async def deregister(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    principal: ComputeWriter,
    actor: ActorDependency,
    force: Annotated[bool, Query(description="End the node even if requests are in flight.")] = False,
    wait_seconds: Annotated[
        float,
        Query(
            alias="waitSeconds",
            ge=0,
            le=MAX_WAIT_SECONDS,
            allow_inf_nan=False,
            description="How long to wait for requests in flight before the call is refused.",
        ),
    ] = 0,
) -> DeregisterAnswer:
    """End a node, which is final, when no replica runs a request on it. No more requests are started meanwhile.

    After a 409 the node goes on as before. An ended node's passport, events and jobs stay readable, and its name can be
    registered again.
    """
    await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    await registry.deregister(
        actor, passport_id, visible_owner=principal.visible_owner, force=force, wait_seconds=wait_seconds
    )
    return DeregisterAnswer(passport_id=passport_id, status=NodeStatus.DEREGISTERED)


@router.get("/events", response_model=FleetEventList, responses=declare())
async def list_fleet_events(
    node_events: Provided[NodeEvents],
    clock: Provided[DatabaseClock],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    passport_id: Annotated[Text | None, Query(alias="passportId", description="Only this node's.")] = None,
    type: Annotated[Text | None, Query(description="Such as `unhealthy`.")] = None,  # noqa: A002 - as below
    since: Annotated[Instant | None, Query(description="Seven days ago, when it is left out.")] = None,
    until: Annotated[Instant | None, Query(description="Only events before this instant.")] = None,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
) -> FleetEventList:
    """List the events of all your nodes, also of those that have ended; an admin's of all. `name` sorts by the type.

    `total` is exact up to 100,000; of more rows there are at least so many, and further pages can be read.
    """
    query = EventQuery(
        owner=owner_of(principal, owner, "events"),
        passport_id=passport_id,
        event_type=type,
        since=clock.now() - EVENTS_SHOWN if since is None else since,
        until=until,
    )
    events, total = await node_events.list_all(
        query, sort_by=order.by, sort_order=order.direction, offset=page.offset, limit=page.per_page
    )
    return FleetEventList(events=events, pagination=page.pagination(total))


@router.get("/events/{passport_id}", response_model=EventList, responses=declare(NodeNotFound))
async def list_events(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    node_events: Provided[NodeEvents],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    since: Annotated[Instant | None, Query(description="Only events at this instant or later.")] = None,
    type: Annotated[Text | None, Query(description="Such as `unhealthy`.")] = None,  # noqa: A002 - the contract's name
) -> EventList:
    """List the events of a node, also of one that has ended. `name` sorts by the type."""
    await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    events, total = await node_events.list_page(
        passport_id,
        since=since,
        event_type=type,
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
    )
    return EventList(events=events, pagination=page.pagination(total))


async def _view_health(registry: ComputeRegistry, node: FleetNode) -> NodeHealth:
    statistics = await registry.statistics([node])
    return view_health(registry.health(node), statistics[node.state.id])


def _refuse_repeated(models: list[DeclaredModel]) -> None:
    seen: set[str] = set()
    faults = []
    for position, model in enumerate(models):
        if model.id in seen:
            message = f"{model.id!r} is declared twice. Declare each model once."
            faults.append(FieldFault(f"models.{position}.id", message))
        seen.add(model.id)
    if faults:
        raise InvalidRequest(faults)
