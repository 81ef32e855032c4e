"""The tally of jobs: what it counts, by how many models at most."""

from __future__ import annotations

import pytest

from lucid_compute.accounting.jobs import Job, Outcome
from lucid_compute.gateway.request_metrics import DURATION_BOUNDS, MAX_MODELS, OTHER, ModelMetrics, RequestMetrics
from tests.factories import NOW


def job(model_name: str = "llama", outcome: Outcome = Outcome.COMPLETED, **changes: object) -> Job:
    """A job that ended."""
    made = Job(
        id="j", attempt=1, model_id="m", model_name=model_name, node_id="n", node_owner="o", key_id="k",
        consumer="c", endpoint="completions", is_stream=bool(changes.pop("is_stream", False)), started_at=NOW,
    )  # fmt: skip
    made.outcome, made.latency_ms = outcome, 1500.0
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def tally_of(*jobs: Job) -> ModelMetrics:
    """What is counted of the first model."""
    tally = RequestMetrics()
    for each in jobs:
        tally.record(each)
    return next(tally.models())


def test_a_job_is_counted_by_outcome_tokens_and_duration() -> None:
    """Only those that completed have a duration; tokens are counted of every one that used some."""
    found = tally_of(job(tokens_in=3, tokens_out=5), job(outcome=Outcome.FAILED, tokens_in=2, tokens_out=None), job())
    assert (found.outcomes[Outcome.COMPLETED], found.outcomes[Outcome.FAILED]) == (2, 1)
    assert (found.tokens_in, found.tokens_out) == (5, 5)
    assert found.durations[DURATION_BOUNDS.index(2.5)] == sum(found.durations) == 2
    assert (found.duration_ms, sum(found.first_tokens)) == (3000, 0)


@pytest.mark.parametrize(("latency_ms", "bucket"), [(0.0, 0), (100.0, 0), (100.1, 1), (300_000, 11), (300_001, 12)])
def test_a_bound_belongs_to_its_bucket(latency_ms: float, bucket: int) -> None:
    """As `le` says: less or equal."""
    assert tally_of(job(latency_ms=latency_ms)).durations[bucket] == 1


def test_streams_alone_have_a_first_token() -> None:
    """A whole answer's first byte is its last."""
    found = tally_of(job(is_stream=True, first_byte_ms=30.0), job(first_byte_ms=30.0))
    assert (sum(found.first_tokens), found.first_token_ms) == (1, 30.0)


def test_a_hundred_thousand_models_are_a_few_and_the_others() -> None:
    """Nothing is lost, and nothing is kept of the names."""
    tally = RequestMetrics()
    for number in range(100_000):
        tally.record(job(f"model {number}"))
    tally.record(job(OTHER))
    found = list(tally.models())
    assert len(found) == MAX_MODELS + 1
    assert found[-1].model_name == OTHER
    assert sum(each.outcomes[Outcome.COMPLETED] for each in found) == 100_001
    assert len(tally._by_name) == MAX_MODELS
