"""Counts of ended jobs by model, for Prometheus. Counting one takes a third of a microsecond.

A histogram of the metrics library takes twice as long, and two would be needed, so the counts are kept here and read
on demand. Models beyond the first `MAX_MODELS` are counted together: a label that clients or owners choose must not
create series without bound.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from lucid_compute.accounting.jobs import Job, Outcome

MAX_MODELS = 16
OTHER = "other"
# Seconds; as vLLM's `e2e_request_latency_seconds` and `time_to_first_token_seconds`, thinned out.
DURATION_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)
_DURATION_BOUNDS_MS = tuple(bound * 1000 for bound in DURATION_BOUNDS)
_FIRST_TOKEN_BOUNDS_MS = tuple(bound * 1000 for bound in FIRST_TOKEN_BOUNDS)


class ModelMetrics:
    """Counts of one model's jobs. `durations` and `first_tokens` are counts by bucket; the last bucket has no bound."""

    __slots__ = (
        "duration_ms",
        "durations",
        "first_token_ms",
        "first_tokens",
        "model_name",
        "outcomes",
        "tokens_in",
        "tokens_out",
    )

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name
        self.outcomes = dict.fromkeys(Outcome, 0)
        self.tokens_in = self.tokens_out = 0
        self.durations = [0] * (len(DURATION_BOUNDS) + 1)
        self.first_tokens = [0] * (len(FIRST_TOKEN_BOUNDS) + 1)
        self.duration_ms = self.first_token_ms = 0.0


class RequestMetrics:
    """Counts of the jobs that ended in this replica."""

    def __init__(self) -> None:
        self._by_name: dict[str, ModelMetrics] = {}
        self._other = ModelMetrics(OTHER)

    def record(self, job: Job) -> None:
        """Count a job that has ended."""
        model = self._by_name.get(job.model_name) or self._find(job.model_name)
        outcome = job.outcome
        model.outcomes[outcome] += 1
        if job.tokens_in is not None:
            model.tokens_in += job.tokens_in
            model.tokens_out += job.tokens_out or 0
        if outcome is Outcome.COMPLETED and job.latency_ms is not None:
            model.durations[bisect_left(_DURATION_BOUNDS_MS, job.latency_ms)] += 1
            model.duration_ms += job.latency_ms
            if job.is_stream and job.first_byte_ms is not None:
                model.first_tokens[bisect_left(_FIRST_TOKEN_BOUNDS_MS, job.first_byte_ms)] += 1
                model.first_token_ms += job.first_byte_ms

    def models(self) -> Iterator[ModelMetrics]:
        """Yield the counts of each model, and those of all others together."""
        yield from self._by_name.values()
        yield self._other

    def _find(self, model_name: str) -> ModelMetrics:
        if len(self._by_name) >= MAX_MODELS or model_name == OTHER:
            return self._other
        model = self._by_name[model_name] = ModelMetrics(model_name)
        return model
