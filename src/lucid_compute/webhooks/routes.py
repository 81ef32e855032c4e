"""The webhook routes: owners create, list, rotate, test and delete their webhooks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from lucid_compute.errors import Forbidden, WebhookNotFound
from lucid_compute.registry.domain.identity import Principal
from lucid_compute.registry.keys.dependencies import ADMINS, ActorDependency, ComputeWriter
from lucid_compute.web.errors import declare
from lucid_compute.web.lists import OrderDependency, PageDependency
from lucid_compute.web.provide import Provided
from lucid_compute.webhooks.sender import WebhookTester
from lucid_compute.webhooks.shapes import (
    DeliveryList,
    NewWebhook,
    WebhookCreate,
    WebhookList,
    WebhookRotate,
    WebhookTest,
)
from lucid_compute.webhooks.store import WebhookStore
from lucid_compute.wire import Text

router = APIRouter(prefix="/webhooks", tags=["webhooks"])


@router.post("", status_code=201, response_model=NewWebhook, responses=declare(body=True))
async def create_webhook(
    body: WebhookCreate, webhook_store: Provided[WebhookStore], principal: ComputeWriter, actor: ActorDependency
) -> NewWebhook:
    """Create a webhook: events of your nodes and models are sent by POST to a URL. Only this response has the secret.

    Each delivery carries `Lucid-Signature: t=<seconds>,v1=<HMAC-SHA256 of "<seconds>.<body>">`. It arrives at least
    once, and those of one node arrive in order. A failed one is tried again for a day, with growing pauses.
    """
    owner = _owner(principal, body.owner) or principal.owner
    if body.all_owners:
        principal.require(ADMINS)
    return await webhook_store.create(actor, body, owner)


@router.get("", response_model=WebhookList, responses=declare())
async def list_webhooks(
    webhook_store: Provided[WebhookStore],
    principal: ComputeWriter,
    page: PageDependency,
    order: OrderDependency,
    owner: Annotated[Text | None, Query(description="Another owner than the key's; admins only.")] = None,
) -> WebhookList:
    """List your webhooks without their secrets; an admin sees all. `name` sorts by the URL."""
    webhooks, total = await webhook_store.list_page(
        owner=_owner(principal, owner) or principal.visible_owner,
        visible_owner=principal.visible_owner,
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
    )
    return WebhookList(webhooks=webhooks, pagination=page.pagination(total))


@router.delete("/{webhook_id}", status_code=204, responses=declare(WebhookNotFound))
async def delete_webhook(
    webhook_id: str, webhook_store: Provided[WebhookStore], principal: ComputeWriter, actor: ActorDependency
) -> None:
    """Delete a webhook. Its waiting deliveries are not sent."""
    _refuse_bound(principal)
    await webhook_store.delete(actor, webhook_id, visible_owner=principal.visible_owner)


@router.post("/{webhook_id}/rotate", response_model=NewWebhook, responses=declare(WebhookNotFound, body=True))
async def rotate_webhook(
    webhook_id: str,
    webhook_store: Provided[WebhookStore],
    principal: ComputeWriter,
    actor: ActorDependency,
    body: WebhookRotate | None = None,
) -> NewWebhook:
    """Give a webhook a new secret. Only this response has it. For 24 hours the previous secret signs as well.

    In that time `Lucid-Signature` has two `v1`, the new one first. With `{"now": true}` the previous one ends at once.
    """
    _refuse_bound(principal)
    return await webhook_store.rotate(
        actor, webhook_id, visible_owner=principal.visible_owner, now=body.now if body else False
    )


@router.post("/{webhook_id}/test", response_model=WebhookTest, responses=declare(WebhookNotFound))
async def test_webhook(
    webhook_id: str, tester: Provided[WebhookTester], principal: ComputeWriter, actor: ActorDependency
) -> WebhookTest:
    """Send a `webhook.test` at once and return the outcome. A delivered test enables a disabled webhook.

    A host can be tested once in ten seconds. The test takes 10 s at most.
    """
    _refuse_bound(principal)
    test, outcome = await tester.test(actor, webhook_id, visible_owner=principal.visible_owner)
    message = "The receiver took it." if outcome.is_delivered else f"It was not delivered: {outcome.result}."
    return WebhookTest(
        event_id=test.event_id,
        delivered=outcome.is_delivered,
        result=outcome.result,
        milliseconds=outcome.milliseconds,
        message=message,
    )


@router.get("/{webhook_id}/deliveries", response_model=DeliveryList, responses=declare(WebhookNotFound))
async def list_deliveries(
    webhook_id: str,
    webhook_store: Provided[WebhookStore],
    principal: ComputeWriter,
    page: PageDependency,
    order: OrderDependency,
) -> DeliveryList:
    """List the deliveries of a webhook that wait or ended in the last seven days, with the last attempts of each.

    `name` sorts by the type, `updatedAt` by the end or the next attempt.
    """
    _refuse_bound(principal)
    deliveries, total = await webhook_store.list_deliveries(
        webhook_id,
        visible_owner=principal.visible_owner,
        sort_by=order.by,
        sort_order=order.direction,
        offset=page.offset,
        limit=page.per_page,
    )
    return DeliveryList(deliveries=deliveries, pagination=page.pagination(total))


def _owner(principal: Principal, owner: str | None) -> str | None:
    _refuse_bound(principal)
    if owner is not None and not principal.is_admin and owner != principal.owner:
        raise Forbidden("Only an admin may name another owner. Leave owner out.")
    return owner


def _refuse_bound(principal: Principal) -> None:
    if principal.passport_id is not None:
        message = f"This key is bound to node {principal.passport_id}; webhooks are their owner's. Use another key."
        raise Forbidden(message, details={"passportId": principal.passport_id})
