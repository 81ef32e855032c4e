"""What of an inference request the gateway reads, and the shapes of `POST /match`, on the wire."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from lucid_compute.field_types import AnswerShape, Flag, Identifier, Label, Money, NonNegative, Text, WireShape
from lucid_compute.wire.passports import ReasonView

ModelId = Annotated[str, Field(min_length=1, max_length=512)]


class RequestPolicy(WireShape):
    """`lucid` in a request: what it asks of the node that serves it. Null or absent asks nothing."""

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
    """What is read of an OpenAI request; every other field passes through untouched."""

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
    lucid: RequestPolicy | None = None


class MatchRequest(WireShape):
    """Which node would serve a request of this model, and why not another."""

    model_config = {"json_schema_extra": {"examples": [{"model": "llama-3-70b", "lucid": {"allowRegions": ["eu"]}}]}}

    model: ModelId
    user: Text | None = Field(default=None, description="As in a request: ties a session to a node.")
    lucid: RequestPolicy | None = None


class RankedNode(AnswerShape):
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


class RejectedNode(AnswerShape):
    """A node that may not, with every reason."""

    passport_id: str
    name: str
    reasons: list[ReasonView]


class MatchAnswer(AnswerShape):
    """A ranking without a request being sent. `rejections` counts nodes by reason, over all that were looked at."""

    model: str
    model_passport_id: str
    chosen: RankedNode | None
    shortlist: list[RankedNode] = Field(description="The nodes that may, best first; at most 100.")
    rejected: list[RejectedNode] = Field(description="Nodes that name the model first; at most 100.")
    rejections: dict[str, int]
