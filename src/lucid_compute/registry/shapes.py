"""Requests and responses about passports, models and nodes: health, declarations, drains and events."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, PlainValidator

from lucid_compute.registry.domain.node_state import GpuReading, NodeStatus, ReportedRuntime, ReportedStatus
from lucid_compute.registry.domain.passports import PassportStatus, PassportType
from lucid_compute.wire import (
    Identifier,
    Instant,
    Label,
    ModelId,
    Pagination,
    PositiveCount,
    ResponseShape,
    Text,
    WireShape,
)

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
    """A passport to create. Its type says how `metadata` is read: ComputeMetadata, ModelMetadata, or any JSON."""

    model_config = {"json_schema_extra": {"examples": [_GUIDE_EXAMPLE]}}

    name: ModelId = Field(description="A model's may be as long as the ids that nodes know it by.")
    type: PassportType
    metadata: dict[str, Any] = Field(default_factory=dict)
    description: Text | None = None
    version: Label | None = None
    tags: Tags = Field(default_factory=list)
    owner: Identifier | None = Field(default=None, description="Another owner than the key's; admins only.")


MAX_BATCH = 1000


class PassportBatch(WireShape):
    """Passports to create. Each is checked for itself, so one that is not valid does not stop the others."""

    model_config = {"json_schema_extra": {"examples": [{"passports": [_GUIDE_EXAMPLE]}]}}

    passports: Annotated[
        list[Annotated[Any, PlainValidator(lambda item: item, json_schema_input_type=Any)]],
        Field(min_length=1, max_length=MAX_BATCH),
    ]


class PassportPatch(WireShape):
    """An RFC 7396 merge patch: what is left out stays, null removes, also inside `metadata`."""

    model_config = {
        "json_schema_extra": {
            "examples": [{"tags": ["eu"], "metadata": {"pricePer1kTokens": "0.002", "region": None}}],
        }
    }

    name: ModelId | None = None
    description: Text | None = None
    version: Label | None = None
    tags: Tags | None = None
    status: PassportStatus | None = Field(default=None, description="`revoked` is final.")
    metadata: dict[str, Any] | None = None
    type: PassportType | None = Field(default=None, description="Fixed: accepted only as it is.")
    owner: Identifier | None = Field(default=None, description="Fixed: accepted only as it is.")


class PassportView(ResponseShape):
    """A passport in a response; secrets are left out of `metadata`."""

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


class BatchFault(ResponseShape):
    """Why a passport of a batch was refused: the error that `POST /passports` has for it."""

    code: str
    message: str
    status: int
    details: dict[str, Any]


class BatchResult(ResponseShape):
    """What became of one passport of a batch: 201 with the passport, or the status of its error."""

    status: int
    passport: PassportView | None = None
    error: BatchFault | None = None


class BatchAnswer(ResponseShape):
    """The results of a batch, in the order of its passports, and how many were created."""

    created: int
    refused: int
    results: list[BatchResult]


class PassportList(ResponseShape):
    """A page of passports."""

    passports: list[PassportView]
    pagination: Pagination


class ModelView(PassportView):
    """A model passport: `available` if a node can run it right now, `served` if such a node also names the model."""

    available: bool
    served: bool


class ModelList(ResponseShape):
    """A page of models."""

    models: list[ModelView]
    pagination: Pagination


class ReasonView(ResponseShape):
    """One rule that a node fails, the value that it requires and the value found."""

    code: str
    message: str
    wanted: Any
    found: Any


class NodeEligibility(ResponseShape):
    """Whether one node could run the model right now, and every reason why not."""

    passport_id: str
    name: str | None = Field(default=None, description="The node's name.")
    eligible: bool
    reasons: list[ReasonView]


class VariantView(ResponseShape):
    """One of the models that a routed name stands for; `weight` is null for a fallback."""

    model: str
    model_passport_id: str
    weight: int | None
    available: bool
    served: bool


class ModelAvailability(ResponseShape):
    """Whether a model can be run right now, explained. `nodes` are the caller's own; an admin sees all.

    Nodes with the fewest reasons come first. `summary` counts the reasons of all nodes, also of those not listed.
    """

    available: bool
    served: bool
    checked_at: Instant
    nodes: list[NodeEligibility]
    summary: dict[str, int]
    pagination: Pagination | None = Field(default=None, description="Of `nodes`, when a page is asked for.")
    route: list[VariantView] | None = Field(
        default=None,
        description="Of a model with a route: the models that requests go to. `nodes` and `summary` are its own.",
    )


class HeartbeatAnswer(ResponseShape):
    """The response to a committed heartbeat: until when it counts, when to send the next one, whether to drain."""

    passport_id: str
    status: NodeStatus
    received_at: Instant
    fresh_until: Instant
    unhealthy_at: Instant
    next_heartbeat_in_seconds: float
    drain: bool


class ReportedState(ResponseShape):
    """What the node reports in its newest heartbeat; null is unknown."""

    status: ReportedStatus
    load: float | None
    queue_depth: int | None
    in_flight: int | None
    runtime: ReportedRuntime | None
    gpus: list[GpuReading] | None
    jobs_completed: int | None
    jobs_failed: int | None
    avg_latency_ms: float | None
    tokens_generated: int | None
    boot_id: str | None
    sequence: int | None
    sent_at: Instant | None
    clock_offset_seconds: float | None = Field(
        description="How far the sender's clock is ahead of the database's, including the transmission."
    )
    detail: str | None


class NodeHealth(ResponseShape):
    """A node's health. Counts and latencies are of requests that this service routed; `reported` has the node's own."""

    passport_id: str
    status: NodeStatus
    fresh: bool
    stopped: bool = Field(default=False, description="It said that it stops, and is silent since: no alarm.")
    uptime_seconds: float
    jobs_completed: int | None = Field(description="In the node's life; null only while the database is away.")
    avg_latency_ms: float | None = Field(description="Of the last hour's completed jobs; null without one.")
    error_rate: float | None = Field(description="0 to 1, of the last hour's jobs; null without one.")
    last_heartbeat_at: Instant | None
    heartbeat_age_seconds: float | None
    load: float | None
    queue_depth: int | None
    in_flight: int
    drained: bool
    available_models: list[str]
    reasons: list[ReasonView]
    reported: ReportedState | None


class NodeView(PassportView):
    """A compute passport with its live state."""

    health: NodeHealth


class NodeList(ResponseShape):
    """A page of nodes."""

    nodes: list[NodeView]
    pagination: Pagination


class ModelDeclaration(WireShape):
    """A model that the node can serve, under the id the node knows it by."""

    id: ModelId
    max_tokens: PositiveCount | None = None
    quantization: Label | None = None


class DeclareModels(WireShape):
    """The complete declaration of a node; it replaces the previous one."""

    model_config = {
        "json_schema_extra": {
            "examples": [
                {
                    "models": [
                        {"id": "llama-3-70b", "maxTokens": 4096, "quantization": "fp16"},
                        {"id": "mistral-7b", "maxTokens": 8192, "quantization": "awq-4bit"},
                        {"id": "deepseek-coder-33b", "maxTokens": 16384, "quantization": "gptq"},
                    ]
                }
            ]
        }
    }

    models: Annotated[list[ModelDeclaration], Field(max_length=1000)]


class ResolvedDeclaration(ResponseShape):
    """A declared model with the model passport it resolves to right now, null when there is none yet."""

    id: str
    max_tokens: int | None
    quantization: str | None
    model_passport_id: str | None


class Declaration(ResponseShape):
    """The models that a node declares."""

    passport_id: str
    models: list[ResolvedDeclaration]


class DrainAnswer(ResponseShape):
    """The progress of a drain: `drained` is true when the node can be deregistered safely."""

    passport_id: str
    status: NodeStatus
    in_flight: int
    drained: bool


class DeregisterAnswer(ResponseShape):
    """The node was deregistered, which is final."""

    passport_id: str
    status: NodeStatus


class EventView(ResponseShape):
    """Something that happened to a node."""

    id: str
    passport_id: str
    type: str
    at: Instant
    reason: str | None
    details: dict[str, Any]


class FleetEventView(EventView):
    """Something that happened to one of several nodes."""

    name: str = Field(description="The node's name.")
    owner: str


class FleetEventList(ResponseShape):
    """A page of events of several nodes, newest first."""

    events: list[FleetEventView]
    pagination: Pagination


class EventList(ResponseShape):
    """A page of events, newest first."""

    events: list[EventView]
    pagination: Pagination
