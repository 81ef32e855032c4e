"""The metadata of passports: checked by type, stored as written, secrets apart, and shown to a viewer. Pure."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from lucid_compute.errors import InvalidRequest
from lucid_compute.registry.domain.packed_metadata import PackedMetadata
from lucid_compute.registry.domain.passports import (
    MAX_VRAM_GB,
    Connectivity,
    ModelFormat,
    PassportType,
    parse_vram_gb,
)
from lucid_compute.registry.domain.prices import INPUT_KEY, OUTPUT_KEY
from lucid_compute.wire import Label, ModelId, Money, PositiveCount, Text, faults_from, write_money

AVAILABILITY_SUFFIX = "/availability"
_VRAM_GB = "vramGb"
_PRICE = "pricePer1kTokens"
_PRICES = "prices"
MAX_BYTES = 32 * 1024
MAX_DEPTH = 8
MAX_ROUTED = 20  # models of a route
MAX_WEIGHT = 1_000_000


class StoredMetadata(NamedTuple):
    """Metadata as it is stored: `public` as it was written, and `secrets`, which no response contains."""

    public: dict[str, Any]
    secrets: dict[str, Any]


def read_metadata(passport_type: PassportType, raw: Mapping[str, Any]) -> StoredMetadata:
    """Check metadata by the type of its passport; return it with its secrets apart.

    Raises:
        InvalidRequest: it is not valid; the error names every fault below `metadata`. It is larger than `MAX_BYTES`,
            or nested deeper than `MAX_DEPTH`.
    """
    read_only = {_VRAM_GB} if passport_type is PassportType.COMPUTE else set()
    public = {key: value for key, value in raw.items() if key not in read_only}
    _check_size(public)
    shapes: dict[PassportType, type[_Metadata]] = {
        PassportType.COMPUTE: ComputeMetadata,
        PassportType.MODEL: ModelMetadata,
    }
    if (shape := shapes.get(passport_type)) is None:
        return StoredMetadata(public, {})
    try:
        checked = shape.model_validate(public)
    except ValidationError as error:
        raise InvalidRequest(faults_from(error.errors(include_url=False), "metadata")) from None
    if isinstance(checked, ComputeMetadata):
        return _split_compute(checked, public)
    return _split_model(public)


def whole_metadata(stored: StoredMetadata) -> dict[str, Any]:
    """Return metadata with its secrets in their places, which a merge patch is applied to."""
    whole = dict(stored.public)
    if "inferenceKey" in stored.secrets:
        whole["inferenceKey"] = stored.secrets["inferenceKey"]
    if "upstreamApiKey" in stored.secrets and isinstance(whole.get("upstream"), Mapping):
        whole["upstream"] = {**whole["upstream"], "apiKey": stored.secrets["upstreamApiKey"]}
    return whole


def merge_patch(target: Any, patch: Any) -> Any:
    """Return `target` with an RFC 7396 merge patch applied."""
    if not isinstance(patch, Mapping):
        return patch
    merged = dict(target) if isinstance(target, Mapping) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def shown_metadata(passport_type: PassportType, public: Mapping[str, Any], *, to_everyone: bool) -> dict[str, Any]:
    """Return metadata as it is shown: all of it, or with `to_everyone` only the keys that the contract names."""
    public = public.unpack() if isinstance(public, PackedMetadata) else dict(public)
    if passport_type is PassportType.COMPUTE:
        vram_gb = parse_vram_gb(public["vram"])
        return {**public, _VRAM_GB: int(vram_gb) if vram_gb.is_integer() else vram_gb}
    if passport_type is PassportType.MODEL and to_everyone:
        return {key: value for key, value in public.items() if key in _PUBLIC_MODEL_KEYS}
    return public


def check_name(passport_type: PassportType, name: str) -> None:
    """Refuse a model's name that can't be told from a path of the API.

    Raises:
        InvalidRequest: the name ends in `/availability`; the fault is at `name`.
    """
    if passport_type is PassportType.MODEL:
        try:
            _check_model_name(name)
        except ValueError as error:
            raise InvalidRequest.at("name", str(error)) from None


def _check_size(metadata: Mapping[str, Any]) -> None:
    """Refuse metadata that costs more memory than a passport is worth: every replica holds it.

    Raises:
        InvalidRequest: it is too large or too deep; the fault is at `metadata`.
    """
    size = len(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")).encode())
    if size > MAX_BYTES:
        message = f"It has {size:,} bytes as JSON, and {MAX_BYTES:,} (32 KiB) are allowed. Store the rest elsewhere."
        raise InvalidRequest.at("metadata", message)
    level: list[Any] = [metadata]
    for _ in range(MAX_DEPTH):
        level = [value for container in level for value in _values_of(container) if isinstance(value, (dict, list))]
        if not level:
            return
    message = f"It is nested deeper than {MAX_DEPTH} levels. Send flatter metadata, or put the deep part in a string."
    raise InvalidRequest.at("metadata", message)


def _values_of(container: Any) -> Collection[Any]:
    values: Collection[Any] = container.values() if isinstance(container, Mapping) else container
    return values


def _split_compute(checked: ComputeMetadata, public: dict[str, Any]) -> StoredMetadata:
    secrets = {}
    key = public.pop("inferenceKey", None)
    if key is not None:
        secrets["inferenceKey"] = key
    if checked.price_per_1k_tokens is not None:
        public[_PRICE] = write_money(checked.price_per_1k_tokens)
    if checked.prices is not None:
        public[_PRICES] = {
            model: price.model_dump(mode="json", by_alias=True) for model, price in checked.prices.items()
        }
    return StoredMetadata(public, secrets)


def _split_model(public: dict[str, Any]) -> StoredMetadata:
    upstream = public.get("upstream")
    if not upstream:
        return StoredMetadata(public, {})
    shown = {key: value for key, value in upstream.items() if key != "apiKey"}
    secrets = {} if upstream.get("apiKey") is None else {"upstreamApiKey": upstream["apiKey"]}
    return StoredMetadata({**public, "upstream": shown}, secrets)


def _check_vram(value: Any) -> Any:
    parse_vram_gb(value)
    return value


def _check_model_name(value: str) -> str:
    if value.endswith(AVAILABILITY_SUFFIX):
        message = f"A model's name may not end in {AVAILABILITY_SUFFIX}: that is a path of the API."
        raise ValueError(message)
    return value


Vram = Annotated[
    str | float,
    BeforeValidator(_check_vram),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "pattern": r"^[1-9]\d{0,4}(\.\d{1,6})? ?(GB|GiB|MB|MiB)$"},
                {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_VRAM_GB},
            ],
            "description": "The node's total GPU memory: text with a unit, or a number of GB.",
            "examples": ["80GB"],
        }
    ),
]
ModelName = Annotated[ModelId, AfterValidator(_check_model_name)]


class _Metadata(BaseModel):
    """Metadata of a type that has a shape; unknown keys are kept."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, extra="allow")


class RuntimeDescription(BaseModel):
    """An inference runtime and its version."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Label
    version: Label | None = None


class ModelPrice(BaseModel):
    """The price of 1,000 tokens of one model on a node, in US dollars, for input and output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_per_1k_tokens: Annotated[Money, Field(alias=INPUT_KEY)]
    output_per_1k_tokens: Annotated[Money, Field(alias=OUTPUT_KEY)]


class ComputeMetadata(_Metadata):
    """What a provider states about a node when registering it."""

    gpu: Label | None = None
    vram: Vram
    connectivity: (
        Annotated[
            Connectivity,
            Field(
                description="`outbound`: the node's agent opens connections to the service, and needs no open port. "
                "Left out, it is `direct`."
            ),
        ]
        | None
    ) = None
    inference_url: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=2048,
            examples=["http://your-gpu:8080/v1"],
            description="Required, except where `connectivity` is `outbound`.",
        ),
    ] = None
    inference_key: Annotated[Text, Field(description="The node's own bearer key; write-only.")] | None = None
    region: Label | None = None
    capabilities: Annotated[list[Label], Field(max_length=100)] | None = None
    max_concurrency: PositiveCount | None = None
    gpu_count: PositiveCount | None = None
    runtimes: Annotated[list[Label | RuntimeDescription], Field(max_length=20)] | None = None
    max_context: PositiveCount | None = None
    price_per_1k_tokens: Annotated[Money | None, Field(alias="pricePer1kTokens")] = None
    prices: (
        Annotated[
            dict[ModelId, ModelPrice],
            Field(
                max_length=500, description="By a model's id, name or alias; `pricePer1kTokens` is that of all others."
            ),
        ]
        | None
    ) = None

    @model_validator(mode="before")
    @classmethod
    def _may_lack_url(cls, data: Any) -> Any:
        """Name the URL where it is missing, so that its check is called, and its fault has the wire's name."""
        return {"inferenceUrl": None, **data} if isinstance(data, Mapping) else data

    @field_validator("inference_url")
    @classmethod
    def _is_reached_somehow(cls, value: str | None, info: ValidationInfo) -> str | None:
        """Refuse a node that is reached at no URL, and does not open connections itself."""
        if value is None and info.data.get("connectivity") is not Connectivity.OUTBOUND:
            raise PydanticCustomError("missing", "Field required")
        return value


class Upstream(BaseModel):
    """The provider that requests for a `format=api` model are sent to."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, extra="forbid")

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    model: ModelId | None = None
    api_key: Text | None = None


class RouteShape(BaseModel):
    """What the model's name stands for: weighted models (its own name is itself), and fallbacks in their order."""

    model_config = ConfigDict(alias_generator=to_camel, frozen=True, extra="forbid")

    weights: (
        Annotated[
            dict[ModelId, Annotated[int, Field(strict=True, ge=1, le=MAX_WEIGHT)]],
            Field(min_length=1, max_length=MAX_ROUTED, description="By id, name or alias; left out: itself alone."),
        ]
        | None
    ) = None
    fallbacks: (
        Annotated[
            list[ModelId],
            Field(min_length=1, max_length=MAX_ROUTED, description="Tried in turn if no node can serve the first."),
        ]
        | None
    ) = None

    @model_validator(mode="after")
    def _names_each_model_once(self) -> RouteShape:
        if self.weights is None and self.fallbacks is None:
            message = "A route has weights, fallbacks or both. Send one of them, or null to remove the route."
            raise ValueError(message)
        named = [*(self.weights or ()), *(self.fallbacks or ())]
        if len(named) > len(set(named)):
            message = "A route names each model once: in weights or in fallbacks."
            raise ValueError(message)
        return self


class ModelMetadata(_Metadata):
    """What a model requires of a node."""

    format: ModelFormat
    runtimes: Annotated[list[Label], Field(max_length=20)] | None = None
    runtime_recommended: Label | None = None
    min_vram_gb: (
        Annotated[float, Field(strict=True, ge=0, le=MAX_VRAM_GB, allow_inf_nan=False)]
        | Annotated[
            dict[Label, Annotated[float, Field(strict=True, ge=0, le=MAX_VRAM_GB, allow_inf_nan=False)]],
            Field(min_length=1, max_length=50),
        ]
        | None
    ) = None
    context_length: PositiveCount | None = None
    aliases: Annotated[list[ModelName], Field(max_length=50)] | None = None
    upstream: Upstream | None = None
    route: RouteShape | None = None

    @model_validator(mode="after")
    def _upstream_is_for_api_models(self) -> ModelMetadata:
        if self.upstream is not None and self.format is not ModelFormat.API:
            message = "Only a model of format api has an upstream; leave upstream out or send format api."
            raise ValueError(message)
        return self


_PUBLIC_MODEL_KEYS = frozenset(to_camel(name) for name in ModelMetadata.model_fields) - {"upstream"}
