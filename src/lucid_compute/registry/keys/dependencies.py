"""lucid_compute.registry.keys.dependencies."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from lucid_compute.errors import Forbidden
from lucid_compute.registry.domain.identity import Actor, Principal, Scope
from lucid_compute.registry.keys.authentication import Authenticator, authorization_of
from lucid_compute.registry.keys.rate_limits import KeyRates
from lucid_compute.web.provide import Provided

_bearer = HTTPBearer(auto_error=False, bearerFormat="lk_live_…", description="An API key, made with POST /keys.")
READERS = (Scope.PASSPORTS_READ, Scope.COMPUTE, Scope.ADMIN)
COMPUTE_WRITERS = (Scope.COMPUTE, Scope.ADMIN)
PASSPORT_WRITERS = (Scope.PASSPORTS_WRITE, Scope.ADMIN)
ADMINS = (Scope.ADMIN,)
INFERRERS = (Scope.INFERENCE_RUN, Scope.ADMIN)


async def get_principal(
    request: Request,
    authenticator: Provided[Authenticator],
    rates: Provided[KeyRates],
    _: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """Return who makes the request, or refuse it with 401; or with 429, past the key's own limit."""
    address = request.client.host if request.client else None
    authorization = authorization_of(request.scope, dict(request.scope["headers"]))
    principal = await authenticator.authenticate(authorization, address)
    rates.spend_request(principal)
    return principal


async def find_principal(
    request: Request, authenticator: Provided[Authenticator], rates: Provided[KeyRates]
) -> Principal | None:
    """Return who makes the request; None when it brings no key, 401 when it brings a wrong one."""
    if request.headers.get("authorization") is None:
        return None
    return await get_principal(request, authenticator, rates, None)


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
    """Return whose things are asked for: those of `owner`, else one's own, None is everybody's.

    Raises:
        Forbidden: they are another's, and it is no admin who asks.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden(f"Only an admin may read another owner's {what}. Leave owner out.")
    return owner or principal.visible_owner


async def get_actor(request: Request, principal: Annotated[Principal, Depends(get_principal)]) -> Actor:
    """Return what the audit trail says of the caller."""
    address = request.client.host if request.client else None
    return Actor(principal.key_id, principal.owner, address, request.state.request_id)


ActorDependency = Annotated[Actor, Depends(get_actor)]
