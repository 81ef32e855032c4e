"""Build the heartbeat, the passport's metadata and the declaration from what was observed. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from lucid_compute.agent.gpu import GpuState
from lucid_compute.agent.observer import Seen
from lucid_compute.agent.runtimes.reading import NOTHING_READ, ServedModel, ServerReading
from lucid_compute.agent.server_watch import Observation
from lucid_compute.agent.settings import AgentSettings
from lucid_compute.registry.domain.node_state import ReportedStatus
from lucid_compute.registry.domain.passports import Connectivity

RUN_IN_MAIN_MEMORY = frozenset({"llama.cpp", "ollama"})  # the others serve from a GPU, or are not known to do without
NOT_LOOKED_AT = "the agent could not observe the inference server in the last seconds"
_MAX_DETAIL = 1000


def heartbeat_of(seen: Seen, settings: AgentSettings, *, stops: bool) -> dict[str, Any]:
    """Return the heartbeat's fields about the node, with their Python names. None is unknown, never 0."""
    server = seen.server
    reading = server.reading if server is not None else NOTHING_READ
    fault = NOT_LOOKED_AT if server is None else server.fault
    models = () if fault is not None or reading.models is None else _wanted(reading.models, settings)
    return {
        "status": _status(fault, stops=stops).value,
        "detail": _detail(fault, seen.gpus, stops=stops),
        "load": load_of(reading, seen.gpus, settings.max_concurrency),
        "queue_depth": reading.queued,
        "in_flight": reading.running,
        "available_models": [model.id for model in models if model.is_loaded],
        "runtime": _runtime(server),
        "gpus": None if seen.gpus.gpus is None else list(seen.gpus.gpus),
        "tokens_generated": reading.tokens_generated,
        "jobs_completed": reading.jobs_completed,
    }


def load_of(reading: ServerReading, gpus: GpuState, max_concurrency: int | None) -> float | None:
    """Return the load, 0 to 1: running requests of the limit, else KV cache in use, else GPU utilisation.

    GPU utilisation comes last because one request is enough to keep a GPU at 100 %. A server of several data-parallel
    ranks is as full as its fullest rank, because it spreads requests over them without regard to that.
    """
    limit = max_concurrency or reading.max_concurrency
    if reading.running is not None and limit:
        return max(min(reading.running / limit, 1.0), reading.fullest_rank or 0.0)
    return reading.kv_use if reading.kv_use is not None else gpus.utilization


def metadata_of(seen: Seen, settings: AgentSettings) -> dict[str, Any]:
    """Return the known metadata of the passport. Unknown fields are left out."""
    reading = seen.server.reading if seen.server is not None else NOTHING_READ
    gpus = seen.gpus
    is_in_main_memory = not RUN_IN_MAIN_MEMORY.isdisjoint({(_runtime(seen.server) or {}).get("name")})
    memory_mb = gpus.vram_mb or (gpus.main_memory_mb if is_in_main_memory else None)
    found = {
        "gpu": settings.gpu or gpus.names,
        "gpuCount": len(gpus.gpus) if gpus.gpus else None,
        "vram": settings.vram or (f"{memory_mb}MiB" if memory_mb else None),
        "connectivity": Connectivity.OUTBOUND.value if settings.outbound else None,
        "inferenceUrl": None if settings.outbound else settings.inference_url,
        "region": settings.region,
        "capabilities": list(settings.capabilities),
        "maxConcurrency": settings.max_concurrency or reading.max_concurrency,
        "runtimes": _runtimes(seen.server),
        "maxContext": _max_context(reading.models),
        "pricePer1kTokens": settings.price_per_1k_tokens,
    }
    return {name: value for name, value in found.items() if value is not None}


def declaration_of(seen: Seen, settings: AgentSettings) -> list[dict[str, Any]] | None:
    """Return the models to declare; None while they are unknown, or while the server can't serve."""
    server = seen.server
    if server is None or server.fault is not None or server.reading.models is None:
        return None
    return [
        {
            "id": model.id,
            "max_tokens": model.max_tokens,
            "quantization": settings.quantization_of(model.id) or model.quantization,
        }
        for model in _wanted(server.reading.models, settings)
    ]


def _wanted(models: Collection[ServedModel], settings: AgentSettings) -> list[ServedModel]:
    return [model for model in models if not settings.models or model.id in settings.models]


def _status(fault: str | None, *, stops: bool) -> ReportedStatus:
    if stops:
        return ReportedStatus.DRAINING
    return ReportedStatus.HEALTHY if fault is None else ReportedStatus.UNHEALTHY


def _detail(fault: str | None, gpus: GpuState, *, stops: bool) -> str | None:
    parts = ["the agent is stopping"] if stops else []
    parts += [fault] if fault is not None else []
    parts += [gpus.detail] if gpus.detail is not None and gpus.gpus else []  # not for a machine without GPUs
    return "; ".join(parts)[:_MAX_DETAIL] or None


def _runtime(server: Observation | None) -> dict[str, Any] | None:
    if server is None or server.detection is None or server.detection.runtime.name is None:
        return None
    return {"name": server.detection.runtime.name, "version": server.detection.runtime.version}


def _runtimes(server: Observation | None) -> list[Mapping[str, Any]] | None:
    runtime = _runtime(server)
    if runtime is None:
        return None
    return [{name: value for name, value in runtime.items() if value is not None}]


def _max_context(models: Collection[ServedModel] | None) -> int | None:
    """Return the smallest context of the models; None unless it is known for each model."""
    contexts = [model.max_tokens for model in models or ()]
    known = [context for context in contexts if context is not None]
    return min(known) if known and len(known) == len(contexts) else None
