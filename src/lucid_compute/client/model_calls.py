"""Calls about models."""

from __future__ import annotations

from collections.abc import Sequence

from lucid_compute.client.call import ApiCall, PagedCall, path_of, query_of, refuse
from lucid_compute.registry.shapes import ModelAvailability, ModelList, ModelView

_AVAILABILITY = "/availability"


def list_(
    *,
    available: bool | None = None,
    format: str | None = None,  # noqa: A002 - the contract's name
    runtime: str | None = None,
    max_vram: float | None = None,
    owner: str | None = None,
    tags: Sequence[str] | None = None,
    search: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[ModelList, ModelView]:
    """Iterate over models, each with `available` and `served`: those that can run now, those that can't, or all."""
    query = query_of(
        available=available,
        format=format,
        runtime=runtime,
        max_vram=max_vram,
        owner=owner,
        tags=None if tags is None else list(tags),
        search=search,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(path="/models", query=query, answer=ModelList, items=lambda page: page.models)


def get(id_or_name: str) -> ApiCall[ModelView]:
    """Read one model by its passport id, its name or an alias. Names may contain slashes."""
    if id_or_name.endswith(_AVAILABILITY):
        raise refuse("model", "No model's name ends in /availability. Call models.availability with what comes before.")
    return ApiCall(method="GET", path=path_of("models", id_or_name), answer=ModelView)


def availability(id_or_name: str, *, reason: str | None = None) -> ApiCall[ModelAvailability]:
    """Explain for each node why the model can or can't run now; with `reason`, only for nodes with that reason."""
    path = path_of("models", id_or_name) + _AVAILABILITY
    return ApiCall(method="GET", path=path, query=query_of(reason=reason), answer=ModelAvailability)
