"""Calls about passports, and how many passports fit into one call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, TypedDict, TypeVar, Unpack

from lucid_compute.client.call import ApiCall, PagedCall, body_of, checked_key, given, path_of, query_of
from lucid_compute.registry.shapes import (
    MAX_BATCH,
    BatchAnswer,
    PassportBatch,
    PassportCreate,
    PassportList,
    PassportPatch,
    PassportView,
)

Item = TypeVar("Item")
BATCH_BYTES = 1_000_000  # a body has 1 MiB at most
BATCH_VALUES = 20_000  # of JSON, which a body may hold; each follows a comma or an opening bracket


class PassportChanges(TypedDict, total=False):
    """The fields that `update` can change. A field left out stays; None removes it, also inside `metadata`."""

    name: str
    description: str | None
    version: str | None
    tags: Sequence[str] | None
    status: str
    metadata: Mapping[str, Any]


def create(
    *,
    name: str,
    type: str,  # noqa: A002 - the contract's name
    metadata: Mapping[str, Any] | None = None,
    description: str | None = None,
    version: str | None = None,
    tags: Sequence[str] | None = None,
    owner: str | None = None,
    idempotency_key: str | None = None,
) -> ApiCall[PassportView]:
    """Register a node, a model, or another thing with an identity. `metadata` keeps the contract's camelCase names.

    The call carries an idempotency key, so a repetition after a lost response finds the passport that the first one
    created. Pass your own key to be safe across restarts too.

    Raises:
        PassportExists: the owner already has a passport with that type and name; `passport_id` is its id.
    """
    key = checked_key(idempotency_key)
    fields = given(metadata=metadata, description=description, version=version, tags=tags, owner=owner)
    body = body_of(PassportCreate, name=name, type=type, **fields)
    return ApiCall(method="POST", path="/passports", body=body, answer=PassportView, idempotency_key=key)


def create_many(passports: Sequence[Mapping[str, Any]], *, idempotency_key: str | None = None) -> ApiCall[BatchAnswer]:
    """Register up to 1,000 passports. Each has its own result, so one that is refused raises nothing.

    A passport has the arguments of `create`. The call carries an idempotency key, as that of `create` does. To send
    more, use `split_batches`.
    """
    key = checked_key(idempotency_key)
    body = body_of(PassportBatch, passports=[*passports])
    return ApiCall(method="POST", path="/passports:batchCreate", body=body, answer=BatchAnswer, idempotency_key=key)


def split_batches(items: Iterable[Item], passport_of: Callable[[Item], Any] | None = None) -> Iterator[list[Item]]:
    """Yield the items in lists that `create_many` can send: of 1,000 at most, and within the limits of a body.

    `passport_of` returns the passport of an item; by default the items are passports.
    """
    batch: list[Item] = []
    size = values = 0
    for item in items:
        passport = item if passport_of is None else passport_of(item)
        written = json.dumps(passport, ensure_ascii=False, separators=(",", ":"))
        item_size = len(written.encode(errors="replace")) + 1
        item_values = written.count(",") + written.count("[") + written.count("{") + 1
        is_full = len(batch) == MAX_BATCH or size + item_size > BATCH_BYTES or values + item_values > BATCH_VALUES
        if batch and is_full:
            yield batch
            batch, size, values = [], 0, 0
        batch.append(item)
        size, values = size + item_size, values + item_values
    if batch:
        yield batch


def get(passport_id: str) -> ApiCall[PassportView]:
    """Read one passport, also a revoked one."""
    return ApiCall(method="GET", path=path_of("passports", passport_id), answer=PassportView)


def list_(
    *,
    type: str | None = None,  # noqa: A002 - the contract's name
    owner: str | None = None,
    status: str | None = None,
    tags: Sequence[str] | None = None,
    search: str | None = None,
    sort_by: str | None = None,
    sort_order: str | None = None,
) -> PagedCall[PassportList, PassportView]:
    """Iterate over your own passports, newest first by default; an admin sees all of them."""
    query = query_of(
        type=type,
        owner=owner,
        status=status,
        tags=None if tags is None else list(tags),
        search=search,
        sort_by=sort_by,
        sort_order=sort_order,
    )
    return PagedCall(path="/passports", query=query, answer=PassportList, items=lambda page: page.passports)


def update(passport_id: str, **changes: Unpack[PassportChanges]) -> ApiCall[PassportView]:
    """Change a passport. A field left out stays; None removes it, also inside `metadata` (RFC 7396)."""
    body = body_of(PassportPatch, **changes)
    return ApiCall(method="PATCH", path=path_of("passports", passport_id), body=body, answer=PassportView)


def revoke(passport_id: str) -> ApiCall[None]:
    """Revoke a passport; this is final. A node must have no running requests. Its name becomes free."""
    return ApiCall(method="DELETE", path=path_of("passports", passport_id), answer=NoneType)
