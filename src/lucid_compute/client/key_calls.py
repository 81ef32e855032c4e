"""Calls about API keys and the audit trail, for admins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from types import NoneType
from typing import Any, TypedDict, Unpack

from lucid_compute.client.call import ApiCall, PagedCall, body_of, given, path_of, query_of
from lucid_compute.registry.domain.key_limits import KeyLimits
from lucid_compute.registry.keys.shapes import (
    AuditList,
    AuditView,
    KeyCreate,
    KeyList,
    KeyPatch,
    KeyRotate,
    KeyView,
    NewKey,
)


class KeyChanges(TypedDict, total=False):
    """The fields that `update` can change. A field left out stays; None removes it, also inside `limits`."""

    name: str
    expires_at: datetime | None
    limits: Mapping[str, Any] | None


def create(
    *,
    name: str,
    owner: str,
    scopes: Sequence[str],
    passport_id: str | None = None,
    expires_at: datetime | None = None,
    limits: KeyLimits | Mapping[str, Any] | None = None,
) -> ApiCall[NewKey]:
    """Create a key for an owner. Its secret is in this response only.

    `limits` has any of `requestsPerMinute`, `tokensPerMinute`, `concurrency`, `models`, and `budgetUsd` with
    `budgetPeriod` (`day` or `month`); names may be Python's (`budget_usd`) too.

    The call is not sent again after a lost response, because that would create a second key. Look for the first with
    `list`.
    """
    fields = given(passport_id=passport_id, expires_at=expires_at, limits=limits)
    body = body_of(KeyCreate, name=name, owner=owner, scopes=list(scopes), **fields)
    return ApiCall(method="POST", path="/keys", body=body, answer=NewKey, is_repeatable=False)


def list_(
    *, owner: str | None = None, sort_by: str | None = None, sort_order: str | None = None
) -> PagedCall[KeyList, KeyView]:
    """Iterate over the keys that are not revoked, without their secrets."""
    query = query_of(owner=owner, sort_by=sort_by, sort_order=sort_order)
    return PagedCall(path="/keys", query=query, answer=KeyList, items=lambda page: page.keys)


def update(key_id: str, **changes: Unpack[KeyChanges]) -> ApiCall[KeyView]:
    """Change a key's name, expiry or limits; its secret stays. None removes, also inside `limits` (RFC 7396)."""
    return ApiCall(method="PATCH", path=path_of("keys", key_id), body=body_of(KeyPatch, **changes), answer=KeyView)


def me() -> ApiCall[KeyView]:
    """Read the key of this client: whose it is, what it may do, its limits and its end."""
    return ApiCall(method="GET", path="/me", answer=KeyView)


def rotate(key_id: str, *, now: bool = False) -> ApiCall[NewKey]:
    """Give a key a new secret. The previous one stays valid for 24 hours; with `now` it ends at once.

    The call is not sent again after a lost response, because the new secret would be lost. Rotate once more.
    """
    body = body_of(KeyRotate, now=now)
    return ApiCall(method="POST", path=path_of("keys", key_id, "rotate"), body=body, answer=NewKey, is_repeatable=False)


def revoke(key_id: str) -> ApiCall[None]:
    """Revoke a key: at once on this replica, within two seconds on all others."""
    return ApiCall(method="DELETE", path=path_of("keys", key_id), answer=NoneType, is_done_when_missing=True)


def audit(
    *,
    target_id: str | None = None,
    action: str | None = None,
    actor: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[AuditList, AuditView]:
    """Iterate over all changes, newest first: who did what, to which target, when, and from where.

    `action` is an action or a group of them (`key`), `actor` an owner or a key's id.
    """
    query = query_of(
        target_id=target_id,
        action=action,
        actor=actor,
        since=since,
        until=until,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(path="/audit", query=query, answer=AuditList, items=lambda page: page.events)
