"""vLLM. MetricSamples: https://docs.vllm.ai/en/latest/usage/metrics.html."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
from lucid_compute.agent.runtimes.metrics_text import MetricSamples, read_metrics
from lucid_compute.agent.runtimes.reading import ServedModel, ServerReading, as_count, as_label, distinct, models_listed

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_TOKENS = "vllm:generation_tokens_total"
_FINISHED = "vllm:request_success_total"
_KV_USE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # the second is the older name
_SLEEP = "vllm:engine_sleep_state"
# The use of the KV cache moves during a long prefill, when no counter of tokens does.
_PROGRESS = (_TOKENS, "vllm:prompt_tokens_total", _FINISHED, *_KV_USE)
_NAMES = frozenset({_RUNNING, _WAITING, _SLEEP, *_PROGRESS})


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM server; it does not say how many requests it takes at a time."""

    version: str | None = None
    name: str | None = "vllm"
    health_path: str = "/health"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Answer how it is: counts summed over models and engines, the fullest engine's KV cache."""
        listed, scraped = await asyncio.gather(server.get("/v1/models"), server.get("/metrics"))
        metrics = read_metrics(scraped.text, _NAMES)
        return ServerReading(
            models=_models(listed),
            running=metrics.count(_RUNNING),
            queued=metrics.count(_WAITING),
            kv_use=metrics.share(*_KV_USE),
            tokens_generated=metrics.count(_TOKENS),
            jobs_completed=metrics.count(_FINISHED),
            progress=metrics.values(_PROGRESS),
            not_ready="vLLM sleeps; POST /wake_up wakes it" if _sleeps(metrics) else None,
        )


def _models(listed: ServerResponse) -> tuple[ServedModel, ...] | None:
    entries = models_listed(listed)
    if entries is None:
        return None
    return distinct(ServedModel(id=entry["id"], max_tokens=as_count(entry.get("max_model_len"))) for entry in entries)


def _sleeps(metrics: MetricSamples) -> bool:
    """Whether any engine says that it is not awake."""
    return any(labels.get("sleep_state") == "awake" and not value for labels, value in metrics.samples(_SLEEP))


_TGI_RUNNING = "tgi_batch_current_size"
_TGI_QUEUED = "tgi_queue_size"
_TGI_TOKENS = "tgi_request_generated_tokens_sum"  # of requests that have ended
_TGI_FINISHED = "tgi_request_success"
_TGI_PROGRESS = (
    _TGI_TOKENS,
    _TGI_FINISHED,
    "tgi_batch_inference_success",
)  # the last one moves with every step of a batch
_TGI_NAMES = frozenset({_TGI_RUNNING, _TGI_QUEUED, *_TGI_PROGRESS})


@dataclass(frozen=True, slots=True)
class Tgi:
    """A TGI server. It says nothing of its KV cache that could be made a share."""

    version: str | None = None
    name: str | None = "tgi"
    health_path: str = "/health"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Answer how it is; beyond `max_concurrent_requests` it answers 429."""
        described, scraped = await asyncio.gather(server.get("/info"), server.get("/metrics"))
        info, metrics = described.fields, read_metrics(scraped.text, _TGI_NAMES)
        model_id, max_tokens = as_label(info.get("model_id")), as_count(info.get("max_total_tokens"))
        return ServerReading(
            models=(ServedModel(id=model_id, max_tokens=max_tokens),) if model_id else None,
            running=metrics.count(_TGI_RUNNING),
            queued=metrics.count(_TGI_QUEUED),
            max_concurrency=as_count(info.get("max_concurrent_requests")),
            tokens_generated=metrics.count(_TGI_TOKENS),
            jobs_completed=metrics.count(_TGI_FINISHED),
            progress=metrics.values(_TGI_PROGRESS),
        )


@dataclass(frozen=True, slots=True)
class OpenAiCompatible:
    """Any other server. It names no runtime: the registry then matches it with the models it declares alone."""

    version: str | None = None
    name: str | None = None
    health_path: str = "/v1/models"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Answer its models, and their context where it stands in the list."""
        entries = models_listed(await server.get("/v1/models"))
        if entries is None:
            return ServerReading()
        return ServerReading(
            models=distinct(
                ServedModel(id=entry["id"], max_tokens=as_count(entry.get("max_model_len"))) for entry in entries
            )
        )
