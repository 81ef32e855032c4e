"""The shapes of inference requests, `POST /match`, `GET /v1/models` and `POST /compute/probe` on the wire."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lucid_compute.registry.shapes import ModelView, ReasonView, VariantView
from lucid_compute.wire import (
    Flag,
    Identifier,
    Instant,
    Label,
    Money,
    NonNegative,
    Pagination,
    ResponseShape,
    Text,
    WireShape,
)

_MOST_FIELDS = 100
MAX_MODEL_ID = 512
ModelId = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_ID)]


class RequestPolicy(WireShape):
    """`lucid` in a request: its requirements for the node. Null or absent requires nothing."""

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: object) -> object:
        """Refuse far more fields than there are, before a fault is made for each."""
        if isinstance(value, dict) and len(value) > _MOST_FIELDS:
            message = f"Send at most {_MOST_FIELDS} fields; there are {len(value)}."
            raise ValueError(message)
        return value

    allow_regions: Annotated[list[Label], Field(max_length=100)] | None = Field(
        default=None, description="Only nodes of these regions; one that names no region is left out."
    )
    max_price_per_1k_tokens: Annotated[Money | None, Field(alias="maxPricePer1kTokens")] = None
    max_latency_ms: NonNegative | None = Field(
        default=None, description="Only nodes that begin an answer within this time, as far as was measured."
    )
    node_ids: Annotated[list[Identifier], Field(max_length=100)] | None = Field(
        default=None, description="Only these nodes."
    )
    route_stale: Flag = Field(
        default=True, description="Whether nodes silent for 30 to 120 s may serve when no fresh one can."
    )


class InferenceBody(BaseModel):
    """The fields of an OpenAI request that the gateway reads; every other field passes through unchanged."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: ModelId
    stream: Annotated[bool | None, Field(strict=True)] = None
    stream_options: Any = None
    user: Any = None
    prompt_cache_key: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    previous_response_id: Any = None
    background: Any = None
    lucid: RequestPolicy | None = None


class CompletionBody(InferenceBody):
    """The same of `/v1/completions`, where `prompt` may be several prompts."""

    prompt: Any = None
    best_of: Any = None


class MatchRequest(WireShape):
    """Which node would serve a request of this model, and why not another."""

    model_config = {"json_schema_extra": {"examples": [{"model": "llama-3-70b", "lucid": {"allowRegions": ["eu"]}}]}}

    model: ModelId
    user: Text | None = Field(default=None, description="As in a request: ties a session to a node.")
    lucid: RequestPolicy | None = None


class RankedNode(ResponseShape):
    """A node that may serve the request. Scores are expected waits in milliseconds: less is better."""

    passport_id: str
    name: str
    score: float
    fresh: bool
    in_flight: int
    queue_depth: int | None
    load: float | None
    latency_ms: float | None = Field(description="To the first byte, as measured; null before a request was.")
    region: str | None


class RejectedNode(ResponseShape):
    """A node that may not, with every reason."""

    passport_id: str
    name: str
    reasons: list[ReasonView]


class MatchAnswer(ResponseShape):
    """A ranking without a request being sent. `rejections` counts nodes by reason, over all that were looked at."""

    model: str
    model_passport_id: str
    served_by: str | None = Field(default=None, description="The model that these nodes serve, if it has a route.")
    route: list[VariantView] = Field(default=[], description="The models that requests go to, in their order.")
    chosen: RankedNode | None
    shortlist: list[RankedNode] = Field(description="The nodes that may, best first; at most 100.")
    rejected: list[RejectedNode] = Field(description="Nodes that name the model first; at most 100.")
    rejections: dict[str, int]
    waiting: int | None = Field(
        default=None, description="Requests in this worker's queue for the model; null where the queue is off."
    )


class ModelRouting(ResponseShape):
    """Whether a node would be sent a request of one model now."""

    model: str
    model_passport_id: str
    place: int | None = Field(description="By expected wait, from 1; null when it may not serve, or comes after 100.")
    nodes: int = Field(description="How many nodes may serve it, up to 100; 0 when this one may not.")
    wait_ms: float | None = Field(description="The expected wait; null when it may not serve.")
    reasons: list[ReasonView] = Field(description="Every reason why not.")


class NodeRouting(ResponseShape):
    """What this replica would decide about a node now: its breaker, and each of its first five registered models."""

    passport_id: str
    checked_at: Instant
    breaker_open_since: Instant | None = Field(description="Since when it is sent no requests, because it failed.")
    breaker_retry_at: Instant | None = Field(description="When it is tried again.")
    models: list[ModelRouting]


class OpenAiModel(BaseModel):
    """A model by the name that requests ask for it; `created` is in seconds since 1970."""

    model_config = ConfigDict(frozen=True)

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str


class OpenAiModelList(BaseModel):
    """The served models, twice: as OpenAI's clients read them, and as passports with their page."""

    model_config = ConfigDict(frozen=True)

    object: Literal["list"] = "list"
    data: list[OpenAiModel]
    models: list[ModelView]
    pagination: Pagination


class OpenAiErrorDescription(BaseModel):
    """What went wrong and what to do about it, as OpenAI's clients read it; `status` and `details` are ours."""

    model_config = ConfigDict(frozen=True)

    message: str
    type: str
    param: str | None
    code: str
    status: int
    details: dict[str, Any]


class OpenAiErrorAnswer(BaseModel):
    """The body of every refusal below `/v1`."""

    model_config = ConfigDict(frozen=True)

    error: OpenAiErrorDescription


class AnthropicErrorDescription(BaseModel):
    """What went wrong and what to do about it, as Anthropic's clients read it; all but `type` and `message` is ours."""

    model_config = ConfigDict(frozen=True)

    type: str
    message: str
    code: str
    status: int
    details: dict[str, Any]


class AnthropicErrorAnswer(BaseModel):
    """The body of every refusal below `/v1/messages`."""

    model_config = ConfigDict(frozen=True)

    type: Literal["error"] = "error"
    error: AnthropicErrorDescription


class ProbeCode(StrEnum):
    """What came of a probe. Those that an attempt to serve a request can end with too are called as in its job."""

    OK = "ok"
    MODEL_MISSING = "model_missing"  # it lists models, and not all that it declares or reports
    ADDRESS_REFUSED = "address_refused"
    ROUTING_LOOP = "routing_loop"
    NAME_UNKNOWN = "name_unknown"
    CONNECT_FAILED = "connect_failed"
    CONNECT_TIMED_OUT = "connect_timed_out"
    TLS_FAILED = "tls_failed"
    CONNECTION_LOST = "connection_lost"
    FIRST_BYTE_TIMEOUT = "first_byte_timeout"
    BAD_RESPONSE = "bad_response"  # not HTTP, or over a limit
    BAD_STATUS = "bad_status"
    REDIRECTED = "redirected"
    AUTH_REFUSED = "auth_refused"  # it wants another key than inferenceKey, or any
    NOT_JSON = "not_json"  # no list of models in JSON
    NOT_CONNECTED = "not_connected"  # an outbound node, whose agent has no connection to this replica
    OUR_RESOLVER = "our_resolver"  # this service's DNS does not answer
    OUR_SOCKETS = "our_sockets"  # this service can open no more connections


class TlsView(ResponseShape):
    """The TLS session in which a node answered; its certificate was verified for the URL's host."""

    version: str
    certificate_expires_at: Instant | None


class ProbeAnswer(ResponseShape):
    """What the service found at a node's `inferenceUrl`. Nothing of the node's own answer is quoted."""

    passport_id: str
    checked_at: Instant
    reachable: bool = Field(description="Whether it answered `GET /v1/models` with a list, so requests can be sent.")
    code: ProbeCode
    message: str
    http_status: int | None = Field(description="Null when no answer came.")
    connect_ms: float | None = Field(description="Name, connection and TLS together; null when it was not connected.")
    answer_ms: float | None = Field(description="From the request to the whole answer; null when there was none.")
    tls: TlsView | None = Field(description="Null over plain http.")
    runtime: str | None = Field(description="What `owned_by` of the list suggests; null when it suggests nothing.")
    models_listed: list[str] = Field(description="Of the models that the node declares or reports, those it lists.")
    models_missing: list[str] = Field(description="Of those, the ones it does not list; empty without a list.")
