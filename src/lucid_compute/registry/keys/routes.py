"""The routes of API keys and the audit trail, for admins. Each key may read itself."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from lucid_compute.errors import KeyNotFound
from lucid_compute.registry.keys.audit import AuditQuery, AuditTrail
from lucid_compute.registry.keys.dependencies import ActorDependency, Admin, AnyKey
from lucid_compute.registry.keys.shapes import AuditList, KeyCreate, KeyList, KeyPatch, KeyRotate, KeyView, NewKey
from lucid_compute.registry.keys.store import KeyStore
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.wire import Instant, Text

router = APIRouter(tags=["keys"])


@router.post("/keys", status_code=201, response_model=NewKey, responses=declare(body=True))
async def create_key(body: KeyCreate, key_store: Provided[KeyStore], _: Admin, actor: ActorDependency) -> NewKey:
    """Create a key for an owner. Its secret is in this response and nowhere else."""
    return await key_store.create(actor, body)


@router.get("/keys", response_model=KeyList, responses=declare())
async def list_keys(
    key_store: Provided[KeyStore],
    _: Admin,
    page: PageDependency,
    order: OrderDependency,
    owner: Annotated[Text | None, Query()] = None,
) -> KeyList:
    """List the keys that are not revoked, without their secrets; `updatedAt` is the last rotation."""
    keys, total = await key_store.list_page(
        owner=owner, sort_by=order.by, sort_order=order.direction, offset=page.offset, limit=page.per_page
    )
    return KeyList(keys=keys, pagination=page.pagination(total))


@router.patch("/keys/{key_id}", response_model=KeyView, responses=declare(KeyNotFound, body=True))
async def change_key(
    key_id: str, body: KeyPatch, key_store: Provided[KeyStore], _: Admin, actor: ActorDependency
) -> KeyView:
    """Change a key's name, expiry or limits; its secret stays. Owner, scopes and node are fixed.

    The next request of the key has the new limits: at once on this replica, within two seconds on all. What it has
    spent counts on.
    """
    return await key_store.change(actor, key_id, body)


@router.get("/me", response_model=KeyView, responses=declare(KeyNotFound))
async def get_own_key(key_store: Provided[KeyStore], principal: AnyKey) -> KeyView:
    """Read the key of this request: whose it is, what it may do, its limits and its end."""
    return await key_store.get(principal.key_id)


@router.post("/keys/{key_id}/rotate", response_model=NewKey, responses=declare(KeyNotFound, body=True))
async def rotate_key(
    key_id: str, key_store: Provided[KeyStore], _: Admin, actor: ActorDependency, body: KeyRotate | None = None
) -> NewKey:
    """Give a key a new secret. The previous one stays valid for 24 hours, or ends at once with `{"now": true}`."""
    return await key_store.rotate(actor, key_id, now=body.now if body else False)


@router.delete("/keys/{key_id}", status_code=204, responses=declare(KeyNotFound))
async def revoke_key(key_id: str, key_store: Provided[KeyStore], _: Admin, actor: ActorDependency) -> None:
    """Revoke a key: at once on this replica, within two seconds on all."""
    await key_store.revoke(actor, key_id)


@router.get("/audit", response_model=AuditList, responses=declare())
async def list_audit(
    audit_trail: Provided[AuditTrail],
    _: Admin,
    page: PageDependency,
    order: OrderDependency,
    target_id: Annotated[Text | None, Query(alias="targetId", description="A passport's or a key's id.")] = None,
    action: Annotated[Text | None, Query(description="Such as `key.revoke`, or a group of them: `key`.")] = None,
    actor: Annotated[Text | None, Query(description="The owner who made the change, or the id of the key.")] = None,
    since: Annotated[Instant | None, Query(description="Only changes at this instant or later.")] = None,
    until: Annotated[Instant | None, Query(description="Only changes before this instant.")] = None,
) -> AuditList:
    """List every change: who, what, target, when, from where. `name` sorts by the action.

    `total` is exact up to 100,000; of more rows there are at least so many, and further pages can be read.
    """
    query = AuditQuery(target_id, action, actor, since, until)
    events, total = await audit_trail.list_page(
        query, sort_by=order.by, sort_order=order.direction, offset=page.offset, limit=page.per_page
    )
    return AuditList(events=events, pagination=page.pagination(total))
