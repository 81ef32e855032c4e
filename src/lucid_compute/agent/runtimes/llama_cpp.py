"""llama.cpp's server. https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.runtimes.metrics_text import NO_METRICS, MetricSamples, read_metrics
from lucid_compute.agent.runtimes.reading import (
    ServedModel,
    ServerReading,
    as_count,
    as_label,
    distinct,
    is_model_id,
    models_listed,
    notes_on_list,
)

_RUNNING = "llamacpp:requests_processing"
_QUEUED = "llamacpp:requests_deferred"
_TOKENS = "llamacpp:tokens_predicted_total"  # changes only when a request ends, so it alone proves no stall
_PROGRESS = ("llamacpp:n_decode_total", "llamacpp:prompt_tokens_total", _TOKENS)
_NAMES = frozenset({_RUNNING, _QUEUED, *_PROGRESS})
_LOADED_TO_ASK = 8
_IN_USE = frozenset({"loaded", "loading", "sleeping"})  # requests wait for a model that loads, and wake one that sleeps


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """A llama.cpp server, of one model, or a router in front of several."""

    version: str | None = None
    name: str | None = "llama.cpp"
    health_path: str = "/health"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return its state: busy slots of all slots, deferred requests, models with their aliases."""
        listed, described = await asyncio.gather(server.get("/v1/models"), server.get("/props"))
        entries, props = models_listed(listed), described.fields
        models = None if entries is None else distinct(_each_model(entries, props))
        if props.get("is_sleeping") is True:  # other requests would wake it
            slots_then = as_count(props.get("total_slots"))
            return ServerReading(models=models, max_concurrency=slots_then, notes=notes_on_list(listed))
        metrics, slots = await _ask_for_metrics(server, entries or [])
        return ServerReading(
            models=models,
            running=_busy(slots) if slots else metrics.count(_RUNNING),
            queued=metrics.count(_QUEUED),
            max_concurrency=len(slots) if slots else as_count(props.get("total_slots")),
            tokens_generated=metrics.count(_TOKENS),
            progress=metrics.values(_PROGRESS) or _progress_of(slots),
            notes=notes_on_list(listed),
        )


async def _ask_for_metrics(
    server: InferenceServer, entries: list[dict[str, Any]]
) -> tuple[MetricSamples, list[dict[str, Any]]]:
    """Return the metrics and the slots. A router has no slots; its metrics are those of its loaded models."""
    if not any("status" in entry for entry in entries):
        scraped, listed = await asyncio.gather(server.get("/metrics"), server.get("/slots"))
        slots = listed.json if isinstance(listed.json, list) else []
        return read_metrics(scraped.text, _NAMES), [slot for slot in slots if isinstance(slot, dict)]
    loaded = [entry["id"] for entry in entries if _is_loaded(entry)][:_LOADED_TO_ASK]
    if not loaded:
        return NO_METRICS, []
    answers = await asyncio.gather(*(server.get(f"/metrics?model={quote(name, safe='')}") for name in loaded))
    return read_metrics("\n".join(answer.text for answer in answers), _NAMES), []


def _each_model(entries: list[dict[str, Any]], props: Mapping[str, Any]) -> Iterator[ServedModel]:
    settings = props.get("default_generation_settings")
    per_slot = as_count(settings.get("n_ctx")) if isinstance(settings, dict) else None
    for entry in entries:
        if not _can_serve(entry, props):
            continue
        meta, aliases = entry.get("meta"), entry.get("aliases")
        meta = meta if isinstance(meta, dict) else {}
        for name in [entry["id"], *(aliases if isinstance(aliases, list) else [])]:
            if is_model_id(name):
                yield ServedModel(
                    id=name,
                    max_tokens=per_slot or as_count(meta.get("n_ctx")),
                    quantization=_quantization(meta.get("ftype") or props.get("model_ftype")),
                    is_loaded=_is_loaded(entry),
                )


def _can_serve(entry: Mapping[str, Any], props: Mapping[str, Any]) -> bool:
    """Return whether a request for the model can succeed. A router lists models that failed or are downloaded, too."""
    status = entry.get("status")
    if not isinstance(status, dict):
        return True
    value = status.get("value")
    if value == "unloaded":  # it is loaded when it is asked for, unless the router was started without that
        return not status.get("failed") and props.get("models_autoload") is not False
    return value in _IN_USE


def _is_loaded(entry: Mapping[str, Any]) -> bool:
    status = entry.get("status")
    return not isinstance(status, dict) or status.get("value") == "loaded"


def _quantization(ftype: object) -> str | None:
    """Return `Q4_K - Medium` as q4_k_m and `all F32` as f32, as such models are named elsewhere."""
    label = as_label(ftype)
    if label is None:
        return None
    kind, _, size = label.removeprefix("all ").partition(" - ")
    return f"{kind}_{size[0]}".lower() if size else kind.lower()


def _busy(slots: list[dict[str, Any]]) -> int:
    return sum(slot.get("is_processing") is True for slot in slots)


def _progress_of(slots: list[dict[str, Any]]) -> tuple[float, ...] | None:
    """Return what changes in the slots, for a server without --metrics."""
    moved = tuple(
        float(number)
        for slot in slots
        for number in (slot.get("id_task"), slot.get("n_prompt_tokens_processed"), *_decoded(slot))
        if isinstance(number, int | float)
    )
    return moved or None


def _decoded(slot: Mapping[str, Any]) -> list[object]:
    tokens = slot.get("next_token")
    tokens = tokens if isinstance(tokens, list) else [tokens]
    return [token.get("n_decoded") for token in tokens if isinstance(token, dict)]
