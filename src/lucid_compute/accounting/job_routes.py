"""The route that lists jobs: the attempts on an owner's nodes, with their outcomes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from lucid_compute.accounting.job_counts import JobFilter
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.shapes import JobList
from lucid_compute.errors import NodeNotFound
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import Reader, owner_of
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Instant, Text

router = APIRouter(prefix="/compute/jobs", tags=["compute"])


@router.get("", response_model=JobList, responses=declare(NodeNotFound))
async def list_jobs(
    registry: Provided[ComputeRegistry],
    job_search: Provided[JobSearch],
    fleet: Provided[Fleet],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    passport_id: Annotated[Text | None, Query(alias="passportId", description="The node.")] = None,
    model: Annotated[Text | None, Query(description="The model's id, name or alias.")] = None,
    outcome: Annotated[Outcome | None, Query(description="How they ended.")] = None,
    since: Annotated[Instant | None, Query(description="Jobs that started at this instant or later.")] = None,
    until: Annotated[Instant | None, Query(description="Jobs that started before this instant.")] = None,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
) -> JobList:
    """List the attempts on your nodes; an admin sees all. `name` sorts by the model.

    Each attempt of a request is a job, with the request's id. It is listed a few hundredths of a second after it has
    ended. One that takes longer than a second is listed while it runs.
    """
    whose = owner_of(principal, owner, "jobs")
    if passport_id is not None:
        await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    job_filter = JobFilter(
        owner=whose,
        node_id=passport_id,
        outcome=outcome,
        model_ids=None if model is None else await _find_models(fleet, job_search, model),
        since=since,
        until=until,
    )
    jobs, total = await job_search.list_page(
        job_filter,
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
        shows_consumer=principal.is_admin,
    )
    return JobList(jobs=jobs, pagination=page.pagination(total))


async def _find_models(fleet: Fleet, job_search: JobSearch, named: str) -> list[str]:
    """Return the ids of the models with this id, name or alias; models that had the name and were deleted, too."""
    known = fleet.find_model(named)
    return sorted({*await job_search.find_model_ids(named), *([known.id] if known else ())})
