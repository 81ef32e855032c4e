"""Models as OpenAI's clients read them: snake_case, as they stand there."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from lucid_compute.wire.lists import Pagination
from lucid_compute.wire.passports import ModelView


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
