"""What one replica has for webhooks, put together."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lucid_compute.egress_policy import EgressPolicy
from lucid_compute.storage.clock import DatabaseClock
from lucid_compute.storage.database import Database
from lucid_compute.storage.webhook_outbox import WebhookOutbox
from lucid_compute.storage.webhook_store import WebhookStore
from lucid_compute.webhooks.courier import Deliverer
from lucid_compute.webhooks.sender import WebhookSender, WebhookTester


class Webhooks(NamedTuple):
    """The store that routes write to, the sender that empties the outbox, and the tester."""

    store: WebhookStore
    sender: WebhookSender
    tester: WebhookTester


def build_webhooks(
    database: Database,
    policy: EgressPolicy,
    clock: DatabaseClock,
    own_endpoints: set[tuple[str, int]],
    spend: Callable[[str], None],
) -> Webhooks:
    """Put them together; `spend` takes a host's allowance of tests, and nothing goes to `own_endpoints`."""
    store, deliverer = WebhookStore(database, policy), Deliverer(policy, clock, own_endpoints)
    sender = WebhookSender(WebhookOutbox(database), deliverer, clock)
    return Webhooks(store, sender, WebhookTester(store, deliverer, clock, spend))
