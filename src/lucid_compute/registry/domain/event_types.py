"""The types of events: those of nodes, and those that webhooks receive."""

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
    STOPPED = "stopped"  # a planned stop, told apart from `unhealthy`, which is an alarm


class WebhookEvent(StrEnum):
    """An event that a webhook can receive."""

    NODE_UNHEALTHY = "node.unhealthy"
    NODE_RECOVERED = "node.recovered"
    NODE_DRAINED = "node.drained"
    NODE_DEREGISTERED = "node.deregistered"
    MODEL_UNAVAILABLE = "model.unavailable"
    MODEL_AVAILABLE = "model.available"
