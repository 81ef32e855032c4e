"""Plain values for tests: passports, nodes, heartbeats, with what does not matter filled in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

from lucid_compute.registry.domain.node_state import DeclaredModel, Heartbeat, NodeState, Receipt
from lucid_compute.registry.domain.passports import (
    ComputePassport,
    ModelPassport,
    Passport,
    PassportStatus,
    PassportType,
)

NOW = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)

# The request of the providers' guide, to the letter.
GUIDE_PASSPORT: dict[str, Any] = {
    "name": "my-gpu-node",
    "type": "compute",
    "metadata": {
        "gpu": "NVIDIA A100",
        "vram": "80GB",
        "region": "us-east-1",
        "inferenceUrl": "http://your-gpu:8080/v1",
        "capabilities": ["inference", "fine-tuning"],
        "maxConcurrency": 8,
    },
}


def passport(type_: PassportType, metadata: Mapping[str, Any], **changes: Any) -> Passport:
    """A stored passport."""
    fields: dict[str, Any] = {
        "id": str(uuid4()),
        "type": type_,
        "owner": "acme",
        "name": f"name-{uuid4().hex[:8]}",
        "description": None,
        "version": None,
        "tags": (),
        "status": PassportStatus.ACTIVE,
        "metadata": metadata,
        "created_at": NOW,
        "updated_at": NOW,
        "deregistered_at": None,
        "revision": 1,
    }
    return Passport(**{**fields, **changes})


def model(metadata: Mapping[str, Any] | None = None, **changes: Any) -> ModelPassport:
    """A model's passport; safetensors unless said otherwise."""
    return ModelPassport.read(passport(PassportType.MODEL, {"format": "safetensors", **(metadata or {})}, **changes))


def compute_passport(metadata: Mapping[str, Any] | None = None, **changes: Any) -> Passport:
    """A node's stored passport; 80 GB and vLLM unless said otherwise."""
    whole = {"vram": "80GB", "inferenceUrl": "http://node:8080", "runtimes": ["vllm"], **(metadata or {})}
    return passport(PassportType.COMPUTE, whole, **changes)


def heartbeat(passport_id: str = "", **changes: Any) -> Heartbeat:
    """A heartbeat as it comes over the wire, by its camelCase names."""
    fields = {"passportId": passport_id or str(uuid4()), "status": "healthy", "load": 0.5, "availableModels": []}
    return Heartbeat.model_validate({**fields, "queueDepth": 0, **changes})


def receipt(
    *, age_seconds: float = 0, now: datetime = NOW, revision: int = 1, passport_id: str = "", **changes: Any
) -> Receipt:
    """A heartbeat that Postgres received `age_seconds` before `now`."""
    received_at = now - timedelta(seconds=age_seconds)
    return Receipt(heartbeat(passport_id, **changes), received_at, received_at, revision)


def node(
    metadata: Mapping[str, Any] | None = None,
    *,
    declared: Iterable[DeclaredModel] = (),
    age_seconds: float | None = 0,
    draining_since: datetime | None = None,
    beat: Mapping[str, Any] | None = None,
    **changes: Any,
) -> NodeState:
    """A node with a heartbeat `age_seconds` old, or with none."""
    return NodeState(
        passport=ComputePassport.read(compute_passport(metadata, **changes)),
        declared={declaration.id: declaration for declaration in declared},
        draining_since=draining_since,
        last_heartbeat=None if age_seconds is None else receipt(age_seconds=age_seconds, **(beat or {})),
    )
