"""Calls about webhooks, and the function with which a receiver checks and reads a delivery."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from types import NoneType

from pydantic import ValidationError

from lucid_compute.client.call import ApiCall, PagedCall, body_of, given, path_of, query_of
from lucid_compute.webhooks.rules import BadSignature, verify
from lucid_compute.webhooks.shapes import (
    DeliveryList,
    DeliveryView,
    NewWebhook,
    WebhookCreate,
    WebhookList,
    WebhookMessage,
    WebhookRotate,
    WebhookTest,
    WebhookView,
)


def create(
    url: str,
    *,
    events: Sequence[str] | None = None,
    passport_ids: Sequence[str] | None = None,
    owner: str | None = None,
    all_owners: bool = False,
) -> ApiCall[NewWebhook]:
    """Create a webhook: the service sends events of your nodes and models to a URL, by POST. Default: all `events`.

    `passport_ids` limits it to these nodes and models. `all_owners`, for admins, includes those of every owner. The
    secret is in this response only. The call is not sent again after a lost response, because that would create a
    second webhook. Look for the first with `list`.
    """
    lists = {"events": events, "passport_ids": passport_ids}
    fields = given(owner=owner, **{name: None if each is None else list(each) for name, each in lists.items()})
    body = body_of(WebhookCreate, url=url, all_owners=all_owners, **fields)
    return ApiCall(method="POST", path="/webhooks", body=body, answer=NewWebhook, is_repeatable=False)


def list_(
    *, owner: str | None = None, sort_by: str | None = None, sort_order: str | None = None
) -> PagedCall[WebhookList, WebhookView]:
    """Iterate over your own webhooks, without their secrets."""
    query = query_of(owner=owner, sort_by=sort_by, sort_order=sort_order)
    return PagedCall(path="/webhooks", query=query, answer=WebhookList, items=lambda page: page.webhooks)


def delete(webhook_id: str) -> ApiCall[None]:
    """Delete a webhook. Its pending deliveries are not sent."""
    return ApiCall(method="DELETE", path=path_of("webhooks", webhook_id), answer=NoneType, is_done_when_missing=True)


def rotate(webhook_id: str, *, now: bool = False) -> ApiCall[NewWebhook]:
    """Give a webhook a new secret. The previous one signs too for 24 hours; with `now` it ends at once.

    The call is not sent again after a lost response, because the new secret would be lost. Rotate once more.
    """
    path = path_of("webhooks", webhook_id, "rotate")
    body = body_of(WebhookRotate, now=now)
    return ApiCall(method="POST", path=path, body=body, answer=NewWebhook, is_repeatable=False)


def test(webhook_id: str) -> ApiCall[WebhookTest]:
    """Send a test event now, and return the result. A delivered test enables a disabled webhook again."""
    path = path_of("webhooks", webhook_id, "test")
    return ApiCall(method="POST", path=path, answer=WebhookTest, is_repeatable=False, waits_seconds=10)


def deliveries(
    webhook_id: str, *, sort_by: str | None = None, sort_order: str | None = None
) -> PagedCall[DeliveryList, DeliveryView]:
    """Iterate over the deliveries of the last seven days and the pending ones, newest first."""
    query = query_of(sort_by=sort_by, sort_order=sort_order)
    path = path_of("webhooks", webhook_id, "deliveries")
    return PagedCall(path=path, query=query, answer=DeliveryList, items=lambda page: page.deliveries)


def read_webhook(secret: str, body: bytes, signature: str, *, now: datetime | None = None) -> WebhookMessage:
    """Return the event of a delivery, from the body's bytes and the header `Lucid-Signature`.

    The same `id` may come again: remember the ids of one day, and skip known ones. `now` is the present by default.

    Raises:
        BadSignature: it was not signed with this secret, or not within five minutes, or it is no event.
    """
    verify(secret, body, signature, now or datetime.now(UTC))
    try:
        return WebhookMessage.model_validate_json(body, extra="ignore")
    except ValidationError as error:
        raise BadSignature(
            f"The delivery is signed and no event: {error.error_count()} of its fields differ."
        ) from None
