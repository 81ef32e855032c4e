"""Nodes over HTTP: health, declarations, drains, events. Heartbeats have a lane of their own, `heartbeat_lane`."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from lucid_compute.errors import Forbidden, InvalidRequest, NodeDeregistered, NodeNotFound, RequestsInFlight
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.domain.node_state import DeclaredModel, NodeStatus
from lucid_compute.registry.events import NodeEvents
from lucid_compute.registry.fleet.fleet import Fleet, FleetNode
from lucid_compute.registry.keys.dependencies import ActorDependency, ComputeWriter, Reader
from lucid_compute.registry.search import NodeSearch, StatusFilter, sort_nodes
from lucid_compute.registry.shapes import (
    Declaration,
    DeclareModels,
    DeregisterAnswer,
    DrainAnswer,
    EventList,
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
    """Return the order that is asked for; nodes of which it is not known come last, either way."""
    return Order(sort_by, sort_order)


NodeOrderDependency = Annotated[Order[NodeSortBy], Depends(get_node_order)]
router = APIRouter(prefix="/compute", tags=["compute"])
MAX_WAIT_SECONDS = 3600


@router.get("", response_model=NodeList, responses=declare())
async def list_nodes(
    clock: Provided[DatabaseClock],
    fleet: Provided[Fleet],
    registry: Provided[ComputeRegistry],
    principal: Reader,
    page: PageDependency,
    order: NodeOrderDependency,
    status: Annotated[NodeStatus | None, Query(description="Ended nodes are shown only by `deregistered`.")] = None,
    region: Annotated[Text | None, Query()] = None,
    runtime: Annotated[Text | None, Query()] = None,
    min_vram: Annotated[float | None, Query(alias="minVram", ge=0, allow_inf_nan=False, description="GB")] = None,
    gpu: Annotated[Text | None, Query(description="Part of the GPU's name.")] = None,
    model: Annotated[Text | None, Query(description="A model that the node declares or reports.")] = None,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    search: Annotated[
        Text | None, Query(description="Part of the name or the description, or the beginning of the id.")
    ] = None,
) -> NodeList:
    """List one's own nodes with their health, an admin's are all."""
    if owner is not None and not principal.is_admin and owner != principal.owner:
        message = "Only an admin may list another owner's nodes. Leave owner out."
        raise Forbidden(message)
    now = clock.now()
    wanted = NodeSearch(region=region, runtime=runtime, min_vram_gb=min_vram, gpu=gpu, model=model, text=search)
    of_status = StatusFilter(status, fleet.live_since(now))
    nodes = [
        node
        for node in fleet.nodes(owner=owner or principal.visible_owner)
        if of_status.matches(node) and wanted.matches(fleet, node)
    ]
    shown = page.slice_of(sort_nodes(fleet, order, nodes))
    done = await registry.statistics(shown)
    return NodeList(
        nodes=[view_node(registry.health(node, now), principal, done[node.state.id]) for node in shown],
        pagination=page.pagination(len(nodes)),
    )


@router.get("/health/{passport_id}", response_model=NodeHealth, responses=declare(NodeNotFound, NodeDeregistered))
async def get_health(passport_id: str, registry: Provided[ComputeRegistry], principal: Reader) -> NodeHealth:
    """Read a node's health, counted over what this service routed; what the node says of itself is `reported`."""
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
    """Replace the whole declaration of a node. Each model is answered with the model passport that it resolves to."""
    models = [DeclaredModel(model.id, model.max_tokens, model.quantization) for model in body.models]
    _refuse_twice(models)
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
    """Start no request on the node from here on and let running ones finish; `drained` says when none is left."""
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
    """End a drain. One that the node reports itself ends when the node reports otherwise."""
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
    force: Annotated[bool, Query(description="Do not care for requests in flight.")] = False,
    wait_seconds: Annotated[
        float,
        Query(
            alias="waitSeconds",
            ge=0,
            le=MAX_WAIT_SECONDS,
            allow_inf_nan=False,
            description="How long to wait for requests in flight before they are refused.",
        ),
    ] = 0,
) -> DeregisterAnswer:
    """End a node for good, when no replica runs a request on it; none starts from here on.

    After a 409 it goes on as before. Its passport, events and jobs stay readable, and its name can be registered again.
    """
    await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    principal.require_node(passport_id)
    await registry.deregister(
        actor, passport_id, visible_owner=principal.visible_owner, force=force, wait_seconds=wait_seconds
    )
    return DeregisterAnswer(passport_id=passport_id, status=NodeStatus.DEREGISTERED)


@router.get("/events/{passport_id}", response_model=EventList, responses=declare(NodeNotFound))
async def list_events(
    passport_id: str,
    registry: Provided[ComputeRegistry],
    node_events: Provided[NodeEvents],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    since: Annotated[Instant | None, Query(description="The oldest instant that is wanted.")] = None,
    type: Annotated[Text | None, Query(description="Such as `unhealthy`.")] = None,  # noqa: A002 - the contract's name
) -> EventList:
    """List what happened to a node; an ended one's events stay readable. `name` sorts by the type."""
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
    done = await registry.statistics([node])
    return view_health(registry.health(node), done[node.state.id])


def _refuse_twice(models: list[DeclaredModel]) -> None:
    seen: set[str] = set()
    faults = []
    for position, model in enumerate(models):
        if model.id in seen:
            message = f"{model.id!r} is declared twice. Declare each model once."
            faults.append(FieldFault(f"models.{position}.id", message))
        seen.add(model.id)
    if faults:
        raise InvalidRequest(faults)
