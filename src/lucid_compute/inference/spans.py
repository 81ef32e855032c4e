"""What the spans of a request say: by the names of OpenTelemetry's conventions where it has some, else by ours."""

from __future__ import annotations

from lucid_compute.fleet.fleet_node import FleetNode
from lucid_compute.inference.tracing import Span
from lucid_compute.jobs import Job, Outcome


def end_choice(span: Span, node: FleetNode | None) -> None:
    """End the span of a choice that found `node`; None is the model's upstream."""
    span.note({"lucid.node.id": None if node is None else node.state.id})
    span.end()


def end_attempt(span: Span, job: Job) -> None:
    """End the span of an attempt with what its job says; only a node's failure is an error."""
    span.note(
        {
            "gen_ai.request.model": job.model_name,
            "gen_ai.usage.input_tokens": job.tokens_in,
            "gen_ai.usage.output_tokens": job.tokens_out,
            "http.response.status_code": job.status,
            "lucid.job.id": job.id,
            "lucid.attempt": job.attempt,
            "lucid.node.id": job.node_id,
            "lucid.outcome": job.outcome.value,
            "lucid.first_byte_ms": job.first_byte_ms,
        }
    )
    span.end((job.reason or "failed") if job.outcome is Outcome.FAILED else None)
