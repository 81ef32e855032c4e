"""What to do about each reason against a node. A file of its own, so that `lucid models` starts without the doctor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from lucid_compute.registry.matching_engine import ReasonCode

# `{node}` is the node's name or id, as a command takes it.
REASON_FIXES: Final[Mapping[str, str]] = {
    ReasonCode.RUNTIME_MISMATCH: "Serve it with a runtime that it runs on, or name the node's runtimes: "
    "lucid passports update {node} --set 'runtimes=[\"…\"]'",
    ReasonCode.VRAM_TOO_LOW: "Serve it from a node with more VRAM, or declare it with the quantization that is loaded: "
    "lucid agent run --quantization MODEL=…",
    ReasonCode.CONTEXT_TOO_SHORT: "Start the server with the model's full context, and declare maxTokens so: "
    "lucid agent run",
    ReasonCode.HEARTBEAT_STALE: "See whether the node's sender still runs and reaches the service: lucid doctor {node}",
    ReasonCode.HEARTBEAT_MISSING: "Start the node's sender: lucid agent run",
    ReasonCode.REPORTED_UNHEALTHY: "Look at the inference server, then at what the node says: lucid nodes show {node}",
    ReasonCode.DRAINING: "End the drain when the work is done: lucid resume {node}; one that the node reports ends "
    "with its agent's next start",
    ReasonCode.DEREGISTERED: "Register the node again, if it is to serve again: lucid agent run",
    ReasonCode.PASSPORT_INACTIVE: "Make the passport active: lucid passports update {node} --status active",
    ReasonCode.NOT_CONNECTED: "Start the node's agent, or see why it does not connect: lucid agent run --outbound",
    ReasonCode.MODEL_NOT_SERVED: "Load the model on the node, or declare it there: lucid agent run does",
    ReasonCode.AT_CAPACITY: "Wait, add a node, or raise maxConcurrency if the node can take more",
    ReasonCode.BREAKER_OPEN: "Look at the node's inference server; the node is tried again automatically",
    ReasonCode.REGION_NOT_ALLOWED: "Allow the node's region in the request",
    ReasonCode.PRICE_TOO_HIGH: "Allow a higher price in the request, or lower the node's",
    ReasonCode.LATENCY_TOO_HIGH: "Allow a longer wait in the request, or use a faster node",
}
_NEWER = "Update lucid-compute here: the service gives a reason that this version does not know"


def fix_of(code: str, node: str) -> str:
    """Return what to do about a reason against `node`. A newer service may give a reason that is unknown here."""
    return REASON_FIXES.get(code, _NEWER).format(node=node)
