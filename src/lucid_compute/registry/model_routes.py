"""Models over HTTP, open to everyone: list them, read one, and explain its availability."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query

from lucid_compute.errors import ModelNotFound, Unauthorized
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Anyone
from lucid_compute.registry.matching_engine import ReasonCode
from lucid_compute.registry.passport_routes import Tags, split_tags
from lucid_compute.registry.search import ModelSearch, sort_models
from lucid_compute.registry.shapes import ModelAvailability, ModelList, ModelView
from lucid_compute.registry.variants import is_available
from lucid_compute.registry.views import Shown, explain_availability, view_model
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import Direction, OptionalPageDependency, Order, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import ModelSortBy, SortOrder, Text

router = APIRouter(prefix="/models", tags=["models"])
_DEFAULT_ORDER = Order(ModelSortBy.CREATED_AT, SortOrder.DESCENDING)


async def get_model_order(
    sort_by: Annotated[ModelSortBy, Query(alias="sortBy")] = _DEFAULT_ORDER.by,
    sort_order: Direction = _DEFAULT_ORDER.direction,
) -> Order[ModelSortBy]:
    """Return the order of the list; `severity` descending is the worst first: not available, not served, served."""
    return Order(sort_by, sort_order)


ModelOrderDependency = Annotated[Order[ModelSortBy], Depends(get_model_order)]


@router.get("", response_model=ModelList, responses=declare(Unauthorized, key=False))
async def list_models(
    clock: Provided[DatabaseClock],
    fleet: Provided[Fleet],
    viewer: Anyone,
    page: PageDependency,
    order: ModelOrderDependency,
    available: Annotated[
        Literal["true", "false"] | None,
        Query(description="`true`: only models that can be run right now; `false`: only others; left out: all."),
    ] = None,
    format: Annotated[ModelFormat | None, Query()] = None,  # noqa: A002 - the contract's name
    runtime: Annotated[Text | None, Query(description="Only models that run on this runtime.")] = None,
    max_vram: Annotated[
        float | None,
        Query(alias="maxVram", ge=0, allow_inf_nan=False, description="Only models that need at most this many GB."),
    ] = None,
    owner: Annotated[Text | None, Query()] = None,
    tags: Tags = [],  # noqa: B006 - FastAPI copies it
    search: Annotated[
        Text | None, Query(description="Part of the name or the description, or the beginning of the id.")
    ] = None,
) -> ModelList:
    """List models, each with `available` and `served`. The filter applies before paging, so totals are exact."""
    criteria = ModelSearch(format, runtime, max_vram, owner, split_tags(tags), search)
    now = clock.now()
    models = _find(fleet, criteria, order, now)
    if available is not None:
        expected = available == "true"
        models = [m for m in models if is_available(fleet, m, now) is expected]
    return ModelList(
        models=[view_model(fleet, model, viewer, now) for model in page.slice_of(models)],
        pagination=page.pagination(len(models)),
    )


@router.get(
    "/{id_or_name:path}/availability",
    response_model=ModelAvailability,
    response_model_exclude_unset=True,
    responses=declare(ModelNotFound, Unauthorized, key=False),
)
async def get_availability(
    id_or_name: str,
    fleet: Provided[Fleet],
    clock: Provided[DatabaseClock],
    feed: Provided[ChangeFeed],
    viewer: Anyone,
    page: OptionalPageDependency,
    reason: Annotated[ReasonCode | None, Query(description="Only nodes with this reason.")] = None,
) -> ModelAvailability:
    """Explain for each node why it can or can't run the model right now: every failing rule, and what it requires.

    All nodes are listed, unless `page` or `perPage` is sent. Nodes that have ended come last.
    """
    model = await _get(fleet, feed, id_or_name)
    return await explain_availability(fleet, model, viewer, clock.now(), shown=Shown(reason and reason.value, page))


@router.get("/{id_or_name:path}", response_model=ModelView, responses=declare(ModelNotFound, Unauthorized, key=False))
async def get_model(
    id_or_name: str, fleet: Provided[Fleet], clock: Provided[DatabaseClock], feed: Provided[ChangeFeed], viewer: Anyone
) -> ModelView:
    """Read one model by its passport id, its name or an alias; slashes may be written raw or as %2F."""
    model = await _get(fleet, feed, id_or_name)
    return view_model(fleet, model, viewer, clock.now())


def _find(fleet: Fleet, criteria: ModelSearch, order: Order[ModelSortBy], now: datetime) -> list[ModelPassport]:
    models = fleet.models_newest_first()
    if not criteria.is_empty:
        models = [model for model in models if criteria.matches(model)]
    return models if order == _DEFAULT_ORDER else sort_models(fleet, order, models, now)


async def _get(fleet: Fleet, feed: ChangeFeed, id_or_name: str) -> ModelPassport:
    if fleet.find_model(id_or_name) is None:
        await feed.catch_up()
    return fleet.get_model(id_or_name)
