"""Webhooks in Postgres: create, list, rotate, test and delete them. The outbox holds what is sent to them."""

from __future__ import annotations

import json
import secrets
from typing import Any
from uuid import uuid4

from sqlalchemy import (
    ColumnElement,
    RowMapping,
    collate,
    delete,
    func,
    insert,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.errors import InvalidRequest, WebhookNotFound
from lucid_compute.postgres.database import Database
from lucid_compute.postgres.queries import at_least, count_some, ids_are_uuids, in_order
from lucid_compute.postgres.tables import passports
from lucid_compute.registry.domain.event_types import WebhookEvent
from lucid_compute.registry.domain.identity import Actor
from lucid_compute.registry.keys.audit import Change, record_change
from lucid_compute.webhooks.claim_sql import SECRETS
from lucid_compute.webhooks.outbox import ROWS_A_STEP, Delivery
from lucid_compute.webhooks.rules import (
    FORMER_SECRET_SIGNS_FOR,
    LIMITS,
    SECRET_PREFIX,
    TEST_EVENT,
    check_webhook_url,
    masked,
)
from lucid_compute.webhooks.shapes import (
    DeliveryState,
    DeliveryView,
    NewWebhook,
    WebhookCreate,
    WebhookStatus,
    WebhookView,
)
from lucid_compute.webhooks.tables import webhook_deliveries, webhooks
from lucid_compute.wire import SortBy, SortOrder

_TYPES = {"node": "compute", "model": "model"}  # of passports, by the first word of an event
_SECRETS_OF = text(f"SELECT {SECRETS} FROM webhooks w WHERE w.id = CAST(:id AS uuid)")
# The secrets before the previous one that still sign, at most two: a signature has at most four parts.
_OLDER_SECRETS: ColumnElement[Any] = literal_column("""
    CASE WHEN former_secret_until > now()
        THEN jsonb_build_array(jsonb_build_object('secret', former_secret, 'until', former_secret_until))
        ELSE '[]' END || CASE WHEN (older_secrets->0->>'until')::timestamptz > now()
        THEN jsonb_build_array(older_secrets->0) ELSE '[]' END
""")
_DELETE_SOME = text(f"""
    DELETE FROM webhook_deliveries WHERE position = ANY(ARRAY(
        SELECT position FROM webhook_deliveries WHERE webhook_id = :webhook_id LIMIT {ROWS_A_STEP}
    ))
""")
_IS_DELETED = "It is being deleted. Delete it again if it is still here after a minute."
_SORT_COLUMNS = {
    SortBy.CREATED_AT: webhooks.c.created_at,
    SortBy.UPDATED_AT: webhooks.c.created_at,
    SortBy.NAME: collate(webhooks.c.url, "C"),
}
_DELIVERY_COLUMNS = {
    SortBy.CREATED_AT: webhook_deliveries.c.position,
    SortBy.UPDATED_AT: func.coalesce(webhook_deliveries.c.ended_at, webhook_deliveries.c.next_attempt_at),
    SortBy.NAME: webhook_deliveries.c.type,
}


class WebhookStore:
    """The only writer of webhooks. Methods see the webhooks of `visible_owner` alone; None sees all."""

    def __init__(self, database: Database, policy: EgressPolicy, max_per_owner: int = LIMITS.per_owner) -> None:
        self._database = database
        self._policy = policy
        self._max_per_owner = max_per_owner

    async def create(self, actor: Actor, new: WebhookCreate, owner: str) -> NewWebhook:
        """Create a webhook of `owner` and return it with its secret, which no other method returns.

        Raises:
            InvalidRequest: the URL is not allowed, a passport is not the owner's, or the owner has too many webhooks.
        """
        try:
            check_webhook_url(self._policy, new.url)
        except ValueError as error:
            raise InvalidRequest.at("url", str(error)) from None
        secret = _make_secret()
        async with self._database.transaction() as connection:
            await _check_room(connection, owner, self._max_per_owner)
            passport_ids = await _check_passports(connection, new, owner)
            statement = insert(webhooks).values(
                id=str(uuid4()),
                owner=owner,
                url=new.url,
                secret=secret,
                events=sorted({event.value for event in new.events or WebhookEvent}),
                all_owners=new.all_owners,
                passport_ids=passport_ids,
            )
            row = (await connection.execute(statement.returning(webhooks))).mappings().one()
            details = {"owner": owner, "events": row["events"], "allOwners": row["all_owners"]}
            await record_change(connection, actor, Change("webhook.create", "webhook", row["id"], details=details))
            notice = await _notice(connection, row)
        return NewWebhook(**_view(row).model_dump(), secret=secret, notice=notice)

    async def rotate(self, actor: Actor, webhook_id: str, *, visible_owner: str | None, now: bool) -> NewWebhook:
        """Give a webhook a new secret. The previous ones sign as well for a day each, or with `now` no longer.

        Raises:
            WebhookNotFound: there is no such webhook.
        """
        secret = _make_secret()
        former: dict[str, Any] = {"former_secret": None, "former_secret_until": None, "older_secrets": []}
        if not now:
            former = {
                "former_secret": webhooks.c.secret,
                "former_secret_until": func.now() + FORMER_SECRET_SIGNS_FOR,
                "older_secrets": _OLDER_SECRETS,
            }
        async with self._database.transaction() as connection:
            await _get(connection, webhook_id, visible_owner)
            statement = update(webhooks).where(webhooks.c.id == webhook_id).values(secret=secret, **former)
            row = (await connection.execute(statement.returning(webhooks))).mappings().one_or_none()
            if row is None:
                raise WebhookNotFound(webhook_id)
            await record_change(
                connection, actor, Change("webhook.rotate", "webhook", webhook_id, details={"now": now})
            )
        return NewWebhook(**_view(row).model_dump(), secret=secret)

    async def list_page(
        self,
        *,
        owner: str | None,
        visible_owner: str | None,
        sort_by: SortBy,
        sort_order: SortOrder,
        offset: int,
        limit: int,
    ) -> tuple[list[WebhookView], int]:
        """Return a page of the owner's webhooks and the number of all of them; `owner` None lists everyone's."""
        condition: ColumnElement[bool] = true() if owner is None else webhooks.c.owner == owner
        if visible_owner is not None:
            condition &= ~webhooks.c.all_owners
        order = in_order(_SORT_COLUMNS, webhooks.c.id, sort_by, sort_order)
        page = select(webhooks).where(condition).order_by(*order).offset(offset).limit(limit)
        async with self._database.transaction() as connection:
            total = await connection.scalar(select(func.count()).select_from(webhooks).where(condition))
            return [_view(row) for row in (await connection.execute(page)).mappings()], total or 0

    async def list_deliveries(
        self,
        webhook_id: str,
        *,
        visible_owner: str | None,
        sort_by: SortBy,
        sort_order: SortOrder,
        offset: int,
        limit: int,
    ) -> tuple[list[DeliveryView], int]:
        """Return a page of a webhook's deliveries, sent or waiting, and the number of all of them, up to 100,000.

        Raises:
            WebhookNotFound: there is no such webhook.
        """
        condition = webhook_deliveries.c.webhook_id == webhook_id
        position = webhook_deliveries.c.position
        tie = position.desc() if sort_order is SortOrder.DESCENDING else position
        order = in_order(_DELIVERY_COLUMNS, tie, sort_by, sort_order)
        async with self._database.transaction() as connection:
            await _get(connection, webhook_id, visible_owner)
            total = await count_some(connection, webhook_deliveries, condition)
            page = select(webhook_deliveries).where(condition).order_by(*order).offset(offset).limit(limit)
            views = [_view_delivery(row) for row in (await connection.execute(page)).mappings()]
            return views, at_least(total, offset, len(views), limit)

    async def delete(self, actor: Actor, webhook_id: str, *, visible_owner: str | None) -> None:
        """Delete a webhook and its deliveries, however many it has: first these, in steps, while it is disabled.

        Raises:
            WebhookNotFound: there is no such webhook.
        """
        is_it = webhooks.c.id == webhook_id
        ended = {"disabled_at": func.coalesce(webhooks.c.disabled_at, func.now()), "disabled_reason": _IS_DELETED}
        async with self._database.transaction() as connection:
            await _get(connection, webhook_id, visible_owner)
            await connection.execute(update(webhooks).where(is_it).values(ended))
        while await self._delete_some(webhook_id) == ROWS_A_STEP:
            pass
        async with self._database.transaction() as connection:
            await _get(connection, webhook_id, visible_owner)
            await connection.execute(delete(webhooks).where(is_it))
            await record_change(connection, actor, Change("webhook.delete", "webhook", webhook_id))

    async def _delete_some(self, webhook_id: str) -> int:
        async with self._database.transaction() as connection:
            deleted = await connection.execute(_DELETE_SOME, {"webhook_id": webhook_id})
            return deleted.rowcount

    async def prepare_test(self, webhook_id: str, *, visible_owner: str | None) -> Delivery:
        """Return a test delivery for a webhook. Nothing is written before `record_test`.

        Raises:
            WebhookNotFound: there is no such webhook.
        """
        async with self._database.transaction() as connection:
            row = await _get(connection, webhook_id, visible_owner)
            return Delivery(
                position=0,
                attempts=1,
                event_id=str(uuid4()),
                subject_id=row["id"],
                type=TEST_EVENT,
                occurred_at=await connection.scalar(text("SELECT now()")),
                payload={"reason": "asked for with POST /webhooks/{id}/test", "details": {}},
                last_attempts=[],
                webhook_id=row["id"],
                url=row["url"],
                secrets=await connection.scalar(_SECRETS_OF, {"id": webhook_id}),
                is_failing=row["failing_since"] is not None,
            )

    async def record_test(self, actor: Actor, test: Delivery, last_attempts: str, *, is_delivered: bool) -> None:
        """Record the outcome of a test. A delivered test enables its webhook again."""
        state = DeliveryState.DELIVERED if is_delivered else DeliveryState.GIVEN_UP
        async with self._database.transaction() as connection:
            where = webhooks.c.id == test.webhook_id
            row = (await connection.execute(select(webhooks).where(where).with_for_update())).mappings().one_or_none()
            if row is None:
                return  # deleted meanwhile
            await connection.execute(
                insert(webhook_deliveries).values(
                    webhook_id=test.webhook_id,
                    event_id=test.event_id,
                    subject_id=test.subject_id,
                    type=test.type,
                    occurred_at=test.occurred_at,
                    payload=test.payload,
                    state=state.value,
                    attempts=1,
                    last_attempts=json.loads(last_attempts),
                    first_attempt_at=func.now(),
                    ended_at=func.now(),
                )
            )
            if is_delivered and (row["disabled_at"] or row["failing_since"]):
                enabled = {"failing_since": None, "disabled_at": None, "disabled_reason": None}
                await connection.execute(update(webhooks).where(where).values(enabled))
                await record_change(connection, actor, Change("webhook.enable", "webhook", test.webhook_id))


async def _get(connection: AsyncConnection, webhook_id: str, visible_owner: str | None) -> RowMapping:
    row = None
    if ids_are_uuids(webhook_id):
        rows = await connection.execute(select(webhooks).where(webhooks.c.id == webhook_id))
        row = rows.mappings().one_or_none()
    if row is None or (visible_owner is not None and (row["owner"] != visible_owner or row["all_owners"])):
        raise WebhookNotFound(webhook_id)
    return row


async def _check_room(connection: AsyncConnection, owner: str, most: int) -> None:
    count = await connection.scalar(select(func.count()).select_from(webhooks).where(webhooks.c.owner == owner))
    if (count or 0) >= most:
        raise InvalidRequest.at("owner", f"{owner!r} has {most} webhooks already. Delete one first.")


async def _notice(connection: AsyncConnection, row: RowMapping) -> str | None:
    """Return a warning if no node or no model is covered whose events the webhook gets; None otherwise."""
    if row["all_owners"] or row["passport_ids"] is not None:
        return None
    kinds = sorted({_TYPES[event.partition(".")[0]] for event in row["events"]})
    is_its = (passports.c.owner == row["owner"]) & passports.c.type.in_(kinds) & (passports.c.status == "active")
    if await connection.scalar(select(select(passports.c.id).where(is_its).exists())):
        return None
    what = " and no ".join(word for word, kind in _TYPES.items() if kind in kinds)
    return (
        f"It covers no {what} now, because {row['owner']!r} has none; it covers those that {row['owner']!r} registers "
        "later. An admin covers everybody's with allOwners (--all-owners)."
    )


async def _check_passports(connection: AsyncConnection, new: WebhookCreate, owner: str) -> list[str] | None:
    """Return the ids of the nodes and models that the webhook is limited to; None when it is not limited."""
    if new.passport_ids is None:
        return None
    is_allowed = passports.c.id.in_(filter(ids_are_uuids, new.passport_ids)) & passports.c.type.in_(
        ("compute", "model")
    )
    rows = await connection.execute(select(passports.c.id, passports.c.owner).where(is_allowed))
    found = {str(passport_id) for passport_id, its_owner in rows if new.all_owners or its_owner == owner}
    for position, passport_id in enumerate(new.passport_ids):
        if passport_id not in found:
            whose = "There is" if new.all_owners else f"{owner!r} owns"
            message = f"{whose} no node and no model {passport_id!r}. Name another, or leave passportIds out."
            raise InvalidRequest.at(f"passportIds.{position}", message)
    return sorted(found)


def _make_secret() -> str:
    return f"{SECRET_PREFIX}{secrets.token_urlsafe(32)}"


def _view(row: RowMapping) -> WebhookView:
    status = WebhookStatus.ACTIVE if row["disabled_at"] is None else WebhookStatus.DISABLED
    fields: dict[str, Any] = {name: row[name] for name in WebhookView.model_fields if name not in {"status", "url"}}
    return WebhookView(status=status, url=masked(row["url"]), **fields)


def _view_delivery(row: RowMapping) -> DeliveryView:
    waits = row["state"] == DeliveryState.WAITING
    return DeliveryView(
        id=str(row["event_id"]),
        type=row["type"],
        passport_id=None if row["type"] == TEST_EVENT else row["subject_id"],
        occurred_at=row["occurred_at"],
        state=row["state"],
        attempts=row["attempts"],
        next_attempt_at=row["next_attempt_at"] if waits else None,
        last_attempts=row["last_attempts"],
    )
