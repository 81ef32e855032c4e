"""Passports: the durable identity of nodes and models, and what their metadata says. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from lucid_compute.registry.domain.packed_metadata import PackedMetadata
from lucid_compute.registry.domain.prices import TokenPrice, read_price, read_prices

MB_PER_GB = 1024
MAX_VRAM_GB = 1_000_000

_VRAM_TEXT = re.compile(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*(T|G|M)(?:i?B)?\s*", re.IGNORECASE)
_GB_PER_UNIT = {"T": 1024.0, "G": 1.0, "M": 1.0 / MB_PER_GB}
_RUNTIME_SPELLINGS = {
    "llamacpp": "llama.cpp",
    "llama-cpp": "llama.cpp",
    "llama_cpp": "llama.cpp",
    "tensorrt-llm": "tensorrt",
    "tensorrt_llm": "tensorrt",
    "trtllm": "tensorrt",
    "trt-llm": "tensorrt",
    "text-generation-inference": "tgi",
}


class PassportType(StrEnum):
    """What a passport identifies."""

    COMPUTE = "compute"
    MODEL = "model"
    AGENT = "agent"
    TOOL = "tool"
    DATASET = "dataset"


class PassportStatus(StrEnum):
    """Whether a passport may be used; `revoked` is final."""

    ACTIVE = "active"
    DEPRECATED = "deprecated"
    REVOKED = "revoked"


class Connectivity(StrEnum):
    """How the service reaches a node: at its `inferenceUrl`, or down a connection that the node's agent opened."""

    DIRECT = "direct"
    OUTBOUND = "outbound"


class ModelFormat(StrEnum):
    """How a model's weights are stored, or `api` for a model behind an upstream."""

    API = "api"
    SAFETENSORS = "safetensors"
    GGUF = "gguf"


def parse_vram_gb(value: Any) -> float:
    """Return the gigabytes of `"80GB"`, `"80 GiB"`, `"81920MiB"` or a number of GB (1 GB = 1 GiB = 1024 MiB).

    Raises:
        ValueError: it is none of these, not above 0, or above `MAX_VRAM_GB`.
    """
    if isinstance(value, str) and (match := _VRAM_TEXT.fullmatch(value)):
        vram_gb = float(match[1]) * _GB_PER_UNIT[match[2].upper()]
    elif isinstance(value, int | float) and not isinstance(value, bool):
        vram_gb = float(value)
    else:
        message = 'Send the memory of the GPUs as "80GB", "80 GiB", "81920MiB" or a number of GB.'
        raise ValueError(message)
    if not 0 < vram_gb <= MAX_VRAM_GB:
        message = f"Send more than 0 GB and at most {MAX_VRAM_GB} GB."
        raise ValueError(message)
    return vram_gb


def normalise_runtime(name: str) -> str:
    """Return the runtime's name for comparison: lower case, one spelling for each runtime."""
    lowered = name.strip().lower()
    return _RUNTIME_SPELLINGS.get(lowered, lowered)


@dataclass(frozen=True, slots=True)
class Passport:
    """A stored passport: `metadata` as it was written, without secrets; `revision` grows with each write."""

    id: str
    type: PassportType
    owner: str
    name: str
    description: str | None
    version: str | None
    tags: tuple[str, ...]
    status: PassportStatus
    metadata: Mapping[str, Any]
    created_at: datetime
    updated_at: datetime
    deregistered_at: datetime | None
    revision: int

    @property
    def is_active(self) -> bool:
        """Return whether it may be used."""
        return self.status is PassportStatus.ACTIVE

    @property
    def has_ended(self) -> bool:
        """Return whether it was revoked or deregistered, which is final; its name is free again."""
        return self.status is PassportStatus.REVOKED or self.deregistered_at is not None


class NewPassport(NamedTuple):
    """A passport to be created; `owner` is checked already."""

    type: PassportType
    owner: str
    name: str
    description: str | None
    version: str | None
    tags: list[str]
    metadata: Mapping[str, Any]


def _pack(record: Passport) -> Passport:
    return replace(record, metadata=PackedMetadata(record.metadata))


@dataclass(frozen=True, slots=True)
class ComputePassport:
    """A node's passport as the matching engine reads it.

    `max_context` is in tokens, `max_concurrency` in requests at a time; None is no limit. `prices` is keyed by the ids,
    names or aliases of models; `price` applies to all other models; None is no price.
    """

    record: Passport
    vram_gb: float
    runtimes: frozenset[str]
    max_context: int | None
    region: str | None = None
    gpu: str | None = None
    price: TokenPrice | None = None
    max_concurrency: int | None = None
    is_outbound: bool = False
    prices: Mapping[str, TokenPrice] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """The passport's id."""
        return self.record.id

    def price_of(self, known_as: tuple[str, ...]) -> TokenPrice | None:
        """Return the price for the first of a model's ids that has one, else the node's own price."""
        if prices := self.prices:
            for name in known_as:
                if name in prices:
                    return prices[name]
        return self.price

    @classmethod
    def read(cls, record: Passport) -> ComputePassport:
        """Read the metadata of a stored compute passport."""
        metadata = record.metadata
        return cls(
            record=_pack(record),
            vram_gb=parse_vram_gb(metadata["vram"]),
            runtimes=frozenset(_runtime_names(metadata.get("runtimes"))),
            max_context=metadata.get("maxContext"),
            region=metadata.get("region"),
            gpu=metadata.get("gpu"),
            price=read_price(metadata.get("pricePer1kTokens")),
            max_concurrency=metadata.get("maxConcurrency"),
            is_outbound=metadata.get("connectivity") == Connectivity.OUTBOUND,
            prices=read_prices(metadata.get("prices")),
        )


class ModelRoute(NamedTuple):
    """What a model's name stands for: one of the weighted models, then the others in turn, then the fallbacks.

    Names are ids, names or aliases. Without weights the model itself is the first.
    """

    weights: tuple[tuple[str, int], ...]
    fallbacks: tuple[str, ...]

    def in_order(self, own_name: str, draw: float) -> list[str]:
        """Return the names in the order in which they are tried; `draw`, from 0 to 1 without 1, chooses the first."""
        heaviest_first = sorted(self.weights or ((own_name, 1),), key=lambda weighted: -weighted[1])
        left = draw * sum(weight for _, weight in heaviest_first)
        for place, (_, weight) in enumerate(heaviest_first):
            if (left := left - weight) < 0:
                heaviest_first.insert(0, heaviest_first.pop(place))
                break
        return list(dict.fromkeys([*(name for name, _ in heaviest_first), *self.fallbacks]))

    @classmethod
    def read(cls, route: Any) -> ModelRoute | None:
        """Read a stored route; None without one. Older releases stored anything under its key, which is no route."""
        if not isinstance(route, Mapping):
            return None
        weights, fallbacks = route.get("weights") or {}, route.get("fallbacks") or ()
        if not isinstance(weights, Mapping) or not isinstance(fallbacks, list | tuple):
            return None
        weighted = tuple((name, weight) for name, weight in weights.items() if type(weight) is int and weight > 0)
        named = tuple(name for name in fallbacks if isinstance(name, str))
        return cls(weighted, named) if weighted or named else None


@dataclass(frozen=True, slots=True)
class ModelPassport:
    """A model's passport as the matching engine reads it. `context_length` is in tokens.

    `known_as` holds the ids that nodes and clients may use for it: its passport id, and while it is active its name and
    aliases. `min_vram_by_quantization` is keyed in lower case.
    """

    record: Passport
    format: ModelFormat
    runtimes: frozenset[str]
    runtime_recommended: str | None
    min_vram_gb: float | None
    min_vram_by_quantization: Mapping[str, float]
    context_length: int | None
    known_as: tuple[str, ...]
    route: ModelRoute | None = None

    @property
    def id(self) -> str:
        """The passport's id."""
        return self.record.id

    @classmethod
    def read(cls, record: Passport) -> ModelPassport:
        """Read the metadata of a stored model passport."""
        metadata = record.metadata
        minimum = metadata.get("minVramGb")
        by_quantization = minimum if isinstance(minimum, Mapping) else {}
        recommended = metadata.get("runtimeRecommended")
        return cls(
            record=_pack(record),
            format=ModelFormat(metadata["format"]),
            runtimes=frozenset(_runtime_names(metadata.get("runtimes"))),
            runtime_recommended=normalise_runtime(recommended) if recommended else None,
            min_vram_gb=None if isinstance(minimum, Mapping) else minimum,
            min_vram_by_quantization={name.lower(): gigabytes for name, gigabytes in by_quantization.items()},
            context_length=metadata.get("contextLength"),
            known_as=(record.id, *model_names(record)),
            route=ModelRoute.read(metadata.get("route")),
        )


def model_names(record: Passport) -> tuple[str, ...]:
    """Return the name and aliases of an active model, which are unique over all owners; none when it is not active."""
    if record.type is not PassportType.MODEL or not record.is_active:
        return ()
    return tuple(dict.fromkeys([record.name, *(record.metadata.get("aliases") or ())]))


def _runtime_names(runtimes: Any) -> list[str]:
    names = [entry["name"] if isinstance(entry, Mapping) else entry for entry in runtimes or ()]
    return [normalise_runtime(name) for name in names]
