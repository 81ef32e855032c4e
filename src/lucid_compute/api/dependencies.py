"""What routes ask for: the service, the caller, a page, the actor that the audit trail names."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from lucid_compute.api.authentication import authorization_of
from lucid_compute.api.service import Service
from lucid_compute.errors import Forbidden
from lucid_compute.fleet.key_ring import Principal
from lucid_compute.storage.audit import Actor
from lucid_compute.wire.keys import Scope
from lucid_compute.wire.lists import DEFAULT_PER_PAGE, MAX_PER_PAGE, NodeSortBy, Pagination, SortBy, SortOrder

_bearer = HTTPBearer(auto_error=False, bearerFormat="lk_live_…", description="An API key, made with POST /keys.")
_MAX_PAGE = 1_000_000_000
Item = TypeVar("Item")
By = TypeVar("By", SortBy, NodeSortBy)

READERS = (Scope.PASSPORTS_READ, Scope.COMPUTE, Scope.ADMIN)
COMPUTE_WRITERS = (Scope.COMPUTE, Scope.ADMIN)
PASSPORT_WRITERS = (Scope.PASSPORTS_WRITE, Scope.ADMIN)
ADMINS = (Scope.ADMIN,)
INFERRERS = (Scope.INFERENCE_RUN, Scope.ADMIN)


async def get_service(request: Request) -> Service:
    """Answer the replica that serves this request."""
    service: Service = request.app.state.service
    return service


ServiceDependency = Annotated[Service, Depends(get_service)]


async def get_principal(
    request: Request,
    service: ServiceDependency,
    _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """Answer who makes the request, or refuse it with 401; or with 429, past the key's own limit."""
    address = request.client.host if request.client else None
    authorization = authorization_of(request.scope, dict(request.scope["headers"]))
    principal = await service.authenticator.authenticate(authorization, address)
    service.rates.spend_request(principal)
    return principal


async def find_principal(request: Request, service: ServiceDependency) -> Principal | None:
    """Answer who makes the request; None when it brings no key, 401 when it brings a wrong one."""
    if request.headers.get("authorization") is None:
        return None
    return await get_principal(request, service, None)


def _with_scope(*allowed: Scope) -> Callable[[Principal], Coroutine[Any, Any, Principal]]:
    async def require(principal: Annotated[Principal, Depends(get_principal)]) -> Principal:
        principal.require(allowed)
        return principal

    return require


AnyKey = Annotated[Principal, Depends(get_principal)]
Reader = Annotated[Principal, Depends(_with_scope(*READERS))]
ComputeWriter = Annotated[Principal, Depends(_with_scope(*COMPUTE_WRITERS))]
Inferrer = Annotated[Principal, Depends(_with_scope(*INFERRERS))]
Admin = Annotated[Principal, Depends(_with_scope(*ADMINS))]
Anyone = Annotated[Principal | None, Depends(find_principal)]


def owner_of(principal: Principal, owner: str | None, what: str) -> str | None:
    """Answer whose things are asked for: those of `owner`, else one's own, None is everybody's.

    Raises:
        Forbidden: they are another's, and it is no admin who asks.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden(f"Only an admin may read another owner's {what}. Leave owner out.")
    return owner or principal.sees


async def get_actor(request: Request, principal: Annotated[Principal, Depends(get_principal)]) -> Actor:
    """Answer what the audit trail says of the caller."""
    address = request.client.host if request.client else None
    return Actor(principal.key_id, principal.owner, address, request.state.request_id)


ActorDependency = Annotated[Actor, Depends(get_actor)]


@dataclass(frozen=True, slots=True)
class Page:
    """Which page of a list is asked for, from 1."""

    number: int
    per_page: int

    @property
    def offset(self) -> int:
        """How many items stand before it."""
        return (self.number - 1) * self.per_page

    def slice_of(self, items: list[Item]) -> list[Item]:
        """Answer this page of a whole list."""
        return items[self.offset : self.offset + self.per_page]

    def pagination(self, total: int) -> Pagination:
        """Answer where it stands in a list of `total` items."""
        total_pages = -(-total // self.per_page)
        return Pagination(total=total, page=self.number, per_page=self.per_page, total_pages=total_pages)


async def get_page(
    page: Annotated[int, Query(ge=1, le=_MAX_PAGE, description="Counts from 1; past the end is empty.")] = 1,
    per_page: Annotated[int, Query(alias="perPage", ge=1, le=MAX_PER_PAGE)] = DEFAULT_PER_PAGE,
) -> Page:
    """Answer the page that is asked for."""
    return Page(page, per_page)


async def find_page(
    page: Annotated[int | None, Query(ge=1, le=_MAX_PAGE, description="Counts from 1; past the end is empty.")] = None,
    per_page: Annotated[int | None, Query(alias="perPage", ge=1, le=MAX_PER_PAGE)] = None,
) -> Page | None:
    """Answer the page that is asked for; None when none is."""
    if page is None and per_page is None:
        return None
    return Page(page or 1, per_page or DEFAULT_PER_PAGE)


@dataclass(frozen=True, slots=True)
class Order(Generic[By]):
    """What a list is ordered by, and which end comes first."""

    by: By
    direction: SortOrder


_Direction = Annotated[SortOrder, Query(alias="sortOrder")]


async def get_order(
    sort_by: Annotated[SortBy, Query(alias="sortBy")] = SortBy.CREATED_AT, sort_order: _Direction = SortOrder.DESCENDING
) -> Order[SortBy]:
    """Answer the order that is asked for."""
    return Order(sort_by, sort_order)


async def get_node_order(
    sort_by: Annotated[NodeSortBy, Query(alias="sortBy")] = NodeSortBy.CREATED_AT,
    sort_order: _Direction = SortOrder.DESCENDING,
) -> Order[NodeSortBy]:
    """Answer the order that is asked for; nodes of which it is not known come last, either way."""
    return Order(sort_by, sort_order)


PageDependency = Annotated[Page, Depends(get_page)]
OptionalPageDependency = Annotated[Page | None, Depends(find_page)]
NodeOrderDependency = Annotated[Order[NodeSortBy], Depends(get_node_order)]
OrderDependency = Annotated[Order[SortBy], Depends(get_order)]
