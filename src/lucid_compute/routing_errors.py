"""The part of the error tree that only requests for inference meet.

LucidError
├── NodeFailed                502
├── NodeTimeout               504
├── RoutingLoop               508
└── Unavailable               503 ModelUnavailable
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lucid_compute.errors import LucidError, Unavailable
from lucid_compute.routing_rules import Shortage


class NodeFailed(LucidError):
    """Every attempt failed; `details.attempts` says how."""

    code = "NODE_FAILED"
    status = 502

    def __init__(self, attempts: list[dict[str, Any]], *, why: str = "") -> None:
        """Tell of the attempts; `why` there was none more."""
        count = f"{len(attempts)} attempts" if len(attempts) > 1 else "The only attempt"
        last = attempts[-1]["reason"] if attempts else "unknown"
        super().__init__(
            f"{count} failed ({'the last with ' if len(attempts) > 1 else ''}{last}){why}. Nothing was delivered as a "
            "whole; send the request again.",
            details={"attempts": attempts},
        )


class NodeTimeout(LucidError):
    """The nodes that were tried did not answer in time; `details.attempts` says which."""

    code = "NODE_TIMEOUT"
    status = 504

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        """Tell of the attempts."""
        super().__init__(
            "No node began to answer in time. Nothing was delivered; send the request again, or a shorter one.",
            details={"attempts": attempts},
        )


class RoutingLoop(LucidError):
    """A node's URL leads back to this service."""

    code = "ROUTING_LOOP"
    status = 508

    def __init__(self, attempts: list[dict[str, Any]]) -> None:
        """Tell whose URL it was."""
        super().__init__(
            "A node's inferenceUrl leads back to this service. Its owner has to send the address of the inference "
            "server itself: PATCH /passports/{id}.",
            details={"attempts": attempts},
        )


class ModelUnavailable(Unavailable):
    """The model is known, and no node may be sent the request; `details.rejections` counts the reasons."""

    code = "MODEL_UNAVAILABLE"

    def __init__(
        self,
        model: str,
        rejections: Mapping[str, int],
        shortage: Shortage,
        *,
        lacking: int = 0,
        endpoint: str = "",
    ) -> None:
        """Count why not, a node once for each reason; `lacking` of them said not to offer the model at `endpoint`."""
        self._shortage = shortage
        counted = ", ".join(f"{code} {count}" for code, count in rejections.items()) or "no node names it"
        if lacking:
            counted += f"; not offered at /v1/{endpoint} by {lacking} of them"
        super().__init__(
            f"No node can serve {model!r} right now ({counted}). GET /models/{{idOrName}}/availability and POST "
            "/match say more; send the request again after Retry-After seconds.",
            details={"model": model, "rejections": dict(rejections)},
            retry_after_seconds=5,
        )

    @property
    def cause(self) -> str:
        """What the loss ledger calls it: how near the nearest node came."""
        return self._shortage
