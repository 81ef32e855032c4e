"""Models over HTTP, open to everyone: which there are, which can be served right now, and why not."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query

from lucid_compute.errors import ModelNotFound, Unauthorized
from lucid_compute.postgres.clock import DatabaseClock
from lucid_compute.registry.domain.passports import ModelFormat, ModelPassport
from lucid_compute.registry.fleet.change_feed import ChangeFeed
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Anyone
from lucid_compute.registry.matching_engine import ReasonCode, has_available_compute
from lucid_compute.registry.passport_routes import Tags, split_tags
from lucid_compute.registry.search import ModelSearch, sorted_by
from lucid_compute.registry.shapes import ModelAvailability, ModelList, ModelView
from lucid_compute.registry.views import Shown, explain_availability, view_model
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OptionalPageDependency, Order, OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import SortBy, SortOrder, Text

router = APIRouter(prefix="/models", tags=["models"])
_DEFAULT_ORDER = Order(SortBy.CREATED_AT, SortOrder.DESCENDING)


@router.get("", response_model=ModelList, responses=declare(Unauthorized, key=False))
async def list_models(
    clock: Provided[DatabaseClock],
    fleet: Provided[Fleet],
    viewer: Anyone,
    page: PageDependency,
    order: OrderDependency,
    available: Annotated[
        Literal["true", "false"] | None,
        Query(description="`true`: can be run right now; `false`: can't; left out: all."),
    ] = None,
    format: Annotated[ModelFormat | None, Query()] = None,  # noqa: A002 - the contract's name
    runtime: Annotated[Text | None, Query(description="A runtime that the model runs on.")] = None,
    max_vram: Annotated[
        float | None, Query(alias="maxVram", ge=0, allow_inf_nan=False, description="GB that the model may need.")
    ] = None,
    owner: Annotated[Text | None, Query()] = None,
    tags: Tags = [],  # noqa: B006 - FastAPI copies it
    search: Annotated[
        Text | None, Query(description="Part of the name or the description, or the beginning of the id.")
    ] = None,
) -> ModelList:
    """List models, each with `available` and `served`. The filter applies before paging, so totals are exact."""
    wanted = ModelSearch(format, runtime, max_vram, owner, split_tags(tags), search)
    now = clock.now()
    found = _find(fleet, wanted, order)
    if available is not None:
        wanted_verdict = available == "true"
        found = [m for m in found if has_available_compute(m, fleet.candidates(m, now), now) is wanted_verdict]
    return ModelList(
        models=[view_model(fleet, model, viewer, now) for model in page.slice_of(found)],
        pagination=page.pagination(len(found)),
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
    reason: Annotated[ReasonCode | None, Query(description="Only nodes with this reason against them.")] = None,
) -> ModelAvailability:
    """Explain, node by node, why a model can or can't be run right now: every failing rule, and what it wants.

    All nodes are listed, unless `page` or `perPage` asks for a page of them; those that have left stand last.
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


def _find(fleet: Fleet, wanted: ModelSearch, order: Order[SortBy]) -> list[ModelPassport]:
    models = fleet.models_newest_first()
    found = models if wanted.is_empty else [model for model in models if wanted.matches(model)]
    return found if order == _DEFAULT_ORDER else sorted_by(order, found)


async def _get(fleet: Fleet, feed: ChangeFeed, id_or_name: str) -> ModelPassport:
    if fleet.find_model(id_or_name) is None:
        await feed.catch_up()
    return fleet.get_model(id_or_name)
