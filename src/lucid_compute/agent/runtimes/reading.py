"""What is read of an inference server, whatever it is, and what each runtime is to the rest of the agent."""

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
    """A model that the server can serve; one that is not loaded is loaded when it is asked for."""

    id: str
    max_tokens: int | None = None
    quantization: str | None = None
    is_loaded: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerReading:
    """A server at one moment. None is unknown, never 0.

    `progress` holds whatever moves while the server works: if requests run and none of it moves, the server is wedged.
    `not_ready` is why it can't serve although it answers; `notes` are worth a line in the log.
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
    """One kind of inference server. `name` is None for one that only speaks OpenAI's API."""

    @property
    def name(self) -> str | None:
        """How the registry calls it."""

    @property
    def version(self) -> str | None:
        """As it says itself."""

    @property
    def health_path(self) -> str:
        """What answers 200 while it can serve."""

    async def read(self, server: InferenceServer) -> ServerReading:
        """Answer how the server is now."""


def models_listed(answer: ServerResponse) -> list[dict[str, Any]] | None:
    """Answer the entries of an OpenAI list of models, those with a usable id; None when it is no such list."""
    entries = answer.fields.get("data")
    if not isinstance(entries, list):
        return None
    return [entry for entry in entries if isinstance(entry, dict) and is_label(entry.get("id"))][:MAX_MODELS]


def distinct(models: Iterable[ServedModel]) -> tuple[ServedModel, ...]:
    """Answer the models by id, each id once: the registry refuses a declaration that names one twice."""
    by_id: dict[str, ServedModel] = {}
    for model in models:
        by_id.setdefault(model.id, model)
    return tuple(sorted(by_id.values(), key=lambda model: model.id))[:MAX_MODELS]


def is_label(value: object) -> bool:
    """Whether the registry would take this as a name."""
    return isinstance(value, str) and 0 < len(value) <= _MAX_LABEL and value.isprintable()


def as_label(value: object) -> str | None:
    """Answer a text that the registry takes; None when there is none."""
    return str(value).strip() if isinstance(value, str) and is_label(value.strip()) else None


def as_count(value: object) -> int | None:
    """Answer a number of tokens or requests above 0; None when it is none."""
    is_count = isinstance(value, int | float) and not isinstance(value, bool) and 1 <= value <= _MAX_TOKENS
    return int(value) if is_count else None  # type: ignore[call-overload]
