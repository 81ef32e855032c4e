"""Readers of Postgres rows, as columns or as JSON: they return passports, lifecycles, heartbeats, keys and leases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from sqlalchemy import RowMapping

from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.domain.key_limits import KeyLimits
from lucid_compute.registry.domain.node_state import DeclaredModel, Heartbeat, Receipt
from lucid_compute.registry.domain.passports import Passport, PassportStatus, PassportType
from lucid_compute.registry.fleet.fleet import Lifecycle
from lucid_compute.registry.fleet.key_ring import KeyRecord
from lucid_compute.registry.fleet.replicas import ReplicaRecord, Snapshot

Row = Mapping[str, Any] | RowMapping

# Required fields of a heartbeat that may be null; reports are stored without their nulls.
_UNKNOWN = {"load": None, "queueDepth": None}


def read_passport(row: Row) -> Passport:
    """Read a row of `passports`."""
    return Passport(
        id=str(row["id"]),
        type=PassportType(row["type"]),
        owner=row["owner"],
        name=row["name"],
        description=row["description"],
        version=row["version"],
        tags=tuple(row["tags"]),
        status=PassportStatus(row["status"]),
        metadata=row["metadata"],
        created_at=_instant(row["created_at"]),
        updated_at=_instant(row["updated_at"]),
        deregistered_at=_find_instant(row["deregistered_at"]),
        revision=row["revision"],
    )


def read_lifecycle(row: Row) -> Lifecycle:
    """Read a row of `nodes`."""
    declared = (
        DeclaredModel(entry["id"], entry["maxTokens"], entry["quantization"]) for entry in row["declared_models"]
    )
    return Lifecycle(
        passport_id=str(row["passport_id"]),
        declared={model.id: model for model in declared},
        draining_since=_find_instant(row["draining_since"]),
        drain_xid=None if row["drain_xid"] is None else int(row["drain_xid"]),
        recorded_state=row["recorded_state"],
        revision=row["revision"],
    )


def read_receipt(row: Row) -> Receipt | None:
    """Read a row of `heartbeats`; None if the node has not sent one yet."""
    if row["received_at"] is None:
        return None
    report = json.loads(row["report"]) if isinstance(row["report"], str) else row["report"]
    heartbeat = Heartbeat.model_validate({**_UNKNOWN, **report})
    return Receipt(heartbeat, _instant(row["received_at"]), _find_instant(row["up_since"]), row["revision"])


def read_key(row: Row) -> KeyRecord:
    """Read a row of `api_keys`."""
    return KeyRecord(
        id=row["id"],
        owner=row["owner"],
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        passport_id=None if row["passport_id"] is None else str(row["passport_id"]),
        digest=_bytes(row["digest"]),
        former_digest=None if row["former_digest"] is None else _bytes(row["former_digest"]),
        former_valid_until=_find_instant(row["former_valid_until"]),
        expires_at=_find_instant(row["expires_at"]),
        revoked_at=_find_instant(row["revoked_at"]),
        is_bootstrap=row["is_bootstrap"],
        limits=KeyLimits.model_validate(row["limits"]) if row["limits"] else None,
        revision=row["revision"],
    )


def read_replica(row: Row) -> ReplicaRecord:
    """Read a row of `replicas`."""
    return ReplicaRecord(
        id=str(row["id"]),
        started_at=_instant(row["started_at"]),
        seen_at=_instant(row["seen_at"]),
        applied_at=_instant(row["applied_at"]),
        applied=Snapshot.parse(row["applied_snapshot"]),
        in_flight=row["in_flight"],
    )


def _instant(value: Any) -> datetime:
    return value if isinstance(value, datetime) else datetime.fromisoformat(value)


def _find_instant(value: Any) -> datetime | None:
    return None if value is None else _instant(value)


def _bytes(value: Any) -> bytes:
    """Read bytea, which Postgres writes in JSON as text: backslash, x, and hexadecimal digits."""
    return bytes.fromhex(value[2:]) if isinstance(value, str) else bytes(value)
