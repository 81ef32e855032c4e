"""Ollama. https://github.com/ollama/ollama/blob/main/docs/api.md; it has no metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
from lucid_compute.agent.runtimes.reading import (
    MAX_MODELS,
    ServedModel,
    ServerReading,
    as_count,
    as_label,
    distinct,
    is_model_id,
    notes_on_names,
)

_CLOUD_ENDINGS = (":cloud", "-cloud")


@dataclass(frozen=True, slots=True)
class Ollama:
    """An Ollama server. It does not report how many requests run or wait.

    A model is unloaded after five idle minutes, and its context is reported only while it is loaded. `contexts`
    remembers it, or the declaration would change each time.
    """

    version: str | None = None
    contexts: dict[str, int] = field(default_factory=dict)
    name: str | None = "ollama"
    health_path: str = "/api/version"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return the installed models and which of them are loaded. Models in Ollama's cloud are left out."""
        installed, loaded = await asyncio.gather(server.get("/api/tags"), server.get("/api/ps"))
        local, running = _local(installed), _local(loaded)
        if local is None:
            return ServerReading()
        in_memory = {_name(entry): entry for entry in running or []}
        for name, entry in in_memory.items():
            if context := as_count(entry.get("context_length")):
                self.contexts[name] = context
        names = {_name(entry) for entry in local}
        for gone in self.contexts.keys() - names:
            del self.contexts[gone]
        return ServerReading(
            models=distinct(self._model(entry, in_memory) for entry in local),
            notes=(*filter(None, (_offload(entry) for entry in running or [])), *_notes_on(installed)),
        )

    def _model(self, entry: Mapping[str, Any], in_memory: Mapping[str, Any]) -> ServedModel:
        name = _name(entry)
        details = entry.get("details")
        level = as_label(details.get("quantization_level")) if isinstance(details, dict) else None
        return ServedModel(
            id=name,
            max_tokens=self.contexts.get(name),
            quantization=level.lower() if level else None,
            is_loaded=name in in_memory,
        )


def _local(answer: ServerResponse) -> list[dict[str, Any]] | None:
    """Return the models of a list that run on this machine."""
    entries = answer.fields.get("models")
    if not isinstance(entries, list):
        return None
    known = [entry for entry in entries if isinstance(entry, dict) and _name(entry)]
    return [entry for entry in known if not _runs_elsewhere(entry)][:MAX_MODELS]


def _notes_on(installed: ServerResponse) -> tuple[str, ...]:
    entries = installed.fields.get("models")
    listed = entries if isinstance(entries, list) else []
    return notes_on_names(entry.get("model") or entry.get("name") for entry in listed if isinstance(entry, dict))


def _runs_elsewhere(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("remote_host") or entry.get("remote_model")) or _name(entry).endswith(_CLOUD_ENDINGS)


def _name(entry: Mapping[str, Any]) -> str:
    name = entry.get("model") or entry.get("name")
    return name if isinstance(name, str) and is_model_id(name) else ""


def _offload(entry: Mapping[str, Any]) -> str | None:
    """Return a note that a model runs partly on the CPU, which makes it slow."""
    size, in_vram = _sizes(entry)
    if size and in_vram is not None and in_vram < size:
        return f"{_name(entry)} runs on the CPU in part: {in_vram * 100 // size} % of it are in the GPU's memory"
    return None


def _sizes(entry: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Return a loaded model's size, and how much of it is in GPU memory, in bytes."""
    sizes = (entry.get("size"), entry.get("size_vram"))
    return tuple(value if isinstance(value, int) and value >= 0 else None for value in sizes)  # type: ignore[return-value]
