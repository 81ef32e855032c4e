"""What to do about each reason why a node does not run a model, or is not sent a request of it."""

from __future__ import annotations

from lucid_compute.matching_engine import ReasonCode

REMEDIES = {
    ReasonCode.RUNTIME_MISMATCH: "Serve it with a runtime it runs on, or name the node's runtimes in its passport.",
    ReasonCode.VRAM_TOO_LOW: "Serve it from a node with more VRAM, or declare it with a smaller quantization.",
    ReasonCode.CONTEXT_TOO_SHORT: "Raise the server's context length, and declare the model with that maxTokens.",
    ReasonCode.HEARTBEAT_STALE: "See whether the agent still runs and reaches the service: lucid doctor.",
    ReasonCode.HEARTBEAT_MISSING: "Start the node's agent: lucid agent run.",
    ReasonCode.REPORTED_UNHEALTHY: "Look at the node's inference server, then at what it says: lucid nodes show NODE.",
    ReasonCode.DRAINING: "End the drain when the work is done: lucid resume NODE.",
    ReasonCode.DEREGISTERED: "Register the node again: lucid agent run.",
    ReasonCode.PASSPORT_INACTIVE: "Make the passport active: lucid passports update NODE --status active.",
    ReasonCode.MODEL_NOT_SERVED: "Load the model on the node, or declare it there.",
    ReasonCode.AT_CAPACITY: "Wait, add a node, or raise maxConcurrency if the node can take more.",
    ReasonCode.BREAKER_OPEN: "Look at the node's inference server; the node is tried again by itself.",
    ReasonCode.REGION_NOT_ALLOWED: "Allow the node's region in the request.",
    ReasonCode.PRICE_TOO_HIGH: "Allow a higher price in the request, or lower the node's.",
    ReasonCode.LATENCY_TOO_HIGH: "Allow a longer wait in the request, or use a faster node.",
}
_BY_CODE = {code.value: remedy for code, remedy in REMEDIES.items()}


def remedy(code: str) -> str | None:
    """Answer what to do about a reason; None for one that a newer service gives and we don't know."""
    return _BY_CODE.get(code)
