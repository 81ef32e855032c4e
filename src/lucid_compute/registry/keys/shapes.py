"""Requests and responses of API keys and the audit trail."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from lucid_compute.registry.domain.identity import Scope
from lucid_compute.registry.domain.key_limits import KeyLimits, KeyLimitsPatch
from lucid_compute.wire import Flag, Identifier, Instant, Label, Pagination, ResponseShape, WireShape


class KeyCreate(WireShape):
    """A key to create."""

    model_config = {
        "json_schema_extra": {
            "examples": [
                {"name": "node 1", "owner": "acme", "scopes": ["compute"]},
                {
                    "name": "ci",
                    "owner": "acme",
                    "scopes": ["inference:run"],
                    "limits": {
                        "requestsPerMinute": 300,
                        "concurrency": 8,
                        "budgetUsd": "20",
                        "budgetPeriod": "month",
                        "models": ["llama-*"],
                    },
                },
            ]
        }
    }

    name: Label
    owner: Identifier
    scopes: Annotated[list[Scope], Field(min_length=1, max_length=5)]
    passport_id: Identifier | None = Field(default=None, description="Binds a `compute` key to one node.")
    expires_at: Instant | None = None
    limits: KeyLimits | None = None


def _without_default(schema: dict[str, Any]) -> None:
    """Leave out the default: null means absent, and may not be sent."""
    schema.pop("default", None)


class KeyPatch(WireShape):
    """An RFC 7396 merge patch: what is left out stays, null removes, also inside `limits`."""

    model_config = {
        "json_schema_extra": {
            "examples": [{"limits": {"requestsPerMinute": 600, "concurrency": None}, "expiresAt": None}],
        }
    }

    name: Label | SkipJsonSchema[None] = Field(
        default=None, description="Can't be removed.", json_schema_extra=_without_default
    )
    expires_at: Instant | None = Field(default=None, description="A key that has expired is valid again.")
    limits: KeyLimitsPatch | None = None


class KeyRotate(WireShape):
    """How to rotate: with `now` the previous secret ends at once, else it stays valid for 24 hours."""

    model_config = {"json_schema_extra": {"examples": [{"now": True}]}}

    now: Flag = False


class KeyView(ResponseShape):
    """A key without its secret."""

    id: str
    name: str
    owner: str
    scopes: list[Scope]
    prefix: str
    last_four: str
    passport_id: str | None
    expires_at: Instant | None
    limits: KeyLimits | None
    created_at: Instant
    rotated_at: Instant | None
    last_used_at: Instant | None


class NewKey(KeyView):
    """A key with its secret, which is shown only once."""

    key: str


class KeyList(ResponseShape):
    """A page of keys."""

    keys: list[KeyView]
    pagination: Pagination


class AuditView(ResponseShape):
    """One change: its actor, target, time and origin, with hashes of the state before and after."""

    id: str
    at: Instant
    actor_key_id: str | None
    actor_owner: str | None
    action: str
    target_type: str
    target_id: str
    before_hash: str | None
    after_hash: str | None
    ip: str | None
    request_id: str | None
    details: dict[str, Any]


class AuditList(ResponseShape):
    """A page of the audit trail, newest first."""

    events: list[AuditView]
    pagination: Pagination
