"""`GET /v1/models`: the models that are served, as OpenAI's clients read them and as ours do, in one body."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query

from lucid_compute.errors import ModelNotFound, RoutingLoop
from lucid_compute.gateway.shapes import OpenAiModel, OpenAiModelList
from lucid_compute.gateway.upstreams import HOP_HEADER
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.domain.passports import ModelPassport
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Inferrer
from lucid_compute.registry.variants import is_served
from lucid_compute.registry.views import view_model
from lucid_compute.web.errors import declare
from lucid_compute.web.provide import Provided
from lucid_compute.wire import MAX_PER_PAGE, Pagination


async def refuse_loop(
    feed: Provided[ChangeFeed], hop: Annotated[str | None, Header(alias=HOP_HEADER, include_in_schema=False)] = None
) -> None:
    """Refuse a replica of ours that probes a node and has come back to us."""
    if hop is not None and feed.knows_replica(hop):
        raise RoutingLoop([])


router = APIRouter(prefix="/v1", tags=["inference"], dependencies=[Depends(refuse_loop)])


@router.get("/models", response_model=OpenAiModelList, responses=declare(RoutingLoop))
async def list_served_models(
    clock: Provided[DatabaseClock],
    fleet: Provided[Fleet],
    principal: Inferrer,
    page: Annotated[int | None, Query(ge=1, le=1_000_000_000, description="Absent: everything on one page.")] = None,
    per_page: Annotated[int | None, Query(alias="perPage", ge=1, le=MAX_PER_PAGE)] = None,
) -> OpenAiModelList:
    """List the models that can be asked for right now, all of them unless a page is asked for."""
    now = clock.now()
    served = [m for m in fleet.models_newest_first() if m.record.is_active and is_served(fleet, m, now)]
    total, shown = len(served), served
    if page is not None or per_page is not None:
        size = per_page or 20
        start = ((page or 1) - 1) * size
        shown = served[start : start + size]
    else:
        size = max(total, 1)
    pagination = Pagination(total=total, page=page or 1, per_page=size, total_pages=-(-total // size))
    models = [view_model(fleet, model, principal, now) for model in shown]
    return OpenAiModelList(data=[_view(model) for model in shown], models=models, pagination=pagination)


@router.get("/models/{id_or_name:path}", response_model=OpenAiModel, responses=declare(ModelNotFound, RoutingLoop))
async def get_served_model(id_or_name: str, fleet: Provided[Fleet], _: Inferrer) -> OpenAiModel:
    """Read one model by its id, name or alias."""
    return _view(fleet.get_model(id_or_name))


def _view(model: ModelPassport) -> OpenAiModel:
    record = model.record
    return OpenAiModel(id=record.name, created=int(record.created_at.timestamp()), owned_by=record.owner)
