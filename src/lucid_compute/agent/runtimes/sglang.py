"""SGLang. MetricSamples, with --enable-metrics: https://docs.sglang.ai/references/production_metrics.html."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lucid_compute.agent.runtimes.inference_server import InferenceServer, ServerResponse
from lucid_compute.agent.runtimes.metrics_text import MetricSamples, read_metrics
from lucid_compute.agent.runtimes.reading import (
    ServedModel,
    ServerReading,
    as_count,
    as_label,
    contexts_of,
    distinct,
    models_listed,
    notes_on_list,
)

_RUNNING = "sglang:num_running_reqs"
_QUEUED = "sglang:num_queue_reqs"
_TOKENS = "sglang:generation_tokens_total"
_KV_USE = "sglang:token_usage"
# The counters of tokens change when a request ends, the others while it runs.
_PROGRESS = (
    _TOKENS,
    "sglang:prompt_tokens_total",
    "sglang:realtime_tokens_total",
    "sglang:gen_throughput",
    "sglang:num_used_tokens",
    _KV_USE,
)
_NAMES = frozenset({_RUNNING, _QUEUED, *_PROGRESS})
# Each rank of an engine reports the whole engine's requests.
_RANKS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank"})
_DATA_RANK = "dp_rank"


@dataclass(frozen=True, slots=True)
class Sglang:
    """An SGLang server, with what its /server_info reported when it was detected."""

    version: str | None = None
    max_concurrency: int | None = None
    max_tokens: int | None = None
    quantization: str | None = None
    name: str | None = "sglang"
    health_path: str = "/health"

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Sglang:
        """Read /server_info, which older versions call /get_server_info."""
        return cls(
            version=as_label(info.get("version")),
            max_concurrency=as_count(info.get("max_running_requests")) or _effective_limit(info),
            max_tokens=as_count(info.get("context_length")),
            quantization=as_label(info.get("quantization")),
        )

    async def read(self, server: InferenceServer) -> ServerReading:
        """Return its state: counts summed over data-parallel engines, with each engine's ranks counted once."""
        listed, scraped = await asyncio.gather(server.get("/v1/models"), server.get("/metrics"))
        metrics = read_metrics(scraped.text, _NAMES, _is_whole)
        return ServerReading(
            models=self._models(listed),
            running=metrics.count(_RUNNING, per=_RANKS),
            queued=metrics.count(_QUEUED, per=_RANKS),
            kv_use=metrics.share(_KV_USE),
            fullest_rank=self._fullest_rank(metrics),
            max_concurrency=self.max_concurrency,
            tokens_generated=metrics.count(_TOKENS, per=_RANKS),
            progress=metrics.values(_PROGRESS),
            notes=notes_on_list(listed),
        )

    def _fullest_rank(self, metrics: MetricSamples) -> float | None:
        """Return the load of the fullest data-parallel rank: its cache in use, or its share of the limit."""
        if not metrics.has_several(_RUNNING, _DATA_RANK):
            return None
        busy = metrics.largest_share(_RUNNING, _DATA_RANK, self.max_concurrency)
        return max(metrics.share(_KV_USE) or 0.0, busy or 0.0)

    def _models(self, listed: ServerResponse) -> tuple[ServedModel, ...] | None:
        entries = models_listed(listed)
        if entries is None:
            return None
        found = contexts_of(entries).items()
        return distinct(
            ServedModel(id=name, max_tokens=context or self.max_tokens, quantization=self.quantization)
            for name, context in found
        )


def _is_whole(labels: Mapping[str, str]) -> bool:
    """Return whether a sample covers all priorities: with priorities there are others, one for each."""
    return not labels.get("priority")


def _effective_limit(info: Mapping[str, Any]) -> int | None:
    states = info.get("internal_states")
    limits = [
        as_count(state.get("effective_max_running_requests_per_dp"))
        for state in (states if isinstance(states, list) else [])
        if isinstance(state, dict)
    ]
    return sum(limit for limit in limits if limit) if limits and all(limits) else None
