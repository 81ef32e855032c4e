"""What is read from any inference server, and the interface of a runtime to the rest of the agent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
from lucid_compute.wire import MAX_MODEL_ID, ModelId

MAX_MODELS = 1000
_MODEL_ID = TypeAdapter(ModelId)
_MAX_LABEL = 200
_SHOWN_NAMES = 3
_MAX_PARENTS = 4  # an adapter of an adapter of a model is unheard of; a circle of them ends here
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

    `fullest_rank` is the load of the fullest data-parallel rank, 0 to 1, of a server that has several.
    `progress` holds values that change while the server works; if requests run and none of them changes, it is wedged.
    `not_ready` is why it can't serve although it responds; `notes` are worth a line in the log.
    """

    models: tuple[ServedModel, ...] | None = None
    running: int | None = None
    queued: int | None = None
    kv_use: float | None = None
    fullest_rank: float | None = None
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
    return [entry for entry in entries if isinstance(entry, dict) and is_model_id(entry.get("id"))][:MAX_MODELS]


def notes_on_names(names: Iterable[object]) -> tuple[str, ...]:
    """Return a note about models that can't be passed on: their names are none for the registry, or are too many."""
    given = [name for name in names if isinstance(name, str) and name]
    unusable = [name for name in given if not is_model_id(name)]
    left_out = [*unusable, *[name for name in given if is_model_id(name)][MAX_MODELS:]]
    if not left_out:
        return ()
    shown = ", ".join(f"{name[:60]!r}" for name in left_out[:_SHOWN_NAMES])
    bounds = f"the registry takes {MAX_MODELS} of a node, with names of at most {MAX_MODEL_ID} printable characters"
    return (f"{len(left_out)} models are left out, because {bounds}: {shown}",)


def notes_on_list(answer: ServerResponse) -> tuple[str, ...]:
    """Return the notes on the names of an OpenAI list of models."""
    entries = answer.fields.get("data")
    listed = entries if isinstance(entries, list) else []
    return notes_on_names(entry.get("id") for entry in listed if isinstance(entry, dict))


def contexts_of(entries: Sequence[Mapping[str, Any]]) -> dict[str, int | None]:
    """Return the context of each model of an OpenAI list. An adapter names none: it has its base's.

    A base that is not in the list under the name that the adapter gives is the shortest of those that are.
    """
    by_id = {entry["id"]: entry for entry in reversed(entries)}
    bases = [as_count(entry.get("max_model_len")) for entry in entries if not entry.get("parent")]
    shortest = min((context for context in bases if context), default=None)
    return {name: _context_of(entry, by_id, shortest) for name, entry in by_id.items()}


def _context_of(entry: Mapping[str, Any], by_id: Mapping[str, Any], shortest: int | None) -> int | None:
    for _ in range(_MAX_PARENTS):
        parent, own = entry.get("parent"), as_count(entry.get("max_model_len"))
        if own is not None or not isinstance(parent, str) or not parent:
            return own
        if parent not in by_id:
            break
        entry = by_id[parent]
    return shortest


def distinct(models: Iterable[ServedModel]) -> tuple[ServedModel, ...]:
    """Return the models by id, each id once. The registry refuses a declaration that names an id twice."""
    by_id: dict[str, ServedModel] = {}
    for model in models:
        by_id.setdefault(model.id, model)
    return tuple(sorted(by_id.values(), key=lambda model: model.id))[:MAX_MODELS]


def is_model_id(value: object) -> bool:
    """Return whether the registry accepts this as the id of a model."""
    try:
        _MODEL_ID.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def is_label(value: object) -> bool:
    """Return whether the registry accepts this as a label."""
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
        listed = await server.get("/v1/models")
        return ServerReading(models=models_with_contexts(listed), notes=notes_on_list(listed))


def models_with_contexts(listed: ServerResponse) -> tuple[ServedModel, ...] | None:
    """Return the models of an OpenAI list with their contexts; None when it is no such list."""
    entries = models_listed(listed)
    if entries is None:
        return None
    contexts = contexts_of(entries)
    return distinct(ServedModel(id=name, max_tokens=context) for name, context in contexts.items())
