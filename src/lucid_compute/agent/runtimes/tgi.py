"""Text Generation Inference. https://huggingface.co/docs/text-generation-inference/reference/metrics."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lucid_compute.agent.runtimes.inference_server import InferenceServer
from lucid_compute.agent.runtimes.metrics_text import read_metrics
from lucid_compute.agent.runtimes.reading import ServedModel, ServerReading, as_count, is_model_id, notes_on_names

_RUNNING = "tgi_batch_current_size"
_QUEUED = "tgi_queue_size"
_TOKENS = "tgi_request_generated_tokens_sum"  # of requests that have ended
_FINISHED = "tgi_request_success"
_PROGRESS = (_TOKENS, _FINISHED, "tgi_batch_inference_success")  # the last one moves with every step of a batch
_NAMES = frozenset({_RUNNING, _QUEUED, *_PROGRESS})


@dataclass(frozen=True, slots=True)
class Tgi:
    """A TGI server. Its metrics give no share of the KV cache in use."""

    version: str | None = None
    name: str | None = "tgi"
    health_path: str = "/health"

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return its state. Above `max_concurrent_requests` it responds with 429."""
        described, scraped = await asyncio.gather(server.get("/info"), server.get("/metrics"))
        info, metrics = described.fields, read_metrics(scraped.text, _NAMES)
        model_id, max_tokens = info.get("model_id"), as_count(info.get("max_total_tokens"))
        return ServerReading(
            models=(ServedModel(id=str(model_id), max_tokens=max_tokens),) if is_model_id(model_id) else None,
            running=metrics.count(_RUNNING),
            queued=metrics.count(_QUEUED),
            max_concurrency=as_count(info.get("max_concurrent_requests")),
            tokens_generated=metrics.count(_TOKENS),
            jobs_completed=metrics.count(_FINISHED),
            progress=metrics.values(_PROGRESS),
            notes=notes_on_names([model_id]),
        )
