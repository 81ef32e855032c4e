"""The route that lists jobs: the attempts on an owner's nodes, or of an owner's own requests, with their outcomes."""

from __future__ import annotations

from typing import Annotated, NamedTuple

from fastapi import APIRouter, Depends, Query

from lucid_compute.accounting.job_counts import JobFilter
from lucid_compute.accounting.job_search import JobSearch
from lucid_compute.accounting.jobs import Outcome
from lucid_compute.accounting.shapes import JobList
from lucid_compute.errors import NodeNotFound
from lucid_compute.postgres.queries import ids_are_uuids
from lucid_compute.registry.compute_registry import ComputeRegistry
from lucid_compute.registry.fleet.fleet import Fleet
from lucid_compute.registry.keys.dependencies import INFERRERS, READERS, JobReader, owner_of
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Instant, Text

router = APIRouter(prefix="/compute/jobs", tags=["compute"])


class Parties(NamedTuple):
    """Whose jobs are listed: those on an owner's nodes, those of a consumer's requests, or both; None is anybody's."""

    owner: str | None
    consumer: str | None


async def get_parties(
    principal: JobReader,
    owner: Annotated[Text | None, Query(description="The nodes' owner; another's for admins only.")] = None,
    consumer: Annotated[
        Text | None, Query(description="The owner of the keys that sent the requests; another's for admins only.")
    ] = None,
) -> Parties:
    """Return whose jobs the request asks for: those on the key's own nodes, if it may read them and does not say.

    Raises:
        Forbidden: the key may not see these jobs.
    """
    if consumer is None and (owner is not None or not principal.scopes.isdisjoint(READERS)):
        principal.require(READERS)
        return Parties(owner_of(principal, owner, "jobs"), None)
    principal.require(INFERRERS)
    if owner is not None:
        principal.require(READERS)
        owner = owner_of(principal, owner, "jobs")
    return Parties(owner, owner_of(principal, consumer, "requests"))


@router.get("", response_model=JobList, responses=declare(NodeNotFound))
async def list_jobs(
    registry: Provided[ComputeRegistry],
    job_search: Provided[JobSearch],
    fleet: Provided[Fleet],
    principal: JobReader,
    parties: Annotated[Parties, Depends(get_parties)],
    page: PageDependency,
    order: OrderDependency,
    passport_id: Annotated[Text | None, Query(alias="passportId", description="The node.")] = None,
    model: Annotated[Text | None, Query(description="The model's id, name or alias.")] = None,
    outcome: Annotated[Outcome | None, Query(description="How they ended.")] = None,
    since: Annotated[Instant | None, Query(description="Jobs that started at this instant or later.")] = None,
    until: Annotated[Instant | None, Query(description="Jobs that started before this instant.")] = None,
) -> JobList:
    """List the attempts on your nodes, or with `consumer` those of your own requests. `name` sorts by the model.

    An admin sees all. A key that may only run inference sees its owner's own requests. Each attempt of a request is a
    job, with the request's id. It is listed a few hundredths of a second after it has ended. One that takes longer than
    a second is listed while it runs.
    """
    if passport_id is not None and (parties.consumer is None or not ids_are_uuids(passport_id)):
        await registry.get_passport(passport_id, visible_owner=principal.visible_owner)
    model_ids = None if model is None else await find_model_ids(fleet, job_search, model)
    jobs, total = await job_search.list_page(
        JobFilter(*parties, passport_id, outcome, model_ids, since, until),
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
        viewer=principal.visible_owner,
    )
    return JobList(jobs=jobs, pagination=page.pagination(total))


async def find_model_ids(fleet: Fleet, job_search: JobSearch, named: str) -> list[str]:
    """Return the ids of the models with this id, name or alias; models that had the name and were deleted, too."""
    known = fleet.find_model(named)
    return sorted({*await job_search.find_model_ids(named), *([known.id] if known else ())})
