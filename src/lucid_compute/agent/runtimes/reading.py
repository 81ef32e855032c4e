"""What is read from any inference server, and the interface of a runtime to the rest of the agent."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse

MAX_MODELS = 1000
_MAX_LABEL = 200
_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """A model that the server can serve. A model that is not loaded is loaded at its first request."""

    id: str
    max_tokens: int | None = None
    quantization: str | None = None
    is_loaded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReading:
    """A server at one moment. None is unknown, never 0.

    `progress` holds values that change while the server works; if requests run and none of them changes, it is wedged.
    `not_ready` is why it can't serve although it responds; `notes` are worth a line in the log.
    """

    models: tuple[ServedModel, ...] | None = None
    running: int | None = None
    queued: int | None = None
    kv_use: float | None = None
    max_concurrency: int | None = None
    tokens_generated: int | None = None
    jobs_completed: int | None = None
    progress: tuple[float, ...] | None = None
    not_ready: str | None = None
    notes: tuple[str, ...] = ()


NOTHING_READ = ServerReading()


class Runtime(Protocol):
    """One kind of inference server. `name` is None for a server that only speaks OpenAI's API."""

    @property
    def name(self) -> str | None:
        """The registry's name for it."""

    @property
    def version(self) -> str | None:
        """The version that the server reports."""

    @property
    def health_path(self) -> str:
        """The path that responds with 200 while the server can serve."""

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return the state of the server now."""


def models_listed(answer: ServerResponse) -> list[dict[str, Any]] | None:
    """Return the entries of an OpenAI list of models that have a usable id; None when it is no such list."""
    entries = answer.fields.get("data")
    if not isinstance(entries, list):
        return None
    return [entry for entry in entries if isinstance(entry, dict) and is_label(entry.get("id"))][:MAX_MODELS]


def distinct(models: Iterable[ServedModel]) -> tuple[ServedModel, ...]:
    """Return the models by id, each id once. The registry refuses a declaration that names an id twice."""
    by_id: dict[str, ServedModel] = {}
    for model in models:
        by_id.setdefault(model.id, model)
    return tuple(sorted(by_id.values(), key=lambda model: model.id))[:MAX_MODELS]


def is_label(value: object) -> bool:
    """Return whether the registry accepts this as a name."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_LABEL and value.isprintable()


def as_label(value: object) -> str | None:
    """Return a text that the registry accepts; None when there is none."""
    return str(value).strip() if isinstance(value, str) and is_label(value.strip()) else None


def as_count(value: object) -> int | None:
    """Return a number of tokens or requests, 1 or more; None when it is none."""
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= _MAX_TOKENS
    return int(value) if is_count else None  # type: ignore[call-overload]


@dataclass(frozen=True, slots=True)
class OpenAiCompatible:
    """A server that only speaks OpenAI's API. Without a runtime, the registry matches it by its declared models."""

    version: str | None = None
    name: str | None = None
    health_path: str = "/v1/models"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return its models, and their context where the list has it."""
        entries = models_listed(await server.get("/v1/models"))
        if entries is None:
            return ServerReading()
        return ServerReading(
            models=distinct(
                ServedModel(id=entry["id"], max_tokens=as_count(entry.get("max_model_len"))) for entry in entries
            )
        )
