"""vLLM. MetricSamples: https://docs.vllm.ai/en/latest/usage/metrics.html."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.runtimes.metrics_text import MetricSamples, read_metrics
from lucid_compute.agent.runtimes.reading import ServerReading, models_with_contexts, notes_on_list

_RUNNING = "vllm:num_requests_running"
_WAITING = "vllm:num_requests_waiting"
_TOKENS = "vllm:generation_tokens_total"
_FINISHED = "vllm:request_success_total"
_KV_USE = ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")  # the second name is the older one
_SLEEP = "vllm:engine_sleep_state"
# During a long prefill the use of the KV cache changes, and no counter of tokens does.
_PROGRESS = (_TOKENS, "vllm:prompt_tokens_total", _FINISHED, *_KV_USE)
_NAMES = frozenset({_RUNNING, _WAITING, _SLEEP, *_PROGRESS})


@dataclass(frozen=True, slots=True)
class Vllm:
    """A vLLM server. It does not report how many requests it takes at a time."""

    version: str | None = None
    name: str | None = "vllm"
    health_path: str = "/health"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return its state: counts summed over models and engines, and the KV cache of the fullest engine."""
        listed, scraped = await asyncio.gather(server.get("/v1/models"), server.get("/metrics"))
        metrics = read_metrics(scraped.text, _NAMES)
        return ServerReading(
            models=models_with_contexts(listed),
            running=metrics.count(_RUNNING),
            queued=metrics.count(_WAITING),
            kv_use=metrics.share(*_KV_USE),
            fullest_rank=metrics.share(*_KV_USE) if metrics.has_several(_RUNNING, "engine") else None,
            tokens_generated=metrics.count(_TOKENS),
            jobs_completed=metrics.count(_FINISHED),
            progress=metrics.values(_PROGRESS),
            not_ready="vLLM sleeps; POST /wake_up wakes it" if _sleeps(metrics) else None,
            notes=notes_on_list(listed),
        )


def _sleeps(metrics: MetricSamples) -> bool:
    """Return whether any engine reports that it is not awake."""
    return any(labels.get("sleep_state") == "awake" and not value for labels, value in metrics.samples(_SLEEP))
