"""The fleet at a glance, in one small answer."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Response

from lucid_compute.api.dependencies import Reader, ServiceDependency
from lucid_compute.api.error_responses import declare
from lucid_compute.errors import Forbidden
from lucid_compute.field_types import Text
from lucid_compute.wire.overview import Overview

router = APIRouter(prefix="/compute", tags=["metrics"])
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "Nothing changed since the ETag in If-None-Match"}}


@router.get("/overview", response_model=Overview, responses={**declare(), **_UNCHANGED})
async def get_overview(
    service: ServiceDependency,
    principal: Reader,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    known: Annotated[str | None, Header(alias="If-None-Match", include_in_schema=False)] = None,
) -> Response:
    """Read how the fleet is right now, in one small answer: one's own nodes, an admin's are all; and every model.

    It is counted once a second at most, however many ask, and at once when a node or a model changes. It carries an
    ETag: sent back as `If-None-Match`, it is answered 304 for as long as nothing has changed.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden("Only an admin may look at another owner's nodes. Leave owner out.")
    glance = await service.overviews.get(owner or principal.sees)
    headers = {"ETag": glance.etag, "Cache-Control": "no-store"}
    if known == glance.etag:
        return Response(status_code=304, headers=headers)
    return Response(glance.body, media_type="application/json", headers=headers)
