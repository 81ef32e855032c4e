"""The names of events: what can happen to a node, and which of it webhooks are sent."""

from __future__ import annotations

from enum import StrEnum


class EventType(StrEnum):
    """What can happen to a node. The first row is written with a request, the second by the sweep."""

    REGISTERED = "registered"
    UPDATED = "updated"
    MODELS_DECLARED = "models_declared"
    DRAINING = "draining"
    RESUMED = "resumed"
    DEREGISTERED = "deregistered"
    REVOKED = "revoked"
    RESTARTED = "restarted"

    HEALTHY = "healthy"
    STALE = "stale"
    UNHEALTHY = "unhealthy"
    DRAINED = "drained"


class WebhookEvent(StrEnum):
    """What a webhook can be told of."""

    NODE_UNHEALTHY = "node.unhealthy"
    NODE_RECOVERED = "node.recovered"
    NODE_DRAINED = "node.drained"
    NODE_DEREGISTERED = "node.deregistered"
    MODEL_UNAVAILABLE = "model.unavailable"
    MODEL_AVAILABLE = "model.available"
