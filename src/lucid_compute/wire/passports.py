"""Passports on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from lucid_compute.field_types import AnswerShape, Identifier, Instant, Label, Text, WireShape
from lucid_compute.passports import PassportStatus, PassportType
from lucid_compute.wire.lists import Pagination

Tags = Annotated[list[Label], Field(max_length=50)]
_GUIDE_EXAMPLE: dict[str, Any] = {
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


class PassportCreate(WireShape):
    """A passport to be made. `metadata` is read by its type: ComputeMetadata, ModelMetadata, or anything at all."""

    model_config = {"json_schema_extra": {"examples": [_GUIDE_EXAMPLE]}}

    name: Label
    type: PassportType
    metadata: dict[str, Any] = Field(default_factory=dict)
    description: Text | None = None
    version: Label | None = None
    tags: Tags = Field(default_factory=list)
    owner: Identifier | None = Field(default=None, description="Another owner than the key's; admins only.")


class PassportPatch(WireShape):
    """An RFC 7396 merge patch: what is left out stays, null removes, also inside `metadata`."""

    name: Label | None = None
    description: Text | None = None
    version: Label | None = None
    tags: Tags | None = None
    status: PassportStatus | None = Field(default=None, description="`revoked` is for good.")
    metadata: dict[str, Any] | None = None
    type: PassportType | None = Field(default=None, description="Fixed: accepted only as it is.")
    owner: Identifier | None = Field(default=None, description="Fixed: accepted only as it is.")


class PassportView(AnswerShape):
    """A passport as it is answered; secrets are left out of `metadata`."""

    id: str
    type: PassportType
    name: str
    description: str | None
    version: str | None
    tags: list[str]
    owner: str
    status: PassportStatus
    metadata: dict[str, Any]
    created_at: Instant
    updated_at: Instant


class PassportList(AnswerShape):
    """A page of passports."""

    passports: list[PassportView]
    pagination: Pagination


class ModelView(PassportView):
    """A model passport, and whether it can be run and reached right now."""

    available: bool
    served: bool


class ModelList(AnswerShape):
    """A page of models."""

    models: list[ModelView]
    pagination: Pagination


class ReasonView(AnswerShape):
    """One rule that a node fails, what it wants and what was found."""

    code: str
    message: str
    wanted: Any
    found: Any


class NodeEligibility(AnswerShape):
    """Whether one node could run the model right now, and every reason why not."""

    passport_id: str
    name: str | None = Field(default=None, description="The node's name.")
    eligible: bool
    reasons: list[ReasonView]


class ModelAvailability(AnswerShape):
    """The matching engine's verdict on one model, explained. `nodes` are the caller's own, an admin's are all.

    Those with the fewest reasons come first. `summary` counts all nodes, whichever are listed.
    """

    available: bool
    served: bool
    checked_at: Instant
    nodes: list[NodeEligibility]
    summary: dict[str, int]
    pagination: Pagination | None = Field(default=None, description="Of `nodes`, when a page is asked for.")
