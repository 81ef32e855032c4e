"""The calls about webhooks."""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType

from lucid_compute.client.call import Call, Listing, body_of, given, path_of, query_of
from lucid_compute.wire.webhooks import (
    DeliveryList,
    DeliveryView,
    NewWebhook,
    WebhookCreate,
    WebhookList,
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
) -> Call[NewWebhook]:
    """Be told of what happens to one's nodes and models, by POST to a URL; without `events` of all that there are now.

    `passport_ids` are the nodes and models to be told of alone; `all_owners`, for admins, is of everyone's. The secret
    is in this answer and nowhere else. It is not sent again after a lost answer, for a second webhook would be made:
    look for the first with `list`.
    """
    lists = {"events": events, "passport_ids": passport_ids}
    fields = given(owner=owner, **{name: None if each is None else list(each) for name, each in lists.items()})
    body = body_of(WebhookCreate, url=url, all_owners=all_owners, **fields)
    return Call(method="POST", path="/webhooks", body=body, answer=NewWebhook, is_repeatable=False)


def list_(
    *, owner: str | None = None, sort_by: str | None = None, sort_order: str | None = None
) -> Listing[WebhookList, WebhookView]:
    """Iterate over one's own webhooks, without their secrets."""
    query = query_of(owner=owner, sort_by=sort_by, sort_order=sort_order)
    return Listing(path="/webhooks", query=query, answer=WebhookList, items=lambda page: page.webhooks)


def delete(webhook_id: str) -> Call[None]:
    """End a webhook; what waits for it is not sent."""
    return Call(method="DELETE", path=path_of("webhooks", webhook_id), answer=NoneType, is_done_when_missing=True)


def rotate(webhook_id: str, *, now: bool = False) -> Call[NewWebhook]:
    """Give a webhook a new secret; the former one signs as well for 24 hours, or with `now` no more.

    It is not sent again after a lost answer, for the secret in that one would be lost: rotate once more.
    """
    path = path_of("webhooks", webhook_id, "rotate")
    body = body_of(WebhookRotate, now=now)
    return Call(method="POST", path=path, body=body, answer=NewWebhook, is_repeatable=False)


def test(webhook_id: str) -> Call[WebhookTest]:
    """Have a test sent at once, and learn what came of it; one that is delivered enables a disabled webhook again."""
    path = path_of("webhooks", webhook_id, "test")
    return Call(method="POST", path=path, answer=WebhookTest, is_repeatable=False, waits_seconds=10)


def deliveries(
    webhook_id: str, *, sort_by: str | None = None, sort_order: str | None = None
) -> Listing[DeliveryList, DeliveryView]:
    """Iterate over what a webhook was told in the last seven days or waits for, newest first."""
    query = query_of(sort_by=sort_by, sort_order=sort_order)
    path = path_of("webhooks", webhook_id, "deliveries")
    return Listing(path=path, query=query, answer=DeliveryList, items=lambda page: page.deliveries)
