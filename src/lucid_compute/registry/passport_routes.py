"""Passports over HTTP: create, list, read, change and revoke them."""

from __future__ import annotations

from hashlib import sha256
from math import ceil
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import ValidationError

from lucid_compute.errors import (
    Forbidden,
    IdempotencyConflict,
    InvalidRequest,
    LucidError,
    ModelNameTaken,
    Overloaded,
    PassportExists,
    PassportNotFound,
    RequestsInFlight,
)
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.domain.passports import NewPassport, Passport, PassportStatus, PassportType
from lucid_compute.registry.idempotency import Idempotency
from lucid_compute.registry.keys.dependencies import COMPUTE_WRITERS, PASSPORT_WRITERS, ActorDependency, AnyKey, Reader
from lucid_compute.registry.keys.rate_limits import WriteRates
from lucid_compute.registry.passport_store import PASSPORTS_A_TURN, PassportSearch, PassportStore
from lucid_compute.registry.shapes import (
    BatchAnswer,
    BatchFault,
    BatchResult,
    PassportBatch,
    PassportCreate,
    PassportList,
    PassportPatch,
    PassportView,
)
from lucid_compute.registry.views import view_passport
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.web.turns import in_turns
from lucid_compute.wire import Text, faults_from

router = APIRouter(prefix="/passports", tags=["passports"])
PASSPORTS_A_CHANGE = 10  # of a batch: the service spends less than a tenth of a single registration's time on each

Tags = Annotated[list[Text], Query(description="Only those with all of these tags: repeated, or separated by commas.")]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x21-\x7e]+$",
        description="A repeat with the same key and body within a day returns the passport that the first created.",
    ),
]


@router.post(
    "",
    status_code=201,
    response_model=PassportView,
    responses=declare(PassportExists, ModelNameTaken, IdempotencyConflict, body=True),
)
async def create_passport(
    body: PassportCreate,
    request: Request,
    response: Response,
    passport_store: Provided[PassportStore],
    principal: AnyKey,
    actor: ActorDependency,
    idempotency_key: IdempotencyKey = None,
) -> PassportView:
    """Register a node, a model, or anything else with an identity. A compute passport is a node from then on."""
    new = _read_new(body, principal)
    idempotency = await _idempotency_of(request, idempotency_key)
    passport = await passport_store.create(actor, new, is_admin=principal.is_admin, idempotency=idempotency)
    response.headers["Location"] = f"{request.app.state.root_path}/passports/{passport.id}"
    return view_passport(passport, principal)


@router.post(":batchCreate", response_model=BatchAnswer, responses=declare(IdempotencyConflict, Overloaded, body=True))
async def create_passports(
    body: PassportBatch,
    request: Request,
    passport_store: Provided[PassportStore],
    writes: Provided[WriteRates],
    principal: AnyKey,
    actor: ActorDependency,
    idempotency_key: IdempotencyKey = None,
) -> Response:
    """Register up to 1,000 passports. Each has its own result, with the status and the error of `POST /passports`.

    Ten of them count as one change. A repeat with the same Idempotency-Key returns what the first call created, and
    tries again what was refused.
    """
    if principal.scopes.isdisjoint({*COMPUTE_WRITERS, *PASSPORT_WRITERS}):
        principal.require({*COMPUTE_WRITERS, *PASSPORT_WRITERS})
    writes.charge(principal, ceil(len(body.passports) / PASSPORTS_A_CHANGE) - 1)
    wanted = [_try_new(item, principal) async for item in in_turns(body.passports, PASSPORTS_A_TURN)]
    idempotency = await _idempotency_of(request, idempotency_key)
    results = await passport_store.create_many(actor, wanted, is_admin=principal.is_admin, idempotency=idempotency)
    return Response(await _write_results(results, principal), media_type="application/json")


@router.get("", response_model=PassportList, responses=declare())
async def list_passports(
    passport_store: Provided[PassportStore],
    principal: Reader,
    page: PageDependency,
    order: OrderDependency,
    type: Annotated[PassportType | None, Query()] = None,  # noqa: A002 - the contract's name
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
    status: Annotated[PassportStatus | None, Query()] = None,
    tags: Tags = [],  # noqa: B006 - FastAPI copies it
    search: Annotated[Text | None, Query(description="Part of the name or the description.")] = None,
) -> PassportList:
    """List your own passports; an admin lists all. With `type=model`, list every owner's models."""
    sees_all = principal.is_admin or type is PassportType.MODEL
    if owner is not None and not sees_all and owner != principal.owner:
        message = "Only an admin may list another owner's passports. Leave owner out."
        raise Forbidden(message)
    criteria = PassportSearch(
        owner=owner if sees_all else principal.owner,
        type=type,
        status=status,
        tags=split_tags(tags),
        text=search,
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
    )
    passports, total = await passport_store.search(criteria)
    views = [view_passport(passport, principal) for passport in passports]
    return PassportList(passports=views, pagination=page.pagination(total))


@router.get("/{passport_id}", response_model=PassportView, responses=declare(PassportNotFound))
async def get_passport(passport_id: str, passport_store: Provided[PassportStore], principal: Reader) -> PassportView:
    """Read one passport, also a revoked one."""
    return view_passport(await passport_store.get(passport_id, visible_owner=principal.visible_owner), principal)


@router.patch(
    "/{passport_id}",
    response_model=PassportView,
    responses=declare(PassportNotFound, PassportExists, ModelNameTaken, RequestsInFlight, body=True),
)
async def change_passport(
    passport_id: str,
    body: PassportPatch,
    passport_store: Provided[PassportStore],
    principal: AnyKey,
    actor: ActorDependency,
) -> PassportView:
    """Change a passport by an RFC 7396 merge patch: what is left out stays, null removes, also inside `metadata`."""
    await _require_writer_of(passport_id, passport_store, principal)
    patch = body.model_dump(mode="json", by_alias=True, exclude_unset=True)
    return view_passport(
        await passport_store.change(actor, passport_id, patch, visible_owner=principal.visible_owner), principal
    )


@router.delete("/{passport_id}", status_code=204, responses=declare(PassportNotFound, RequestsInFlight))
async def revoke_passport(
    passport_id: str, passport_store: Provided[PassportStore], principal: AnyKey, actor: ActorDependency
) -> None:
    """Revoke a passport, which is final. A node's is revoked only when no replica runs a request on it.

    It stays readable, and its name can be registered again.
    """
    await _require_writer_of(passport_id, passport_store, principal)
    await passport_store.revoke(actor, passport_id, visible_owner=principal.visible_owner)


def split_tags(tags: list[str]) -> tuple[str, ...]:
    """Return the tags of a query, whether repeated or separated by commas."""
    return tuple(tag.strip() for entry in tags for tag in entry.split(",") if tag.strip())


def _read_new(body: PassportCreate, principal: Principal) -> NewPassport:
    """Return the passport that a key asks for.

    Raises:
        Forbidden: the key may not create it.
    """
    _require_writer(principal, body.type)
    return NewPassport(
        type=body.type,
        owner=_owner_of(body.owner, principal),
        name=body.name,
        description=body.description,
        version=body.version,
        tags=list(body.tags),
        metadata=body.metadata,
    )


def _try_new(item: Any, principal: Principal) -> NewPassport | LucidError:
    if not isinstance(item, dict):
        return InvalidRequest.at("", "A passport is a JSON object. Send one with name, type and metadata.")
    try:
        return _read_new(PassportCreate.model_validate(item), principal)
    except ValidationError as error:
        return InvalidRequest(faults_from(error.errors(include_url=False)))
    except LucidError as error:
        return error


async def _idempotency_of(request: Request, key: str | None) -> Idempotency | None:
    return Idempotency(key, sha256(await request.body()).digest()) if key else None


async def _write_results(results: list[Passport | LucidError], principal: Principal) -> bytes:
    """Return the body of the response. It is written in turns: 1,000 passports are too many for one."""
    written = [_write_result(result, principal) async for result in in_turns(results, PASSPORTS_A_TURN)]
    refused = sum(isinstance(result, LucidError) for result in results)
    head = f'{{"created":{len(results) - refused},"refused":{refused},"results":['
    return b"".join([head.encode(), b",".join(written), b"]}"])


def _write_result(result: Passport | LucidError, principal: Principal) -> bytes:
    if isinstance(result, LucidError):
        fault = BatchFault(**result.body()["error"])
        view = BatchResult(status=fault.status, error=fault)
    else:
        view = BatchResult(status=201, passport=view_passport(result, principal))
    return view.model_dump_json(exclude_unset=True).encode()


async def _require_writer_of(passport_id: str, passport_store: Provided[PassportStore], principal: Principal) -> None:
    """Refuse a key that may not change passports of this type; another owner's passport is not found.

    Raises:
        PassportNotFound: there is no such passport, or it is another owner's.
        Forbidden: the key lacks the scope, or is bound to another node.
    """
    if principal.scopes.isdisjoint({*COMPUTE_WRITERS, *PASSPORT_WRITERS}):
        principal.require({*COMPUTE_WRITERS, *PASSPORT_WRITERS})
    passport = await passport_store.get(passport_id, visible_owner=principal.visible_owner)
    _require_writer(principal, passport.type)
    principal.require_node(passport_id)


def _require_writer(principal: Principal, passport_type: PassportType) -> None:
    principal.require(COMPUTE_WRITERS if passport_type is PassportType.COMPUTE else PASSPORT_WRITERS)


def _owner_of(owner: str | None, principal: Principal) -> str:
    """Return the owner of a new passport.

    Raises:
        Forbidden: another owner is named and the principal is no admin, or the key is bound to one node.
    """
    if principal.passport_id is not None:
        principal.require_node("a new one")
    if owner is not None and owner != principal.owner and not principal.is_admin:
        message = "Only an admin may name another owner. Leave owner out."
        raise Forbidden(message)
    return owner or principal.owner
