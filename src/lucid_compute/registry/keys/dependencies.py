"""FastAPI dependencies that authenticate a request, check its scope, and name its actor for the audit trail."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from lucid_compute.errors import Forbidden
from lucid_compute.registry.domain.identity import Actor, Principal, Scope
from lucid_compute.registry.keys.authentication import Authenticator, authorization_of, names_key
from lucid_compute.registry.keys.key_rates import KeyRates
from lucid_compute.registry.keys.rate_limits import WriteRates
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
    """Return the principal of the request's key, and count the request against the key's limit.

    Raises:
        Unauthorized: the request has no valid key.
        RateLimited: the key's limit, or that of failures from the address, is reached.
    """
    address = request.client.host if request.client else None
    authorization = authorization_of(request.scope, dict(request.scope["headers"]))
    principal = await authenticator.authenticate(authorization, address)
    while not rates.spend(principal, minds_tokens=False):
        await rates.ask(principal)
    return principal


async def find_principal(
    request: Request, authenticator: Provided[Authenticator], rates: Provided[KeyRates]
) -> Principal | None:
    """Return the principal of the request's key; None if the request has no key.

    Raises:
        Unauthorized: the request's key is not valid.
        RateLimited: the key's limit, or that of failures from the address, is reached.
    """
    if not names_key(request.scope, dict(request.scope["headers"])):
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
JobReader = Annotated[Principal, Depends(_with_scope(*READERS, Scope.INFERENCE_RUN))]
Admin = Annotated[Principal, Depends(_with_scope(*ADMINS))]
Anyone = Annotated[Principal | None, Depends(find_principal)]


def owner_of(principal: Principal, owner: str | None, what: str) -> str | None:
    """Return the owner to filter by: `owner`, else the principal's own. None, for admins, means all owners.

    Raises:
        Forbidden: `owner` is another owner, and the principal is not an admin.
    """
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden(f"Only an admin may read another owner's {what}. Leave owner out.")
    return owner or principal.visible_owner


async def get_actor(
    request: Request, writes: Provided[WriteRates], principal: Annotated[Principal, Depends(get_principal)]
) -> Actor:
    """Return the caller, as recorded in the audit trail, and count the change against the limits of its key and owner.

    Raises:
        RateLimited: the key, or its owner, has asked for too many changes.
    """
    writes.spend(principal)
    address = request.client.host if request.client else None
    return Actor(principal.key_id, principal.owner, address, request.state.request_id)


ActorDependency = Annotated[Actor, Depends(get_actor)]
