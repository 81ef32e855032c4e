"""Webhooks for tests: a replica that waits for nothing long, and nodes that become silent and come back on request."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from lucid_compute.egress.policy import EgressPolicy
from lucid_compute.registry.domain.node_state import Receipt, ReportedStatus
from lucid_compute.registry.keys.rate_limits import ProbeRate
from lucid_compute.server.replica import Replica
from lucid_compute.webhooks.rules import WebhookLimits, verify
from lucid_compute.webhooks.sender import build_webhooks
from tests.api import Adjust, Api, without_sweeps
from tests.fault_node import FaultNode, Request

QUICK = WebhookLimits(poll_seconds=0.02, first_retry_seconds=0.05)


def with_limits(limits: WebhookLimits = QUICK) -> Adjust:
    """Return what gives a replica's webhooks these limits, and leaves sweeps to the test."""

    def adjust(replica: Replica) -> Replica:
        without_sweeps(replica)
        settings = replica.settings
        policy = EgressPolicy(allow_loopback=settings.is_bound_to_loopback, allowed=settings.egress_allow)
        spend, own_endpoints = ProbeRate(replica.fleet.replicas).spend, replica.gateway.own_endpoints
        parts = build_webhooks(replica.database, policy, replica.clock, own_endpoints, spend, limits=limits)
        return replace(replica, webhooks=parts)

    return adjust


async def make_webhook(api: Api, url: str, **fields: Any) -> dict[str, Any]:
    """Create a webhook; return it with its secret."""
    made = await api.http.post("/webhooks", json={"url": url, **fields})
    assert made.status_code == 201, made.text
    webhook: dict[str, Any] = made.json()
    return webhook


async def find_webhook(api: Api, webhook_id: str) -> dict[str, Any]:
    """Return the webhook as its list shows it."""
    listed = (await api.http.get("/webhooks", params={"perPage": 100})).json()["webhooks"]
    found: dict[str, Any] = next(webhook for webhook in listed if webhook["id"] == webhook_id)
    return found


async def deliveries_of(api: Api, webhook_id: str) -> list[dict[str, Any]]:
    """Return the webhook's deliveries, sent or waiting, oldest first."""
    answer = await api.http.get(f"/webhooks/{webhook_id}/deliveries", params={"perPage": 100, "sortOrder": "asc"})
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["deliveries"]
    return found


async def say(api: Api, node_id: str, *, seconds_ago: float, status: ReportedStatus = ReportedStatus.HEALTHY) -> None:
    """Make the node's newest heartbeat so old and of that status, in this replica's memory, and sweep once."""
    fleet = api.replica.fleet
    receipt = fleet.get_node(node_id, owner=None).state.last_heartbeat
    assert receipt is not None
    received_at = api.replica.clock.now() - timedelta(seconds=seconds_ago)
    heartbeat = receipt.heartbeat.model_copy(update={"status": status})
    fleet.apply_receipt(node_id, Receipt(heartbeat, received_at, received_at, receipt.revision + 1))
    await sweep(api)


async def sweep(api: Api) -> None:
    """Sweep once, and wait until the feed has applied what was recorded."""
    await api.replica.sweep.record(await api.replica.sweep.find_transitions())
    await api.replica.feed.catch_up()


async def make_node(api: Api, name: str = "my-gpu-node") -> str:
    """Register a node that is healthy, with its event; return its id."""
    node_id = await api.register(name)
    await api.beat(node_id)
    await sweep(api)
    return node_id


def read(request: Request, secret: str) -> dict[str, Any]:
    """Check the signature of a received request and return its event."""
    verify(secret, request.body, request.headers["lucid-signature"], datetime.now(UTC))
    event: dict[str, Any] = json.loads(request.body)
    assert request.headers["lucid-event"] == event["type"]
    assert request.headers["lucid-event-id"] == event["id"]
    return event


def types_at(receiver: FaultNode) -> list[str]:
    """Return the types of the received events, in their order."""
    return [request.headers["lucid-event"] for request in receiver.requests]
