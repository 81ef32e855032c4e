"""Prometheus metrics of requests for inference: what became of them by model, and of this replica's webhooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from lucid_compute import __version__
from lucid_compute.inference.request_tally import DURATION_BOUNDS, FIRST_TOKEN_BOUNDS, RequestTally
from lucid_compute.jobs import Outcome
from lucid_compute.webhooks.sender import WebhookSender

_ENDED = (Outcome.COMPLETED, Outcome.FAILED, Outcome.REJECTED, Outcome.CANCELLED)
_MODEL = ["model_name"]  # as vLLM and the Gateway API Inference Extension call it


class RequestCollector(Collector):
    """Reads the tally when Prometheus asks."""

    def __init__(self, tally: RequestTally) -> None:
        """Read `tally`."""
        self._tally = tally

    def collect(self) -> Iterator[Metric]:
        """Yield what became of jobs, by model."""
        jobs = CounterMetricFamily(
            "lucid_inference_attempts", "Attempts that ended, by outcome", labels=[*_MODEL, "outcome"]
        )
        tokens_in = CounterMetricFamily("lucid_inference_prompt_tokens", "Tokens read", labels=_MODEL)
        tokens_out = CounterMetricFamily("lucid_inference_generation_tokens", "Tokens written", labels=_MODEL)
        durations = HistogramMetricFamily(
            "lucid_inference_request_duration_seconds",
            "From the dispatch of a request that completed to the end of its answer",
            labels=_MODEL,
        )
        first_tokens = HistogramMetricFamily(
            "lucid_inference_time_to_first_token_seconds",
            "From the dispatch of a stream that completed to its first event",
            labels=_MODEL,
        )
        for tally in self._tally.tallies():
            name = [tally.model_name]
            for outcome in _ENDED:
                jobs.add_metric([*name, outcome.value], tally.outcomes[outcome])
            tokens_in.add_metric(name, tally.tokens_in)
            tokens_out.add_metric(name, tally.tokens_out)
            durations.add_metric(name, _buckets(DURATION_BOUNDS, tally.durations), tally.duration_ms / 1000)
            first_tokens.add_metric(name, _buckets(FIRST_TOKEN_BOUNDS, tally.first_tokens), tally.first_token_ms / 1000)
        yield from (jobs, tokens_in, tokens_out, durations, first_tokens)


class WebhookCollector(Collector):
    """Reads the sender's counts when Prometheus asks."""

    def __init__(self, sender: WebhookSender) -> None:
        """Read `sender`."""
        self._sender = sender

    def collect(self) -> Iterator[Metric]:
        """Yield how deliveries went here, and which version this is."""
        attempts = CounterMetricFamily(
            "lucid_webhook_attempts", "Attempts to deliver to webhooks, by outcome", labels=["outcome"]
        )
        for outcome, count in self._sender.outcomes.items():
            attempts.add_metric([outcome], count)
        yield attempts
        yield GaugeMetricFamily("lucid_webhook_deliveries_running", "Deliveries under way", self._sender.running)
        build = GaugeMetricFamily("lucid_build_info", "1, with the version of this replica", labels=["version"])
        build.add_metric([__version__], 1)
        yield build


def _buckets(bounds: Sequence[float], counts: Sequence[int]) -> list[tuple[str, float]]:
    """Answer the counts as Prometheus has them: of each bucket and of all before it."""
    return list(zip([*map(str, bounds), "+Inf"], accumulate(counts), strict=True))
